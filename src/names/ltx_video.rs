//! LTX-Video (2B and 13B). Only the stem and the norms of queries and keys have two names.

use super::family::{row, Family, Mark};

/// The table.
#[rustfmt::skip]
pub const FAMILY: Family = Family {
    name: "LTX-Video",
    rows: &[
        row("proj_in", "patchify_proj"),
        row("caption_projection.linear_1", "caption_projection.linear_1"),
        row("caption_projection.linear_2", "caption_projection.linear_2"),
        row("time_embed.emb.timestep_embedder.linear_1", "adaln_single.emb.timestep_embedder.linear_1"),
        row("time_embed.emb.timestep_embedder.linear_2", "adaln_single.emb.timestep_embedder.linear_2"),
        row("time_embed.linear", "adaln_single.linear"),
        row("scale_shift_table", "scale_shift_table"),
        row("proj_out", "proj_out"),

        row("transformer_blocks.{}.scale_shift_table", "transformer_blocks.{}.scale_shift_table"),
        row("transformer_blocks.{}.attn1.to_q", "transformer_blocks.{}.attn1.to_q"),
        row("transformer_blocks.{}.attn1.to_k", "transformer_blocks.{}.attn1.to_k"),
        row("transformer_blocks.{}.attn1.to_v", "transformer_blocks.{}.attn1.to_v"),
        row("transformer_blocks.{}.attn1.to_out.0", "transformer_blocks.{}.attn1.to_out.0"),
        row("transformer_blocks.{}.attn1.norm_q", "transformer_blocks.{}.attn1.q_norm"),
        row("transformer_blocks.{}.attn1.norm_k", "transformer_blocks.{}.attn1.k_norm"),
        row("transformer_blocks.{}.attn2.to_q", "transformer_blocks.{}.attn2.to_q"),
        row("transformer_blocks.{}.attn2.to_k", "transformer_blocks.{}.attn2.to_k"),
        row("transformer_blocks.{}.attn2.to_v", "transformer_blocks.{}.attn2.to_v"),
        row("transformer_blocks.{}.attn2.to_out.0", "transformer_blocks.{}.attn2.to_out.0"),
        row("transformer_blocks.{}.attn2.norm_q", "transformer_blocks.{}.attn2.q_norm"),
        row("transformer_blocks.{}.attn2.norm_k", "transformer_blocks.{}.attn2.k_norm"),
        row("transformer_blocks.{}.ff.net.0.proj", "transformer_blocks.{}.ff.net.0.proj"),
        row("transformer_blocks.{}.ff.net.2", "transformer_blocks.{}.ff.net.2"),
    ],
    also: &[],
    parts: &[],
    marks: &[
        Mark::Has("adaln_single.linear"),
        Mark::Has("patchify_proj"),
        // 2B, 13B.
        Mark::Columns("transformer_blocks.{}.attn1.to_q", &[2048, 4096]),
        Mark::Columns("transformer_blocks.{}.attn1.to_out.0", &[2048, 4096]),
        // The caption is projected to the model's width: what tells it from Cosmos, which is as wide and as deep.
        Mark::Columns("transformer_blocks.{}.attn2.to_k", &[2048, 4096]),
        Mark::Columns("transformer_blocks.{}.attn2.to_v", &[2048, 4096]),
        Mark::Ratio("transformer_blocks.{}.attn2.to_k", 1, 1),
        Mark::Ratio("transformer_blocks.{}.ff.net.0.proj", 4, 1),
        Mark::Blocks("transformer_blocks.{}", &[28, 48]),
    ],
};
