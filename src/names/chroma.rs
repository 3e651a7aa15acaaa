//! Chroma: Flux.1 without modulation layers and pooled text; one small network, the distilled guidance layer, makes all modulations.
//! What is left has Flux.1's names and shapes, so an adapter that trains nothing else serves both.

use super::family::{row, rows, Family, Mark};
use super::flux1;

/// The table.
#[rustfmt::skip]
pub const FAMILY: Family = Family {
    name: "Chroma",
    rows: &[
        row("x_embedder", "img_in"),
        row("context_embedder", "txt_in"),
        row("proj_out", "final_layer.linear"),
        row("distilled_guidance_layer.in_proj", "distilled_guidance_layer.in_proj"),
        row("distilled_guidance_layer.out_proj", "distilled_guidance_layer.out_proj"),
        row("distilled_guidance_layer.layers.{}.linear_1", "distilled_guidance_layer.layers.{}.in_layer"),
        row("distilled_guidance_layer.layers.{}.linear_2", "distilled_guidance_layer.layers.{}.out_layer"),
        row("distilled_guidance_layer.norms.{}", "distilled_guidance_layer.norms.{}.scale"),

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

        rows("single_transformer_blocks.{}.attn.to_q", "single_blocks.{}.linear1", 0, 1, 7),
        rows("single_transformer_blocks.{}.attn.to_k", "single_blocks.{}.linear1", 1, 1, 7),
        rows("single_transformer_blocks.{}.attn.to_v", "single_blocks.{}.linear1", 2, 1, 7),
        rows("single_transformer_blocks.{}.proj_mlp", "single_blocks.{}.linear1", 3, 4, 7),
        row("single_transformer_blocks.{}.proj_out", "single_blocks.{}.linear2"),
        row("single_transformer_blocks.{}.attn.norm_q", "single_blocks.{}.norm.query_norm.scale"),
        row("single_transformer_blocks.{}.attn.norm_k", "single_blocks.{}.norm.key_norm.scale"),
    ],
    also: flux1::ALSO,
    parts: flux1::PARTS,
    marks: &[
        Mark::Has("distilled_guidance_layer.in_proj"),
        Mark::Has("distilled_guidance_layer.layers.{}.in_layer"),
        Mark::Columns("double_blocks.{}.img_attn.qkv", &[3072]),
        Mark::Columns("double_blocks.{}.txt_attn.qkv", &[3072]),
        Mark::Columns("single_blocks.{}.linear1", &[3072]),
        Mark::Ratio("double_blocks.{}.img_mlp.0", 4, 1),
        Mark::Ratio("single_blocks.{}.linear1", 7, 1),
        Mark::Ratio("single_blocks.{}.linear2", 1, 5),
        Mark::Blocks("double_blocks.{}", &[19]),
        Mark::Blocks("single_blocks.{}", &[38]),
    ],
};
