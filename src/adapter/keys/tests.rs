//! Every spelling, there and back.

use super::Dialect::{Diffusers as D, Kohya as K, Peft as P};
use super::*;

const UP: &str = "lora_up.weight";
const DOWN: &str = "lora_down.weight";
const Q: &str = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
const OUT: &str = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0";
const TE_Q: &str = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj";
const TE_OUT: &str = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj";

/// Key, what it says, and whether it is the spelling that `join` gives back.
fn table() -> Vec<(String, Dialect, &'static str, &'static str, bool)> {
    let mut rows = vec![];
    let mut row = |key: &str, d, module, slot, main| rows.push((key.to_owned(), d, module, slot, main));
    let flat = "lora_unet_down_blocks_0_attentions_0_proj_in";
    for slot in
        [UP, DOWN, "lora_mid.weight", "alpha", "dora_scale", "hada_w1_a", "hada_t2", "lokr_w1", "lokr_w2_b"]
    {
        row(&format!("{flat}.{slot}"), K, flat, slot, true);
    }
    for slot in [
        "diff",
        "diff_b",
        "w_norm",
        "b_norm",
        "on_input",
        "weight",
        "scale",
        "a1.weight",
        "b2.weight",
        "bm.weight",
    ] {
        row(&format!("{flat}.{slot}"), K, flat, slot, true);
    }
    for slot in
        ["oft_blocks", "oft_diag", "rescale", "scalar", "q_layer.weight", "lambda_layer", "set_weight"]
    {
        row(&format!("{flat}.{slot}"), K, flat, slot, true);
    }
    let te = "lora_te1_text_model_encoder_layers_11_mlp_fc1";
    row(&format!("{te}.lora_up.weight"), K, te, UP, true);
    row(
        "lycoris_mid_block_resnets_0_conv1.lora_down.weight",
        K,
        "lycoris_mid_block_resnets_0_conv1",
        DOWN,
        true,
    );
    row(
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight",
        K,
        "diffusion_model.double_blocks.0.img_attn.qkv",
        UP,
        true,
    );
    row("diffusion_model.img_in.reshape_weight", K, "diffusion_model.img_in", "reshape_weight", true);
    row(&format!("{Q}.lora_up.weight"), K, Q, UP, true);
    row("base_model.model.blocks.0.attn.lora_up.weight", K, "blocks.0.attn", UP, false);

    row("base_model.model.blocks.0.attn.to_q.lora_A.weight", P, "blocks.0.attn.to_q", DOWN, true);
    row("base_model.model.blocks.0.attn.to_q.lora_B.weight", P, "blocks.0.attn.to_q", UP, true);
    row("base_model.model.blocks.0.attn.to_q.lora_B.bias", P, "blocks.0.attn.to_q", "lora_up.bias", true);
    row("base_model.model.blocks.0.attn.to_q.alpha", P, "blocks.0.attn.to_q", "alpha", true);
    row(
        "base_model.model.blocks.0.attn.to_q.lora_magnitude_vector",
        P,
        "blocks.0.attn.to_q",
        "lora_magnitude_vector",
        true,
    );
    row("base_model.model.blocks.0.attn.to_q.hada_w1_a", P, "blocks.0.attn.to_q", "hada_w1_a", true);
    row("base_model.model.blocks.0.attn.to_q.oft_r", P, "blocks.0.attn.to_q", "oft_r", true);
    row("base_model.model.embed.lora_embedding_A", P, "embed", "lora_embedding_A", true);
    row("base_model.model.embed.ia3_l", P, "embed", "ia3_l", true);
    row("base_model.vera_A", P, "", "vera_A", true);
    row("base_model.vera_B", P, "", "vera_B", true);
    row("base_model.model.blocks.0.attn.to_q.oft_R.weight", P, "blocks.0.attn.to_q", "oft_R.weight", true);
    row(&format!("{flat}.oft_blocks.2"), K, flat, "oft_blocks.2", true);
    row(&format!("{Q}.lora_A.weight"), P, Q, DOWN, true);
    row(&format!("{OUT}.lora_B.weight"), P, OUT, UP, true);
    row(&format!("{TE_Q}.lora_A.weight"), P, TE_Q, DOWN, true);
    row(
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
        P,
        "transformer.transformer_blocks.0.attn.to_q",
        UP,
        true,
    );
    row(&format!("base_model.model.{Q}.lora_A.default.weight"), P, Q, DOWN, false);
    row(&format!("{Q}.lora_A.my_adapter-2.weight"), P, Q, DOWN, false);
    row(&format!("{Q}.lora_B.default.bias"), P, Q, "lora_up.bias", false);
    row(&format!("{Q}.lora_A"), P, Q, DOWN, false);
    row(&format!("{Q}.lora_B"), P, Q, UP, false);
    row(&format!("{Q}.lora_magnitude_vector.weight"), P, Q, "lora_magnitude_vector", false);
    row(&format!("{Q}.lora_magnitude_vector.default.weight"), P, Q, "lora_magnitude_vector", false);
    row("unet.base_model.model.conv_in.lora_A.weight", P, "unet.conv_in", DOWN, false);
    row("conv_in.lora_A.weight", P, "conv_in", DOWN, false);
    row("lora_unet_conv_in.lora_A.weight", K, "lora_unet_conv_in", DOWN, false);

    row(&format!("{Q}.lora.up.weight"), D, Q, UP, true);
    row(&format!("{Q}.lora.down.weight"), D, Q, DOWN, true);
    row(&format!("{Q}.alpha"), K, Q, "alpha", true);
    row(&format!("{Q}_lora.up.weight"), D, Q, UP, false);
    row(&format!("{Q}.lora_linear_layer.down.weight"), D, Q, DOWN, false);
    row(&format!("{TE_Q}.lora_linear_layer.up.weight"), D, TE_Q, UP, true);
    let attention = Q.strip_suffix("to_q").unwrap();
    row(&format!("{attention}processor.to_q_lora.up.weight"), D, Q, UP, false);
    row(&format!("{attention}processor.to_out_lora.down.weight"), D, OUT, DOWN, false);
    row(&format!("{attention}to_out_lora.down.weight"), D, OUT, DOWN, false);
    row(&format!("{attention}processor.to_out_lora.alpha"), D, OUT, "alpha", false);
    row("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight", D, TE_OUT, UP, false);
    for module in ["double_blocks.3.processor.qkv_lora1", "single_blocks.3.processor.proj_lora"] {
        row(&format!("{module}.up.weight"), D, module, UP, true);
        row(&format!("{module}.down.weight"), D, module, DOWN, true);
    }
    rows
}

