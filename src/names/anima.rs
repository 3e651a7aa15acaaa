//! Anima and Cosmos-Predict2, whose transformer it is. The checkpoint's names are NVIDIA's own, which kohya and ComfyUI keep. Anima's
//! checkpoint also holds the model that turns Qwen3's states into T5's: `llm_adapter`, of which diffusers makes `text_conditioner`.

use super::family::{row, Family, Mark};

/// The table.
#[rustfmt::skip]
pub const FAMILY: Family = Family {
    name: "Anima",
    rows: &[
        row("patch_embed.proj", "x_embedder.proj.1"),
        row("time_embed.t_embedder.linear_1", "t_embedder.1.linear_1"),
        row("time_embed.t_embedder.linear_2", "t_embedder.1.linear_2"),
        row("time_embed.norm", "t_embedding_norm"),
        row("norm_out.linear_1", "final_layer.adaln_modulation.1"),
        row("norm_out.linear_2", "final_layer.adaln_modulation.2"),
        row("proj_out", "final_layer.linear"),

        row("transformer_blocks.{}.norm1.linear_1", "blocks.{}.adaln_modulation_self_attn.1"),
        row("transformer_blocks.{}.norm1.linear_2", "blocks.{}.adaln_modulation_self_attn.2"),
        row("transformer_blocks.{}.attn1.to_q", "blocks.{}.self_attn.q_proj"),
        row("transformer_blocks.{}.attn1.to_k", "blocks.{}.self_attn.k_proj"),
        row("transformer_blocks.{}.attn1.to_v", "blocks.{}.self_attn.v_proj"),
        row("transformer_blocks.{}.attn1.to_out.0", "blocks.{}.self_attn.output_proj"),
        row("transformer_blocks.{}.attn1.norm_q", "blocks.{}.self_attn.q_norm"),
        row("transformer_blocks.{}.attn1.norm_k", "blocks.{}.self_attn.k_norm"),
        row("transformer_blocks.{}.norm2.linear_1", "blocks.{}.adaln_modulation_cross_attn.1"),
        row("transformer_blocks.{}.norm2.linear_2", "blocks.{}.adaln_modulation_cross_attn.2"),
        row("transformer_blocks.{}.attn2.to_q", "blocks.{}.cross_attn.q_proj"),
        row("transformer_blocks.{}.attn2.to_k", "blocks.{}.cross_attn.k_proj"),
        row("transformer_blocks.{}.attn2.to_v", "blocks.{}.cross_attn.v_proj"),
        row("transformer_blocks.{}.attn2.to_out.0", "blocks.{}.cross_attn.output_proj"),
        row("transformer_blocks.{}.attn2.norm_q", "blocks.{}.cross_attn.q_norm"),
        row("transformer_blocks.{}.attn2.norm_k", "blocks.{}.cross_attn.k_norm"),
        row("transformer_blocks.{}.norm3.linear_1", "blocks.{}.adaln_modulation_mlp.1"),
        row("transformer_blocks.{}.norm3.linear_2", "blocks.{}.adaln_modulation_mlp.2"),
        row("transformer_blocks.{}.ff.net.0.proj", "blocks.{}.mlp.layer1"),
        row("transformer_blocks.{}.ff.net.2", "blocks.{}.mlp.layer2"),

        row("text_conditioner.embed", "llm_adapter.embed"),
        row("text_conditioner.out_proj", "llm_adapter.out_proj"),
        row("text_conditioner.norm", "llm_adapter.norm"),
        row("text_conditioner.blocks.{}.norm_self_attn", "llm_adapter.blocks.{}.norm_self_attn"),
        row("text_conditioner.blocks.{}.self_attn.q_proj", "llm_adapter.blocks.{}.self_attn.q_proj"),
        row("text_conditioner.blocks.{}.self_attn.k_proj", "llm_adapter.blocks.{}.self_attn.k_proj"),
        row("text_conditioner.blocks.{}.self_attn.v_proj", "llm_adapter.blocks.{}.self_attn.v_proj"),
        row("text_conditioner.blocks.{}.self_attn.o_proj", "llm_adapter.blocks.{}.self_attn.o_proj"),
        row("text_conditioner.blocks.{}.self_attn.q_norm", "llm_adapter.blocks.{}.self_attn.q_norm"),
        row("text_conditioner.blocks.{}.self_attn.k_norm", "llm_adapter.blocks.{}.self_attn.k_norm"),
        row("text_conditioner.blocks.{}.norm_cross_attn", "llm_adapter.blocks.{}.norm_cross_attn"),
        row("text_conditioner.blocks.{}.cross_attn.q_proj", "llm_adapter.blocks.{}.cross_attn.q_proj"),
        row("text_conditioner.blocks.{}.cross_attn.k_proj", "llm_adapter.blocks.{}.cross_attn.k_proj"),
        row("text_conditioner.blocks.{}.cross_attn.v_proj", "llm_adapter.blocks.{}.cross_attn.v_proj"),
        row("text_conditioner.blocks.{}.cross_attn.o_proj", "llm_adapter.blocks.{}.cross_attn.o_proj"),
        row("text_conditioner.blocks.{}.cross_attn.q_norm", "llm_adapter.blocks.{}.cross_attn.q_norm"),
        row("text_conditioner.blocks.{}.cross_attn.k_norm", "llm_adapter.blocks.{}.cross_attn.k_norm"),
        row("text_conditioner.blocks.{}.norm_mlp", "llm_adapter.blocks.{}.norm_mlp"),
        row("text_conditioner.blocks.{}.mlp.0", "llm_adapter.blocks.{}.mlp.0"),
        row("text_conditioner.blocks.{}.mlp.2", "llm_adapter.blocks.{}.mlp.2"),
    ],
    also: &[],
    parts: &[],
    marks: &[
        Mark::Has("llm_adapter.blocks.{}.self_attn.q_proj"),
        Mark::Columns("blocks.{}.self_attn.q_proj", &[2048]),
        Mark::Columns("blocks.{}.self_attn.output_proj", &[2048]),
        Mark::Columns("blocks.{}.cross_attn.q_proj", &[2048]),
        // T5's states: what tells it from LTX-Video, which is as wide and as deep.
        Mark::Columns("blocks.{}.cross_attn.k_proj", &[1024]),
        Mark::Columns("blocks.{}.cross_attn.v_proj", &[1024]),
        Mark::Columns("blocks.{}.mlp.layer1", &[2048]),
        Mark::Ratio("blocks.{}.self_attn.q_proj", 1, 1),
        Mark::Ratio("blocks.{}.mlp.layer1", 4, 1),
        Mark::Blocks("blocks.{}", &[28]),
    ],
};

/// The same without the adapter: 2B, which an adapter's file alone does not tell from Anima, and 14B.
#[rustfmt::skip]
pub const COSMOS_PREDICT2: Family = Family {
    name: "Cosmos-Predict2",
    marks: &[
        Mark::Lacks("llm_adapter.blocks.{}.self_attn.q_proj"),
        Mark::Lacks("llm_adapter.blocks.{}.cross_attn.q_proj"),
        Mark::Columns("blocks.{}.self_attn.q_proj", &[2048, 5120]),
        Mark::Columns("blocks.{}.self_attn.output_proj", &[2048, 5120]),
        Mark::Columns("blocks.{}.cross_attn.q_proj", &[2048, 5120]),
        Mark::Columns("blocks.{}.cross_attn.k_proj", &[1024]),
        Mark::Columns("blocks.{}.cross_attn.v_proj", &[1024]),
        Mark::Columns("blocks.{}.mlp.layer1", &[2048, 5120]),
        Mark::Ratio("blocks.{}.self_attn.q_proj", 1, 1),
        Mark::Ratio("blocks.{}.mlp.layer1", 4, 1),
        Mark::Blocks("blocks.{}", &[28, 36]),
    ],
    ..FAMILY
};
