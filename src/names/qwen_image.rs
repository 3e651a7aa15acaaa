//! Qwen-Image (2512, Edit, Edit 2509 and 2511, Layered). The release has diffusers' names, and everyone keeps them.

use super::family::{row, Family, Mark};

/// The table.
#[rustfmt::skip]
pub const FAMILY: Family = Family {
    name: "Qwen-Image",
    rows: &[
        row("img_in", "img_in"),
        row("txt_in", "txt_in"),
        row("txt_norm", "txt_norm"),
        row("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_1"),
        row("time_text_embed.timestep_embedder.linear_2", "time_text_embed.timestep_embedder.linear_2"),
        row("norm_out.linear", "norm_out.linear"),
        row("proj_out", "proj_out"),

        row("transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_q"),
        row("transformer_blocks.{}.attn.to_k", "transformer_blocks.{}.attn.to_k"),
        row("transformer_blocks.{}.attn.to_v", "transformer_blocks.{}.attn.to_v"),
        row("transformer_blocks.{}.attn.add_q_proj", "transformer_blocks.{}.attn.add_q_proj"),
        row("transformer_blocks.{}.attn.add_k_proj", "transformer_blocks.{}.attn.add_k_proj"),
        row("transformer_blocks.{}.attn.add_v_proj", "transformer_blocks.{}.attn.add_v_proj"),
        row("transformer_blocks.{}.attn.to_out.0", "transformer_blocks.{}.attn.to_out.0"),
        row("transformer_blocks.{}.attn.to_add_out", "transformer_blocks.{}.attn.to_add_out"),
        row("transformer_blocks.{}.attn.norm_q", "transformer_blocks.{}.attn.norm_q"),
        row("transformer_blocks.{}.attn.norm_k", "transformer_blocks.{}.attn.norm_k"),
        row("transformer_blocks.{}.attn.norm_added_q", "transformer_blocks.{}.attn.norm_added_q"),
        row("transformer_blocks.{}.attn.norm_added_k", "transformer_blocks.{}.attn.norm_added_k"),
        row("transformer_blocks.{}.img_mod.1", "transformer_blocks.{}.img_mod.1"),
        row("transformer_blocks.{}.img_mlp.net.0.proj", "transformer_blocks.{}.img_mlp.net.0.proj"),
        row("transformer_blocks.{}.img_mlp.net.2", "transformer_blocks.{}.img_mlp.net.2"),
        row("transformer_blocks.{}.txt_mod.1", "transformer_blocks.{}.txt_mod.1"),
        row("transformer_blocks.{}.txt_mlp.net.0.proj", "transformer_blocks.{}.txt_mlp.net.0.proj"),
        row("transformer_blocks.{}.txt_mlp.net.2", "transformer_blocks.{}.txt_mlp.net.2"),
    ],
    also: &[],
    parts: &[],
    marks: &[
        Mark::Has("transformer_blocks.{}.img_mlp.net.0.proj"),
        Mark::Has("transformer_blocks.{}.txt_mlp.net.0.proj"),
        Mark::Has("transformer_blocks.{}.img_mod.1"),
        Mark::Columns("transformer_blocks.{}.attn.to_q", &[3072]),
        Mark::Columns("transformer_blocks.{}.attn.add_q_proj", &[3072]),
        Mark::Ratio("transformer_blocks.{}.attn.to_q", 1, 1),
        Mark::Ratio("transformer_blocks.{}.img_mlp.net.0.proj", 4, 1),
        Mark::Blocks("transformer_blocks.{}", &[60]),
    ],
};
