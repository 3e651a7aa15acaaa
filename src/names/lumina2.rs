//! Lumina-Image 2.0. The checkpoint's names are Alpha-VLLM's own. Queries have 24 heads, keys and values 8: three fifths of `qkv` and one
//! fifth each. The release's `norm_final` is used by nothing and stands in no other layout.

use super::family::{row, rows, Family, Mark};

/// The table.
#[rustfmt::skip]
pub const FAMILY: Family = Family {
    name: "Lumina 2",
    rows: &[
        row("x_embedder", "x_embedder"),
        row("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        row("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        row("time_caption_embed.caption_embedder.0", "cap_embedder.0"),
        row("time_caption_embed.caption_embedder.1", "cap_embedder.1"),
        row("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        row("norm_out.linear_2", "final_layer.linear"),

        rows("layers.{}.attn.to_q", "layers.{}.attention.qkv", 0, 3, 5),
        rows("layers.{}.attn.to_k", "layers.{}.attention.qkv", 3, 1, 5),
        rows("layers.{}.attn.to_v", "layers.{}.attention.qkv", 4, 1, 5),
        row("layers.{}.attn.to_out.0", "layers.{}.attention.out"),
        row("layers.{}.attn.norm_q", "layers.{}.attention.q_norm"),
        row("layers.{}.attn.norm_k", "layers.{}.attention.k_norm"),
        row("layers.{}.feed_forward.linear_1", "layers.{}.feed_forward.w1"),
        row("layers.{}.feed_forward.linear_2", "layers.{}.feed_forward.w2"),
        row("layers.{}.feed_forward.linear_3", "layers.{}.feed_forward.w3"),
        row("layers.{}.norm1.norm", "layers.{}.attention_norm1"),
        row("layers.{}.norm1.linear", "layers.{}.adaLN_modulation.1"),
        row("layers.{}.norm2", "layers.{}.attention_norm2"),
        row("layers.{}.ffn_norm1", "layers.{}.ffn_norm1"),
        row("layers.{}.ffn_norm2", "layers.{}.ffn_norm2"),

        rows("noise_refiner.{}.attn.to_q", "noise_refiner.{}.attention.qkv", 0, 3, 5),
        rows("noise_refiner.{}.attn.to_k", "noise_refiner.{}.attention.qkv", 3, 1, 5),
        rows("noise_refiner.{}.attn.to_v", "noise_refiner.{}.attention.qkv", 4, 1, 5),
        row("noise_refiner.{}.attn.to_out.0", "noise_refiner.{}.attention.out"),
        row("noise_refiner.{}.attn.norm_q", "noise_refiner.{}.attention.q_norm"),
        row("noise_refiner.{}.attn.norm_k", "noise_refiner.{}.attention.k_norm"),
        row("noise_refiner.{}.feed_forward.linear_1", "noise_refiner.{}.feed_forward.w1"),
        row("noise_refiner.{}.feed_forward.linear_2", "noise_refiner.{}.feed_forward.w2"),
        row("noise_refiner.{}.feed_forward.linear_3", "noise_refiner.{}.feed_forward.w3"),
        row("noise_refiner.{}.norm1.norm", "noise_refiner.{}.attention_norm1"),
        row("noise_refiner.{}.norm1.linear", "noise_refiner.{}.adaLN_modulation.1"),
        row("noise_refiner.{}.norm2", "noise_refiner.{}.attention_norm2"),
        row("noise_refiner.{}.ffn_norm1", "noise_refiner.{}.ffn_norm1"),
        row("noise_refiner.{}.ffn_norm2", "noise_refiner.{}.ffn_norm2"),

        rows("context_refiner.{}.attn.to_q", "context_refiner.{}.attention.qkv", 0, 3, 5),
        rows("context_refiner.{}.attn.to_k", "context_refiner.{}.attention.qkv", 3, 1, 5),
        rows("context_refiner.{}.attn.to_v", "context_refiner.{}.attention.qkv", 4, 1, 5),
        row("context_refiner.{}.attn.to_out.0", "context_refiner.{}.attention.out"),
        row("context_refiner.{}.attn.norm_q", "context_refiner.{}.attention.q_norm"),
        row("context_refiner.{}.attn.norm_k", "context_refiner.{}.attention.k_norm"),
        row("context_refiner.{}.feed_forward.linear_1", "context_refiner.{}.feed_forward.w1"),
        row("context_refiner.{}.feed_forward.linear_2", "context_refiner.{}.feed_forward.w2"),
        row("context_refiner.{}.feed_forward.linear_3", "context_refiner.{}.feed_forward.w3"),
        row("context_refiner.{}.norm1", "context_refiner.{}.attention_norm1"),
        row("context_refiner.{}.norm2", "context_refiner.{}.attention_norm2"),
        row("context_refiner.{}.ffn_norm1", "context_refiner.{}.ffn_norm1"),
        row("context_refiner.{}.ffn_norm2", "context_refiner.{}.ffn_norm2"),
    ],
    also: &[
        // Diffusers with fused projections.
        ("layers.{}.attn.to_qkv", "layers.{}.attention.qkv"),
        ("noise_refiner.{}.attn.to_qkv", "noise_refiner.{}.attention.qkv"),
        ("context_refiner.{}.attn.to_qkv", "context_refiner.{}.attention.qkv"),
    ],
    parts: &[],
    marks: &[
        Mark::Columns("layers.{}.attention.qkv", &[2304]),
        Mark::Columns("layers.{}.attention.out", &[2304]),
        Mark::Columns("layers.{}.feed_forward.w1", &[2304]),
        Mark::Columns("layers.{}.feed_forward.w3", &[2304]),
        Mark::Columns("layers.{}.feed_forward.w2", &[9216]),
        Mark::Columns("layers.{}.adaLN_modulation.1", &[1024]),
        Mark::Ratio("layers.{}.attention.qkv", 5, 3),
        Mark::Has("layers.{}.adaLN_modulation.1"),
        Mark::Blocks("layers.{}", &[26]),
    ],
};