#[test]
fn every_spelling_says_what_it_means_and_main_ones_come_back() {
    let rows = table();
    assert!(rows.len() >= 60, "{}", rows.len());
    for (key, dialect, module, slot, main) in rows {
        let got = split(&key).unwrap_or_else(|| panic!("{key} not understood"));
        assert_eq!(got, Split { dialect, module: module.to_owned(), slot }, "{key}");
        assert_eq!(join(dialect, module, slot).as_deref() == Some(key.as_str()), main, "{key}");
    }
}

#[test]
fn other_keys_are_not_an_adapters() {
    for key in [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.0.0.bias",
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "bundle_emb.style.string_to_param.*",
        "lora_up.weight",
        ".lora_up.weight",
        "lora_A.weight",
        ".lora_A.weight",
        ".lora.up.weight",
        "x.lora_A.a.b.weight",
        "x.lora_A.a.b",
        "x.my_lora_up.weight",
        "alpha",
        "",
    ] {
        assert_eq!(split(key), None, "{key}");
    }
}

#[test]
fn what_a_dialect_cannot_say_is_none() {
    assert_eq!(join(P, Q, "lora_mid.weight"), None);
    assert_eq!(join(P, Q, "diff"), None);
    assert_eq!(join(D, Q, "hada_w1_a"), None);
    assert_eq!(join(P, "lora_unet_conv_in", UP), None);
    assert_eq!(join(D, "lora_unet_conv_in", UP), None);
    assert_eq!(join(K, Q, "no_such_slot"), None);
    assert_eq!(join(D, Q, "alpha"), Some(format!("{Q}.alpha")));
}

#[test]
fn slots_are_unique_and_name_their_algorithm() {
    for (i, slot) in SLOTS.iter().enumerate() {
        assert!(SLOTS[..i].iter().all(|s| s.name != slot.name), "{} stands twice", slot.name);
    }
    for (slot, algorithm) in [
        ("lora_up.weight", LORA),
        ("dora_scale", Some("DoRA")),
        ("hada_w1_a", LOHA),
        ("lokr_w1", LOKR),
        ("a1.weight", GLORA),
        ("oft_blocks", OFT),
        ("on_input", IA3),
        ("alpha", None),
        ("nonsense", None),
    ] {
        assert_eq!(algorithm_of(slot), algorithm, "{slot}");
    }
    assert_eq!([K, P, D].map(Dialect::name), ["kohya", "peft", "diffusers"]);
}
