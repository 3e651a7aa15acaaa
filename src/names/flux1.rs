//! Flux.1 (dev, schnell, Fill, Canny, Depth, Redux, Kontext, Krea). The checkpoint's names are Black Forest Labs' own, which kohya and
//! ComfyUI keep. `linear1` holds q, k, v and the MLP's first layer, whose width is four times theirs.

use super::family::{row, rows, swapped, Family, Mark, Row};

/// The table.
#[rustfmt::skip]
pub const FAMILY: Family = Family {
    name: "Flux.1",
    rows: &[
        row("x_embedder", "img_in"),
        row("context_embedder", "txt_in"),
        row("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        row("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        row("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
        row("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
        row("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
        row("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
        row("proj_out", "final_layer.linear"),
        swapped("norm_out.linear", "final_layer.adaLN_modulation.1"),

        row("transformer_blocks.{}.norm1.linear", "double_blocks.{}.img_mod.lin"),
        row("transformer_blocks.{}.norm1_context.linear", "double_blocks.{}.txt_mod.lin"),
        rows("transformer_blocks.{}.attn.to_q", "double_blocks.{}.img_attn.qkv", 0, 1, 3),
        rows("transformer_blocks.{}.attn.to_k", "double_blocks.{}.img_attn.qkv", 1, 1, 3),
        rows("transformer_blocks.{}.attn.to_v", "double_blocks.{}.img_attn.qkv", 2, 1, 3),
        rows("transformer_blocks.{}.attn.add_q_proj", "double_blocks.{}.txt_attn.qkv", 0, 1, 3),
        rows("transformer_blocks.{}.attn.add_k_proj", "double_blocks.{}.txt_attn.qkv", 1, 1, 3),
        rows("transformer_blocks.{}.attn.add_v_proj", "double_blocks.{}.txt_attn.qkv", 2, 1, 3),
        row("transformer_blocks.{}.attn.to_out.0", "double_blocks.{}.img_attn.proj"),
        row("transformer_blocks.{}.attn.to_add_out", "double_blocks.{}.txt_attn.proj"),
        row("transformer_blocks.{}.attn.norm_q", "double_blocks.{}.img_attn.norm.query_norm.scale"),
        row("transformer_blocks.{}.attn.norm_k", "double_blocks.{}.img_attn.norm.key_norm.scale"),
        row("transformer_blocks.{}.attn.norm_added_q", "double_blocks.{}.txt_attn.norm.query_norm.scale"),
        row("transformer_blocks.{}.attn.norm_added_k", "double_blocks.{}.txt_attn.norm.key_norm.scale"),
        row("transformer_blocks.{}.ff.net.0.proj", "double_blocks.{}.img_mlp.0"),
        row("transformer_blocks.{}.ff.net.2", "double_blocks.{}.img_mlp.2"),
        row("transformer_blocks.{}.ff_context.net.0.proj", "double_blocks.{}.txt_mlp.0"),
        row("transformer_blocks.{}.ff_context.net.2", "double_blocks.{}.txt_mlp.2"),

        row("single_transformer_blocks.{}.norm.linear", "single_blocks.{}.modulation.lin"),
        rows("single_transformer_blocks.{}.attn.to_q", "single_blocks.{}.linear1", 0, 1, 7),
        rows("single_transformer_blocks.{}.attn.to_k", "single_blocks.{}.linear1", 1, 1, 7),
        rows("single_transformer_blocks.{}.attn.to_v", "single_blocks.{}.linear1", 2, 1, 7),
        rows("single_transformer_blocks.{}.proj_mlp", "single_blocks.{}.linear1", 3, 4, 7),
        row("single_transformer_blocks.{}.proj_out", "single_blocks.{}.linear2"),
        row("single_transformer_blocks.{}.attn.norm_q", "single_blocks.{}.norm.query_norm.scale"),
        row("single_transformer_blocks.{}.attn.norm_k", "single_blocks.{}.norm.key_norm.scale"),
    ],
    also: ALSO,
    parts: PARTS,
    marks: &[
        Mark::Has("vector_in.in_layer"),
        Mark::Columns("double_blocks.{}.img_attn.qkv", &[3072]),
        Mark::Columns("double_blocks.{}.txt_attn.qkv", &[3072]),
        Mark::Columns("single_blocks.{}.linear1", &[3072]),
        Mark::Ratio("double_blocks.{}.img_mlp.0", 4, 1),
        Mark::Ratio("single_blocks.{}.linear1", 7, 1),
        Mark::Ratio("single_blocks.{}.linear2", 1, 5),
        // 8: the pruned "lite".
        Mark::Blocks("double_blocks.{}", &[8, 19]),
        Mark::Blocks("single_blocks.{}", &[38]),
    ],
};

/// Spellings that all of the Flux models share.
#[rustfmt::skip]
pub(super) const ALSO: &[(&str, &str)] = &[
    // Norms as a plain module.
    ("double_blocks.{}.img_attn.norm.query_norm", "double_blocks.{}.img_attn.norm.query_norm.scale"),
    ("double_blocks.{}.img_attn.norm.key_norm", "double_blocks.{}.img_attn.norm.key_norm.scale"),
    ("double_blocks.{}.txt_attn.norm.query_norm", "double_blocks.{}.txt_attn.norm.query_norm.scale"),
    ("double_blocks.{}.txt_attn.norm.key_norm", "double_blocks.{}.txt_attn.norm.key_norm.scale"),
    ("single_blocks.{}.norm.query_norm", "single_blocks.{}.norm.query_norm.scale"),
    ("single_blocks.{}.norm.key_norm", "single_blocks.{}.norm.key_norm.scale"),
    // XLabs' attention processors, and USO's, which call the image stream 1.
    ("double_blocks.{}.processor.qkv_lora1", "double_blocks.{}.img_attn.qkv"),
    ("double_blocks.{}.processor.qkv_lora2", "double_blocks.{}.txt_attn.qkv"),
    ("double_blocks.{}.processor.proj_lora1", "double_blocks.{}.img_attn.proj"),
    ("double_blocks.{}.processor.proj_lora2", "double_blocks.{}.txt_attn.proj"),
    ("single_blocks.{}.processor.proj_lora", "single_blocks.{}.linear2"),
    // Diffusers with fused projections.
    ("transformer_blocks.{}.attn.to_qkv", "double_blocks.{}.img_attn.qkv"),
    ("transformer_blocks.{}.attn.to_added_qkv", "double_blocks.{}.txt_attn.qkv"),
];

pub(super) const PARTS: &[Row] = &[
    rows("single_blocks.{}.linear1_qkv", "single_blocks.{}.linear1", 0, 3, 7),
    rows("single_blocks.{}.processor.qkv_lora", "single_blocks.{}.linear1", 0, 3, 7),
    rows("single_transformer_blocks.{}.attn.to_qkv", "single_blocks.{}.linear1", 0, 3, 7),
];
