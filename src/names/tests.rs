//! Every naming style against every kind of host.

use super::lists::{Unet, SD15, SDXL, TINY};
use super::sd_unet::Layout as Unets;
use super::*;
use crate::view::Slice;

/// The modules of a U-Net in both layouts.
fn layouts(unet: &Unet) -> (Vec<String>, Vec<String>) {
    let diffusers = unet.modules(true);
    let layout = Unets::of(diffusers.iter().map(String::as_str));
    let checkpoint = diffusers.iter().map(|name| layout.to_checkpoint(name).unwrap()).collect();
    (diffusers, checkpoint)
}

fn host(prefix: &str, names: &[String]) -> Vec<(String, Vec<usize>)> {
    names.iter().map(|name| (format!("{prefix}{name}.weight"), vec![1])).collect()
}

fn index(names: &[&str]) -> Index {
    Index::new(&names.iter().map(|name| (*name, [1])).collect::<Vec<_>>())
}

fn part(target: usize, slice: Option<Slice>) -> Option<Vec<Piece>> {
    Some(vec![Piece { target, slice, rows: None }])
}

fn whole(target: usize) -> Option<Vec<Piece>> {
    part(target, None)
}

/// Where a module goes that goes to one place.
fn only(found: Option<Vec<Piece>>) -> Option<(usize, Option<Slice>)> {
    let found = found?;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].rows, None);
    Some((found[0].target, found[0].slice))
}

/// Stable Diffusion XL as a single file: U-Net, CLIP-L, bigG.
fn sdxl_checkpoint() -> Vec<(String, Vec<usize>)> {
    let mut targets = host("model.diffusion_model.", &layouts(&SDXL).1);
    targets.extend(host("conditioner.embedders.0.transformer.", &clip::trained_modules(12)));
    let second = clip::open_clip_weights(32, 1280);
    targets.extend(
        second.into_iter().map(|(name, rows)| (format!("conditioner.embedders.1.model.{name}"), vec![rows])),
    );
    targets
}

#[test]
fn every_style_reaches_every_unet_host() {
    for unet in [SD15, SDXL, TINY] {
        let (diffusers, checkpoint) = layouts(&unet);
        let hosts = [
            host("model.diffusion_model.", &checkpoint),
            host("diffusion_model.", &checkpoint),
            host("", &checkpoint),
            host("unet.", &diffusers),
            host("", &diffusers),
        ];
        for targets in hosts {
            let index = Index::new(&targets);
            for (i, names) in diffusers.iter().zip(&checkpoint).enumerate() {
                for name in [names.0, names.1] {
                    let flat = flatten(name);
                    for module in [
                        format!("lora_unet_{flat}"),
                        format!("lycoris_{flat}"),
                        format!("unet.{name}"),
                        format!("diffusion_model.{name}"),
                        format!("model.diffusion_model.{name}"),
                        format!("base_model.model.{name}"),
                        name.clone(),
                        format!("{name}.weight"),
                    ] {
                        assert_eq!(index.resolve(&module), whole(i), "{module} on {}", targets[i].0);
                    }
                    for module in [
                        format!("lora_te_{flat}"),
                        format!("lora_te1_{flat}"),
                        format!("text_encoder.{name}"),
                    ] {
                        assert_eq!(index.resolve(&module), None, "{module}");
                    }
                }
            }
        }
    }
}

#[test]
fn names_as_files_have_them() {
    let sd15 = host("model.diffusion_model.", &layouts(&SD15).1);
    let index = Index::new(&sd15);
    let target = |module: &str| only(index.resolve(module)).map(|(i, _)| sd15[i].0.as_str());
    for (module, name) in [
        (
            "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
            "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_out.0.weight",
        ),
        (
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
            "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        ),
        (
            "lora_unet_down_blocks_2_resnets_1_time_emb_proj",
            "model.diffusion_model.input_blocks.8.0.emb_layers.1.weight",
        ),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "model.diffusion_model.output_blocks.2.1.conv.weight"),
    ] {
        assert_eq!(target(module), Some(name), "{module}");
    }
    let sdxl = host("unet.", &layouts(&SDXL).0);
    let index = Index::new(&sdxl);
    let target = |module: &str| only(index.resolve(module)).map(|(i, _)| sdxl[i].0.as_str());
    for (module, name) in [
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        ),
        ("lora_unet_middle_block_0_in_layers_2", "unet.mid_block.resnets.0.conv1.weight"),
        ("lora_unet_output_blocks_5_2_conv", "unet.up_blocks.1.upsamplers.0.conv.weight"),
        ("lora_unet_input_blocks_6_0_op", "unet.down_blocks.1.downsamplers.0.conv.weight"),
    ] {
        assert_eq!(target(module), Some(name), "{module}");
    }
}

