//! Flux.2 (dev, Klein 4B and 9B). Modulations are shared by all blocks; a single block's `linear1` holds q, k, v and both halves of a gated
//! MLP and is one weight in either layout.

use super::family::{row, rows, swapped, Family, Mark};

/// The table.
#[rustfmt::skip]
pub const FAMILY: Family = Family {
    name: "Flux.2",
    rows: &[
        row("x_embedder", "img_in"),
        row("context_embedder", "txt_in"),
        row("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        row("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        row("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
        row("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
        row("double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
        row("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
        row("single_stream_modulation.linear", "single_stream_modulation.lin"),
        row("proj_out", "final_layer.linear"),
        swapped("norm_out.linear", "final_layer.adaLN_modulation.1"),

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
        row("transformer_blocks.{}.ff.linear_in", "double_blocks.{}.img_mlp.0"),
        row("transformer_blocks.{}.ff.linear_out", "double_blocks.{}.img_mlp.2"),
        row("transformer_blocks.{}.ff_context.linear_in", "double_blocks.{}.txt_mlp.0"),
        row("transformer_blocks.{}.ff_context.linear_out", "double_blocks.{}.txt_mlp.2"),

        row("single_transformer_blocks.{}.attn.to_qkv_mlp_proj", "single_blocks.{}.linear1"),
        row("single_transformer_blocks.{}.attn.to_out", "single_blocks.{}.linear2"),
        row("single_transformer_blocks.{}.attn.norm_q", "single_blocks.{}.norm.query_norm.scale"),
        row("single_transformer_blocks.{}.attn.norm_k", "single_blocks.{}.norm.key_norm.scale"),
    ],
    also: &[
        ("double_blocks.{}.img_attn.norm.query_norm", "double_blocks.{}.img_attn.norm.query_norm.scale"),
        ("double_blocks.{}.img_attn.norm.key_norm", "double_blocks.{}.img_attn.norm.key_norm.scale"),
        ("double_blocks.{}.txt_attn.norm.query_norm", "double_blocks.{}.txt_attn.norm.query_norm.scale"),
        ("double_blocks.{}.txt_attn.norm.key_norm", "double_blocks.{}.txt_attn.norm.key_norm.scale"),
        ("single_blocks.{}.norm.query_norm", "single_blocks.{}.norm.query_norm.scale"),
        ("single_blocks.{}.norm.key_norm", "single_blocks.{}.norm.key_norm.scale"),
        ("transformer_blocks.{}.attn.to_qkv", "double_blocks.{}.img_attn.qkv"),
        ("transformer_blocks.{}.attn.to_added_qkv", "double_blocks.{}.txt_attn.qkv"),
    ],
    parts: &[rows("single_blocks.{}.linear1_qkv", "single_blocks.{}.linear1", 0, 3, 9)],
    marks: &[
        Mark::Has("double_stream_modulation_img.lin"),
        Mark::Columns("double_blocks.{}.img_attn.qkv", &[6144, 4096, 3072]),
        Mark::Columns("double_blocks.{}.txt_attn.qkv", &[6144, 4096, 3072]),
        Mark::Columns("single_blocks.{}.linear1", &[6144, 4096, 3072]),
        Mark::Ratio("double_blocks.{}.img_mlp.0", 6, 1),
        Mark::Ratio("single_blocks.{}.linear1", 9, 1),
        Mark::Ratio("single_blocks.{}.linear2", 1, 4),
        Mark::Blocks("double_blocks.{}", &[8, 5]),
        Mark::Blocks("single_blocks.{}", &[48, 24, 20]),
    ],
};
