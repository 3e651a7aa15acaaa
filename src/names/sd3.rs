//! Stable Diffusion 3 and 3.5 (medium and large). The context half of the last block feeds nothing, so it has only a norm, whose
//! modulation is shift and scale; diffusers exchanges those two, as in the final norm.

use super::family::{row, rows, swapped, Family, Mark, Part, Row};

/// The table.
#[rustfmt::skip]
pub const FAMILY: Family = Family {
    name: "SD 3",
    rows: &[
        row("pos_embed.pos_embed", "pos_embed"),
        row("pos_embed.proj", "x_embedder.proj"),
        row("context_embedder", "context_embedder"),
        row("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        row("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        row("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        row("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        row("proj_out", "final_layer.linear"),
        swapped("norm_out.linear", "final_layer.adaLN_modulation.1"),

        row("transformer_blocks.{}.norm1.linear", "joint_blocks.{}.x_block.adaLN_modulation.1"),
        Row {
            diffusers: "transformer_blocks.{}.norm1_context.linear",
            checkpoint: "joint_blocks.{}.context_block.adaLN_modulation.1",
            part: Part::SwappedLast(&[24, 38]),
        },
        rows("transformer_blocks.{}.attn.to_q", "joint_blocks.{}.x_block.attn.qkv", 0, 1, 3),
        rows("transformer_blocks.{}.attn.to_k", "joint_blocks.{}.x_block.attn.qkv", 1, 1, 3),
        rows("transformer_blocks.{}.attn.to_v", "joint_blocks.{}.x_block.attn.qkv", 2, 1, 3),
        rows("transformer_blocks.{}.attn.add_q_proj", "joint_blocks.{}.context_block.attn.qkv", 0, 1, 3),
        rows("transformer_blocks.{}.attn.add_k_proj", "joint_blocks.{}.context_block.attn.qkv", 1, 1, 3),
        rows("transformer_blocks.{}.attn.add_v_proj", "joint_blocks.{}.context_block.attn.qkv", 2, 1, 3),
        rows("transformer_blocks.{}.attn2.to_q", "joint_blocks.{}.x_block.attn2.qkv", 0, 1, 3),
        rows("transformer_blocks.{}.attn2.to_k", "joint_blocks.{}.x_block.attn2.qkv", 1, 1, 3),
        rows("transformer_blocks.{}.attn2.to_v", "joint_blocks.{}.x_block.attn2.qkv", 2, 1, 3),
        row("transformer_blocks.{}.attn.to_out.0", "joint_blocks.{}.x_block.attn.proj"),
        row("transformer_blocks.{}.attn2.to_out.0", "joint_blocks.{}.x_block.attn2.proj"),
        row("transformer_blocks.{}.attn.to_add_out", "joint_blocks.{}.context_block.attn.proj"),
        row("transformer_blocks.{}.attn.norm_q", "joint_blocks.{}.x_block.attn.ln_q"),
        row("transformer_blocks.{}.attn.norm_k", "joint_blocks.{}.x_block.attn.ln_k"),
        row("transformer_blocks.{}.attn2.norm_q", "joint_blocks.{}.x_block.attn2.ln_q"),
        row("transformer_blocks.{}.attn2.norm_k", "joint_blocks.{}.x_block.attn2.ln_k"),
        row("transformer_blocks.{}.attn.norm_added_q", "joint_blocks.{}.context_block.attn.ln_q"),
        row("transformer_blocks.{}.attn.norm_added_k", "joint_blocks.{}.context_block.attn.ln_k"),
        row("transformer_blocks.{}.ff.net.0.proj", "joint_blocks.{}.x_block.mlp.fc1"),
        row("transformer_blocks.{}.ff.net.2", "joint_blocks.{}.x_block.mlp.fc2"),
        row("transformer_blocks.{}.ff_context.net.0.proj", "joint_blocks.{}.context_block.mlp.fc1"),
        row("transformer_blocks.{}.ff_context.net.2", "joint_blocks.{}.context_block.mlp.fc2"),
    ],
    also: &[
        ("transformer_blocks.{}.attn.to_qkv", "joint_blocks.{}.x_block.attn.qkv"),
        ("transformer_blocks.{}.attn2.to_qkv", "joint_blocks.{}.x_block.attn2.qkv"),
        ("transformer_blocks.{}.attn.to_added_qkv", "joint_blocks.{}.context_block.attn.qkv"),
    ],
    parts: &[],
    marks: &[
        // Medium and large.
        Mark::Columns("joint_blocks.{}.x_block.attn.qkv", &[1536, 2432]),
        Mark::Columns("joint_blocks.{}.context_block.attn.qkv", &[1536, 2432]),
        Mark::Columns("joint_blocks.{}.x_block.attn.proj", &[1536, 2432]),
        Mark::Blocks("joint_blocks.{}", &[24, 38]),
    ],
};