#[test]
fn sdxl_text_encoders_are_reached_and_not_confused() {
    let targets = sdxl_checkpoint();
    let index = Index::new(&targets);
    for module in clip::trained_modules(12) {
        let name = format!("conditioner.embedders.0.transformer.{module}.weight");
        let target = targets.iter().position(|(t, _)| *t == name).unwrap();
        for spelling in [
            format!("lora_te1_{}", flatten(&module)),
            format!("text_encoder.{module}"),
            format!("lora_te_{}", flatten(&module)),
        ] {
            assert_eq!(index.resolve(&spelling), whole(target), "{spelling}");
        }
        // Both encoders have this layer.
        assert_eq!(index.resolve(&module), None, "{module}");
        assert_eq!(index.resolve(&format!("lycoris_{}", flatten(&module))), None, "{module}");
        assert_eq!(index.resolve(&format!("lora_unet_{}", flatten(&module))), None, "{module}");
    }
    let pieces = [("q_proj", 0), ("k_proj", 1280), ("v_proj", 2560)];
    let mut reached = std::collections::HashSet::new();
    for module in clip::trained_modules(32) {
        let flat = format!("lora_te2_{}", flatten(&module));
        let found = only(index.resolve(&flat)).unwrap_or_else(|| panic!("{flat}"));
        assert_eq!(only(index.resolve(&format!("text_encoder_2.{module}"))), Some(found), "{module}");
        let name = &targets[found.0].0;
        assert!(name.starts_with("conditioner.embedders.1.model.transformer.resblocks."), "{flat} -> {name}");
        match pieces.iter().find(|(piece, _)| module.ends_with(piece)) {
            Some(&(_, start)) => {
                assert!(name.ends_with("attn.in_proj_weight"), "{flat} -> {name}");
                assert_eq!(found.1, Some(Slice { axis: 0, start, len: 1280 }), "{flat}");
            }
            None => assert_eq!(found.1, None, "{flat}"),
        }
        assert!(reached.insert(found), "{flat} reaches what another module reaches");
    }
    assert_eq!(reached.len(), 192);
    assert_eq!(index.resolve("lora_te1_text_model_encoder_layers_12_mlp_fc1"), None, "CLIP-L has 12 layers");

    let bias =
        only(index.resolve("text_encoder_2.text_model.encoder.layers.3.self_attn.v_proj.bias")).unwrap();
    assert_eq!(targets[bias.0].0, "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_bias");
    assert_eq!(bias.1.map(|s| s.start), Some(2560));

    let exact = "conditioner.embedders.1.model.text_projection";
    assert_eq!(only(index.resolve(exact)).map(|(i, _)| targets[i].0.as_str()), Some(exact));
    assert_eq!(index.resolve("lora_te2_text_projection"), None, "the parameter is the layer's transpose");
}

#[test]
fn diffusers_and_comfyui_encoders() {
    let fc1 = "text_model.encoder.layers.0.mlp.fc1";
    for (first, second) in [
        ("text_encoder.", "text_encoder_2."),
        ("clip_l.transformer.", "clip_g.transformer."),
        ("text_encoders.clip_l.transformer.", "clip_g.transformer."),
    ] {
        let names = [format!("{first}{fc1}"), format!("{second}{fc1}"), format!("{second}text_projection")];
        let index = index(&names.each_ref().map(String::as_str));
        for (module, target) in [
            ("lora_te1_text_model_encoder_layers_0_mlp_fc1", Some(0)),
            ("lora_te_text_model_encoder_layers_0_mlp_fc1", Some(0)),
            ("lora_te2_text_model_encoder_layers_0_mlp_fc1", Some(1)),
            ("lora_te2_transformer_resblocks_0_mlp_c_fc", Some(1)),
            ("lora_te2_text_projection", Some(2)),
            ("text_encoder.text_model.encoder.layers.0.mlp.fc1", Some(0)),
            ("text_encoder.encoder.layers.0.mlp.fc1", Some(0)),
            ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", Some(1)),
            ("conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc", Some(1)),
            ("lora_unet_text_model_encoder_layers_0_mlp_fc1", None),
            ("lora_te3_text_model_encoder_layers_0_mlp_fc1", None),
        ] {
            assert_eq!(index.resolve(module), target.and_then(whole), "{module} on {first}");
        }
    }
    // Alone and unnamed, or alone and second.
    let alone = index(&[fc1]);
    assert_eq!(alone.resolve("lora_te_text_model_encoder_layers_0_mlp_fc1"), whole(0));
    assert_eq!(alone.resolve("text_encoder.text_model.encoder.layers.0.mlp.fc1"), whole(0));
    assert_eq!(alone.resolve("lora_te2_text_model_encoder_layers_0_mlp_fc1"), None);
    let g = index(&["clip_g.transformer.text_model.encoder.layers.0.mlp.fc1"]);
    assert_eq!(g.resolve("lora_te_text_model_encoder_layers_0_mlp_fc1"), whole(0));
    assert_eq!(g.resolve("lora_te1_text_model_encoder_layers_0_mlp_fc1"), None);
    assert_eq!(g.resolve(fc1), whole(0));
}

