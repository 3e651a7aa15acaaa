//! Flattened names with their dots put back, for the models whose words are known: SD's U-Net and the text encoders.
//!
//! Flattening loses which `_` was a dot; a list of the words that hold a `_` brings it back.

/// Words of SD's U-Net that hold a `_`, in both layouts.
pub(super) const UNET: &[&str] = &[
    "input_blocks",
    "middle_block",
    "output_blocks",
    "in_layers",
    "emb_layers",
    "out_layers",
    "skip_connection",
    "time_embed",
    "label_emb",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "time_emb_proj",
    "conv_shortcut",
    "conv_in",
    "conv_out",
    "conv_norm_out",
    "time_embedding",
    "add_embedding",
    "linear_1",
    "linear_2",
    "transformer_blocks",
    "proj_in",
    "proj_out",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
];

/// Words of text encoders that hold a `_`: CLIP of transformers and OpenCLIP, T5, and the language models.
pub(super) const TEXT: &[&str] = &[
    "text_model",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "layer_norm1",
    "layer_norm2",
    "final_layer_norm",
    "token_embedding",
    "position_embedding",
    "text_projection",
    "c_fc",
    "c_proj",
    "ln_1",
    "ln_2",
    "ln_final",
    "in_proj",
    "in_proj_weight",
    "in_proj_bias",
    "positional_embedding",
    "wi_0",
    "wi_1",
    "layer_norm",
    "relative_attention_bias",
    "embed_tokens",
    "gate_proj",
    "up_proj",
    "down_proj",
    "q_norm",
    "k_norm",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
];

/// `name` with dots between its words; the longest word of the list wins. A name that has dots is returned as it is.
pub(super) fn with_dots(name: &str, list: &[&str]) -> String {
    if name.contains('.') {
        return name.to_owned();
    }
    let mut path = String::with_capacity(name.len());
    let mut rest = name;
    while !rest.is_empty() {
        let ends = |word: &str| {
            rest.strip_prefix(word).is_some_and(|after| after.is_empty() || after.starts_with('_'))
        };
        let word = list.iter().copied().filter(|word| ends(word)).max_by_key(|word| word.len());
        let word = word.or_else(|| rest.split('_').next()).unwrap_or(rest);
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(word);
        rest = rest.get(word.len()..).unwrap_or_default();
        rest = rest.strip_prefix('_').unwrap_or(rest);
    }
    path
}
