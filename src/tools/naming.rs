//! What an extracted module is called, so that every host knows it: kohya's names, made of the checkpoint's.
//!
//! | checkpoint | module |
//! |---|---|
//! | SD1 and SD2 U-Net | `lora_unet_` + diffusers' path, as sd-scripts names them |
//! | any other diffusion model, SDXL too | `lora_unet_` + the path inside the model |
//! | CLIP text encoders | `lora_te_`, or `lora_te1_`, `lora_te2_` of several, + transformers' path; OpenCLIP's fused q, k, v become three modules |
//! | T5 | `lora_te3_` + its path |

use crate::names::clip;
use crate::names::scope::{classify, Scope};
use crate::names::sd_unet::Layout;

/// How extracted modules are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// As in the table above.
    Kohya,
    /// The checkpoint's own names, with dots.
    Checkpoint,
}

/// Names the weights of one checkpoint.
pub struct Namer {
    spelling: Spelling,
    /// How to reach diffusers' names, where kohya uses them.
    layout: Option<Layout>,
    several_encoders: bool,
}

/// Tables of T5 and of language models.
const TABLES: &[&str] = &["shared", "embed_tokens", "relative_attention_bias"];

impl Namer {
    /// For the checkpoint with these keys.
    pub fn of<'a>(keys: impl Iterator<Item = &'a str> + Clone, spelling: Spelling) -> Self {
        let places = || keys.clone().map(|key| classify(key.strip_suffix(".weight").unwrap_or(key)));
        let inside = || places().filter(|p| matches!(p.scope, Scope::Unet | Scope::Bare)).map(|p| p.rest);
        let has = |begin: &str| inside().any(|path| path.starts_with(begin));
        // Only SDXL has the embedding of sizes, and there kohya keeps the checkpoint's names.
        let early = has("input_blocks.") && !has("label_emb.");
        let other = |scope| matches!(scope, Scope::Encoder2 | Scope::Encoder3 | Scope::T5);
        Namer {
            spelling,
            layout: early.then(|| Layout::of(inside())),
            several_encoders: places().any(|p| other(p.scope)),
        }
    }

    /// The modules of a weight: one, or as many as it fuses, by equal parts of its rows. `None` for what no LoRA is made of.
    pub fn module(&self, key: &str) -> Option<Vec<String>> {
        let path = match key.strip_suffix(".weight") {
            Some(path) => path,
            None if key.ends_with("in_proj_weight") => key,
            None => return None,
        };
        let place = classify(path);
        let last = path.rsplit('.').next().unwrap_or(path);
        // Tables of vectors, and OpenCLIP's projection, which is stored the other way round.
        let table = last.contains("embedding") || TABLES.contains(&last);
        if table || last == "text_projection" || place.scope == Scope::Foreign {
            return None;
        }
        if self.spelling == Spelling::Checkpoint {
            return Some(vec![path.to_owned()]);
        }
        let (prefix, names) = match place.scope {
            Scope::Unet | Scope::Bare => {
                let diffusers = self.layout.as_ref().and_then(|layout| layout.to_diffusers(place.rest));
                ("lora_unet_", vec![diffusers.unwrap_or_else(|| place.rest.to_owned())])
            }
            Scope::Encoder1 if self.several_encoders => ("lora_te1_", self.encoder(place.rest)),
            Scope::Encoder2 => ("lora_te2_", self.encoder(place.rest)),
            Scope::Encoder3 | Scope::T5 => ("lora_te3_", self.encoder(place.rest)),
            _ => ("lora_te_", self.encoder(place.rest)),
        };
        Some(names.iter().map(|name| format!("{prefix}{}", name.replace('.', "_"))).collect())
    }

    fn encoder(&self, path: &str) -> Vec<String> {
        let names: Vec<String> = clip::to_transformers(path).into_iter().map(|(name, _)| name).collect();
        if names.is_empty() {
            vec![path.to_owned()]
        } else {
            names
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(keys: &[&str], key: &str) -> Vec<String> {
        Namer::of(keys.iter().copied(), Spelling::Kohya).module(key).unwrap_or_default()
    }

    #[test]
    fn stable_diffusion_1_is_named_by_diffusers_paths() {
        let unet = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight";
        let clip = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight";
        let keys = [unet, "model.diffusion_model.input_blocks.3.0.op.weight", clip];
        assert_eq!(
            names(&keys, unet),
            ["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"]
        );
        assert_eq!(names(&keys, clip), ["lora_te_text_model_encoder_layers_0_mlp_fc1"]);
        for other in [
            "first_stage_model.decoder.conv_in.weight",
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            "model.diffusion_model.input_blocks.3.0.op.bias",
            "alphas_cumprod",
        ] {
            assert!(names(&keys, other).is_empty(), "{other}");
        }
    }

    #[test]
    fn sdxl_keeps_its_paths_and_splits_what_open_clip_fuses() {
        let unet = "model.diffusion_model.input_blocks.4.1.proj_in.weight";
        let fused = "conditioner.embedders.1.model.transformer.resblocks.7.attn.in_proj_weight";
        let first = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight";
        let keys = [unet, "model.diffusion_model.label_emb.0.0.weight", fused, first];
        assert_eq!(names(&keys, unet), ["lora_unet_input_blocks_4_1_proj_in"]);
        assert_eq!(names(&keys, first), ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"]);
        let root = "lora_te2_text_model_encoder_layers_7_self_attn_";
        assert_eq!(names(&keys, fused), ["q_proj", "k_proj", "v_proj"].map(|p| format!("{root}{p}")));
        let own = Namer::of(keys.iter().copied(), Spelling::Checkpoint);
        assert_eq!(own.module(unet), Some(vec!["model.diffusion_model.input_blocks.4.1.proj_in".into()]));
    }

    #[test]
    fn other_models_keep_their_paths() {
        let keys = ["double_blocks.0.img_attn.qkv.weight"];
        assert_eq!(names(&keys, keys[0]), ["lora_unet_double_blocks_0_img_attn_qkv"]);
    }
}