#[test]
fn t5_is_third_or_second() {
    let t5 = "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight";
    let (second, third) = (
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    );
    let flux = index(&["clip_l.transformer.text_model.final_layer_norm", t5]);
    assert_eq!((flux.resolve(second), flux.resolve(third)), (whole(1), whole(1)));
    assert_eq!(flux.resolve("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"), whole(1));
    let sd3 = index(&["clip_g.transformer.text_model.final_layer_norm", t5]);
    assert_eq!((sd3.resolve(second), sd3.resolve(third)), (None, whole(1)));
}

#[test]
fn any_model_is_reached_by_its_own_names() {
    let index = index(&[
        "model.diffusion_model.blocks.0.attn.qkv.weight",
        "first_stage_model.decoder.conv_in.weight",
        "decoder.proj",
    ]);
    for module in [
        "lora_unet_blocks_0_attn_qkv",
        "lora_unet__blocks_0_attn_qkv",
        "lora_transformer_blocks_0_attn_qkv",
        "transformer.blocks.0.attn.qkv",
        "blocks.0.attn.qkv",
        "model_diffusion_model_blocks_0_attn_qkv",
        "base_model.model.model.diffusion_model.blocks.0.attn.qkv",
    ] {
        assert_eq!(index.resolve(module), whole(0), "{module}");
    }
    assert_eq!(index.resolve("lora_unet_decoder_conv_in"), None);
    assert_eq!(index.resolve("lora_unet_first_stage_model_decoder_conv_in"), None);
    assert_eq!(index.resolve("first_stage_model.decoder.conv_in"), whole(1));
    assert_eq!(index.resolve("lora_unet_decoder_proj"), whole(2));
}

#[test]
fn a_shared_flattened_name_needs_the_dots() {
    let index = index(&["diffusion_model.a.b_c", "diffusion_model.a.b.c", "diffusion_model.d"]);
    assert_eq!(index.resolve("lora_unet_a_b_c"), None);
    assert_eq!(index.resolve("diffusion_model_a_b_c"), None);
    assert_eq!(index.resolve("diffusion_model.a.b_c"), whole(0));
    assert_eq!(index.resolve("unet.a.b.c"), whole(1));
    assert_eq!(index.resolve("lora_unet_d"), whole(2));
}

#[test]
fn an_alias_wins() {
    let mut index = index(&["diffusion_model.a", "diffusion_model.b"]);
    let slice = Some(Slice { axis: 0, start: 8, len: 8 });
    index.add_alias("unet.a", 1, slice);
    assert_eq!(index.resolve("unet.a"), part(1, slice));
    assert_eq!(index.resolve("unet_a"), part(1, slice));
    assert_eq!(index.resolve("lora_unet_a"), whole(0));
    index.add_alias("lora_unet_a", 1, None);
    assert_eq!(index.resolve("lora_unet_a"), whole(1));
    index.add_alias("lora_unet_a", 0, slice);
    assert_eq!(index.resolve("lora_unet_a"), part(0, slice), "the later one replaces");
    index.add_alias("k.weight", 1, None);
    assert_eq!((index.resolve("k"), index.resolve("k.weight")), (whole(1), whole(1)));
    // Flattened, `x.y` and `x_y` are one; spelled out they are not.
    index.add_alias("x.y", 0, None);
    index.add_alias("x_y", 1, None);
    assert_eq!((index.resolve("x.y"), index.resolve("x_y")), (whole(0), whole(1)));
    index.add_alias("p.q_r", 0, None);
    index.add_alias("p_q.r", 1, None);
    assert_eq!(index.resolve("p_q_r"), None);
}

#[test]
fn a_name_given_twice_is_not_guessed() {
    let index = index(&[
        "diffusion_model.a",
        "diffusion_model.a.weight",
        "model.diffusion_model.c",
        "diffusion_model.c",
    ]);
    assert_eq!(index.resolve("diffusion_model.a"), None);
    assert_eq!(index.resolve("lora_unet_c"), None);
    assert_eq!(index.resolve("model.diffusion_model.c"), whole(2));
}

#[test]
fn rows_that_do_not_part_in_three_are_not_split() {
    let name = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj";
    let of = |rows| {
        Index::new(&[("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight", [rows])])
    };
    assert_eq!(of(96).resolve(name), part(0, Some(Slice { axis: 0, start: 0, len: 32 })));
    assert_eq!(of(97).resolve(name), None);
}

#[test]
fn nearest_is_the_sensible_neighbour() {
    let mut index = Index::new(&sdxl_checkpoint());
    for (module, nearest) in [
        ("lora_unet_input_blocks_4_1_proj_inn", Some("lora_unet_input_blocks_4_1_proj_in")),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_kv",
            Some("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k"),
        ),
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q",
            Some("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        ),
        (
            "lora_te1_text_model_encoder_layers_11_mlp_fc3",
            Some("lora_te1_text_model_encoder_layers_11_mlp_fc1"),
        ),
        (
            "text_encoder_2.text_model.encoder.layers.5.self_attn.w_proj",
            Some("text_encoder_2.text_model.encoder.layers.5.self_attn.k_proj"),
        ),
        ("lora_unet_double_blocks_0_img_attn_qkv", None),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", None),
        ("", None),
    ] {
        assert_eq!(index.nearest(module).as_deref(), nearest, "{module}");
    }
    index.add_alias("host.special.layer", 0, None);
    assert_eq!(index.nearest("host.special.layers").as_deref(), Some("host.special.layer"));
    assert_eq!(index.nearest("host_special_layers").as_deref(), Some("host_special_layer"));
}

#[test]
fn the_right_strength_applies() {
    for (module, target, part) in [
        ("lora_unet_x", "model.diffusion_model.x", Part::Unet),
        ("lora_te_x", "anything", Part::TextEncoder),
        ("lora_te2_x", "anything", Part::TextEncoder),
        ("text_encoder_2.x", "anything", Part::TextEncoder),
        ("base_model.model.text_encoder.x", "anything", Part::TextEncoder),
        ("lycoris_x", "cond_stage_model.transformer.x", Part::TextEncoder),
        ("lycoris_x", "conditioner.embedders.0.transformer.x", Part::TextEncoder),
        ("lycoris_x", "clip_g.transformer.x", Part::TextEncoder),
        ("x", "t5xxl.transformer.x", Part::TextEncoder),
        ("x", "qwen25_7b.transformer.model.x", Part::TextEncoder),
        ("text_model.x", "text_model.x", Part::TextEncoder),
        ("x", "diffusion_model.x", Part::Unet),
        ("x", "x", Part::Unet),
        ("transformer.x", "x", Part::Unet),
    ] {
        assert_eq!(part_of(module, target), part, "{module} on {target}");
    }
}

#[test]
fn an_encoder_of_transformers_5_answers_to_every_spelling() {
    let index = Index::new(&[
        ("encoder.layers.0.self_attn.q_proj.weight", [8]),
        ("encoder.layers.1.mlp.fc1.weight", [8]),
    ]);
    for (module, target) in [
        ("text_encoder.encoder.layers.0.self_attn.q_proj", 0),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 0),
        ("lora_te_text_model_encoder_layers_1_mlp_fc1", 1),
        ("lora_te1_text_model_encoder_layers_1_mlp_fc1", 1),
        ("encoder.layers.1.mlp.fc1", 1),
    ] {
        assert_eq!(index.resolve(module), whole(target), "{module}");
    }
    assert_eq!(index.resolve("lora_unet_encoder_layers_0_self_attn_q_proj"), None);
}

#[test]
fn a_fused_adapter_reaches_an_encoder_that_keeps_q_k_and_v_apart() {
    for root in ["text_encoder_2.text_model.", "text_encoder_2."] {
        let names = ["v_proj", "q_proj", "k_proj", "out_proj", "q_proj.bias"]
            .map(|part| format!("{root}encoder.layers.3.self_attn.{part}"));
        let index = index(&names.each_ref().map(String::as_str));
        let thirds = [1, 2, 0].into_iter().enumerate().map(|(first, target)| Piece {
            target,
            slice: None,
            rows: Some(Fraction { first, count: 1, of: 3 }),
        });
        let found = index.resolve("lora_te2_transformer_resblocks_3_attn_in_proj_weight");
        assert_eq!(found, Some(thirds.collect()), "{root}");
        // Of the biases two are missing.
        assert_eq!(index.resolve("lora_te2_transformer_resblocks_3_attn_in_proj_bias"), None);
    }
}
