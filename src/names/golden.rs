//! The families' tables against what diffusers' own converters do with ComfyUI's names (tests/golden/names/make.py): row by row.

use super::*;
use serde_json::Value;
use std::collections::HashSet;

/// One row of a weight.
type Row = (usize, usize);
type Named = (String, Vec<usize>);

/// One model in both layouts.
struct Model {
    family: &'static str,
    checkpoint: Vec<Named>,
    diffusers: Vec<Named>,
    /// The rows of the checkpoint that each of diffusers' weights is.
    rows: Vec<Vec<Row>>,
}

macro_rules! model {
    ($family:literal, $file:literal) => {
        Model::read($family, include_str!(concat!("../../tests/golden/names/", $file, ".json")))
    };
}

fn models() -> Vec<Model> {
    vec![
        model!("SD 1.x", "sd1"),
        model!("SD 2.x", "sd2"),
        model!("SDXL", "sdxl"),
        model!("SD 3", "sd3"),
        model!("SD 3", "sd35_large"),
        model!("SD 3", "sd35_medium"),
        model!("Flux.1", "flux1"),
        model!("Chroma", "chroma"),
        model!("Flux.2", "flux2"),
        model!("Flux.2", "flux2_klein"),
    ]
}

/// The lists of make_more.py, which have no rows.
fn newer_models() -> Vec<Model> {
    vec![
        model!("Qwen-Image", "qwen_image"),
        model!("Z-Image", "z_image"),
        model!("Lumina 2", "lumina2"),
        model!("Wan", "wan"),
        model!("HunyuanVideo", "hunyuan_video"),
        model!("HunyuanVideo 1.5", "hunyuan_video_15"),
        model!("HunyuanImage 2.1", "hunyuan_image"),
        model!("LTX-Video", "ltx_video"),
        model!("LTX-2", "ltx2"),
        model!("Anima", "anima"),
    ]
}

impl Model {
    fn read(family: &'static str, text: &str) -> Model {
        let json: Value = serde_json::from_str(text).unwrap();
        let numbers = |v: &Value| -> Vec<usize> {
            v.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
        };
        let named = |v: &Value| (without_weight(v[0].as_str().unwrap()).to_owned(), numbers(&v[1]));
        let list = |key: &str| json[key].as_array().unwrap().clone();
        let checkpoint: Vec<Named> = list("checkpoint").iter().map(named).collect();
        let rows = list("diffusers")
            .iter()
            .map(|line| {
                let Some(source) = line[2].as_u64().map(|n| n as usize) else { return vec![] };
                let whole = [0, checkpoint[source].1.first().copied().unwrap_or(1)];
                let runs =
                    line[3].as_array().map_or(vec![whole.to_vec()], |r| r.iter().map(numbers).collect());
                runs.iter().flat_map(|run| run[0]..run[0] + run[1]).map(|row| (source, row)).collect()
            })
            .collect();
        Model { family, checkpoint, diffusers: list("diffusers").iter().map(named).collect(), rows }
    }

    /// Where diffusers has each row of a weight of the checkpoint.
    fn rows_of_checkpoint(&self, weight: usize) -> Vec<Row> {
        let mut found = vec![None; rows(&self.checkpoint[weight])];
        for (i, sources) in self.rows.iter().enumerate() {
            for (row, _) in sources.iter().enumerate().filter(|(_, source)| source.0 == weight) {
                let place = &mut found[sources[row].1];
                assert_eq!(*place, None, "{} is covered twice", self.checkpoint[weight].0);
                *place = Some((i, row));
            }
        }
        found.into_iter().map(|row| row.unwrap_or_else(|| panic!("{}", self.checkpoint[weight].0))).collect()
    }
}

fn rows(weight: &Named) -> usize {
    weight.1.first().copied().unwrap_or(1)
}

/// Row by row where the pieces say that a module goes.
fn spread(pieces: &[Piece], module_rows: usize, targets: &[Named]) -> Vec<Row> {
    let mut found = vec![None; module_rows];
    for piece in pieces {
        let (first, count) = piece.rows.map_or((0, module_rows), |part| part.range(module_rows).unwrap());
        let all = rows(&targets[piece.target]);
        let (start, len) = piece.slice.map_or((0, all), |slice| (slice.start, slice.len));
        assert_eq!(count, len, "{piece:?} of {}", targets[piece.target].0);
        for k in 0..count {
            let place = &mut found[first + k];
            assert_eq!(*place, None, "{pieces:?}");
            *place = Some((piece.target, start + k));
        }
    }
    found.into_iter().map(|row| row.unwrap_or_else(|| panic!("{pieces:?}"))).collect()
}

/// Every way a file may spell a module.
fn spellings(name: &str) -> Vec<String> {
    let flat = flatten(name);
    vec![
        name.to_owned(),
        format!("{name}.weight"),
        format!("lora_unet_{flat}"),
        format!("lycoris_{flat}"),
        format!("lora_transformer_{flat}"),
        format!("transformer.{name}"),
        format!("unet.{name}"),
        format!("diffusion_model.{name}"),
        format!("model.diffusion_model.{name}"),
        format!("base_model.model.{name}"),
        format!("base_model.model.transformer.{name}"),
        format!("transformer.base_model.model.{name}"),
    ]
}

fn host(prefix: &str, names: &[Named]) -> Vec<Named> {
    names.iter().map(|(name, shape)| (format!("{prefix}{name}.weight"), shape.clone())).collect()
}

#[test]
fn every_spelling_reaches_the_right_rows() {
    for model in models() {
        let sides = [&model.checkpoint, &model.diffusers];
        let mut by_layout = vec![];
        for (to, side) in sides.iter().enumerate() {
            let expect = |from: usize, i: usize| match (from, to) {
                (0, 1) => model.rows_of_checkpoint(i),
                (1, 0) => model.rows[i].clone(),
                _ => (0..rows(&sides[from][i])).map(|row| (i, row)).collect(),
            };
            for prefix in [["", "model.diffusion_model."], ["", "transformer."]][to] {
                let targets = host(prefix, side);
                let index = Index::new(&targets);
                assert_eq!(index.family().map(|g| g.family), Some(model.family), "{:?}", index.family());
                for (from, names) in sides.iter().enumerate() {
                    for (i, module) in names.iter().enumerate() {
                        let expected = expect(from, i);
                        let first = index.resolve(&module.0).unwrap_or_else(|| panic!("{}", module.0));
                        assert!(
                            spread(&first, rows(module), side) == expected,
                            "{}: {}",
                            model.family,
                            module.0
                        );
                        for spelling in spellings(&module.0) {
                            let found = index.resolve(&spelling);
                            assert_eq!(
                                found.as_ref(),
                                Some(&first),
                                "{}: {spelling} on {prefix}",
                                model.family
                            );
                        }
                    }
                }
            }
            by_layout.push((0..sides[1 - to].len()).map(|i| expect(1 - to, i)).collect::<Vec<_>>());
        }
        // Together the modules of one layout cover the other exactly once.
        for (to, found) in by_layout.iter().enumerate() {
            let all: Vec<Row> = found.iter().flatten().copied().collect();
            assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
            assert_eq!(all.len(), sides[to].iter().map(rows).sum::<usize>());
        }
    }
}

#[test]
fn translation_names_the_same_rows() {
    for model in models() {
        let sides = [(&model.checkpoint, Layout::Checkpoint), (&model.diffusers, Layout::Diffusers)];
        for (from, (names, _)) in sides.iter().enumerate() {
            for (to, (targets, layout)) in sides.iter().enumerate() {
                for (i, module) in names.iter().enumerate() {
                    if module.0.contains("blocks.2.") && module.0.contains("context") {
                        // SD 3's last block in the list is not the last of a published model.
                        continue;
                    }
                    let expected = match (from, to) {
                        (0, 1) => model.rows_of_checkpoint(i),
                        (1, 0) => model.rows[i].clone(),
                        _ => (0..rows(module)).map(|row| (i, row)).collect(),
                    };
                    for spelling in spellings(&module.0) {
                        let found = translate(model.family, &spelling, *layout);
                        let found = found.unwrap_or_else(|| panic!("{}: {spelling}", model.family));
                        let pieces: Vec<_> = found
                            .iter()
                            .map(|(name, part, of)| {
                                let target = targets.iter().position(|t| t.0 == *name);
                                let target = target.unwrap_or_else(|| panic!("{spelling} became {name}"));
                                let slice = of.map(|of| {
                                    let (start, len) = of.range(rows(&targets[target])).unwrap();
                                    crate::view::Slice { axis: 0, start, len }
                                });
                                Piece { target, slice, rows: *part }
                            })
                            .collect();
                        let found = spread(&pieces, rows(module), targets);
                        assert!(found == expected, "{}: {spelling} {layout:?}", model.family);
                    }
                }
            }
        }
    }
}

/// The modules that most adapters train, of a model with all of its blocks.
fn attention(names: &[Named], depths: &[(&str, usize)]) -> Vec<Named> {
    let inner = ["attn", "attention.", "linear1", "linear2"];
    let mut found = Vec::new();
    for (name, shape) in names.iter().filter(|(name, shape)| {
        inner.iter().any(|i| name.contains(i)) && !name.contains("norm") && shape.len() > 1
    }) {
        let blocks = depths
            .iter()
            .find_map(|(root, depth)| Some((root, name.strip_prefix(root)?.strip_prefix(".0.")?, depth)));
        match blocks {
            Some((root, inner, depth)) => {
                found.extend((0..*depth).map(|n| (format!("{root}.{n}.{inner}"), shape.clone())));
            }
            None if depths.is_empty() => found.push((name.clone(), shape.clone())),
            None => {}
        }
    }
    found
}

fn family_of(modules: &[Named]) -> Option<&'static str> {
    let modules: Vec<_> = modules.iter().map(|(name, shape)| (name.as_str(), &shape[..])).collect();
    guess(&modules).map(|g| g.family)
}

/// Families whose tables make_more.py proves on values: here that every spelling arrives, and that nothing is reached twice or never.
#[test]
fn the_newer_families_cover_each_other() {
    // What only one layout has.
    let alone: HashSet<&str> = [].into();
    for model in newer_models() {
        let sides = [(&model.checkpoint, Layout::Checkpoint), (&model.diffusers, Layout::Diffusers)];
        for (to, (side, layout)) in sides.iter().enumerate() {
            let index = Index::new(&host(["diffusion_model.", "transformer."][to], side));
            assert_eq!(index.family().map(|g| g.family), Some(model.family), "{:?}", index.family());
            let mut reached = HashSet::new();
            for module in sides[1 - to].0.iter().filter(|m| !alone.contains(&m.0[..])) {
                let found = index.resolve(&module.0);
                let found = found.unwrap_or_else(|| panic!("{}: {} on {layout:?}", model.family, module.0));
                for row in spread(&found, rows(module), side) {
                    assert!(reached.insert(row), "{}: {} reaches what another does", model.family, module.0);
                }
                for spelling in spellings(&module.0) {
                    assert_eq!(
                        index.resolve(&spelling).as_ref(),
                        Some(&found),
                        "{}: {spelling}",
                        model.family
                    );
                    let names = translate(model.family, &spelling, *layout);
                    let names = names.unwrap_or_else(|| panic!("{}: {spelling}", model.family));
                    let targets: HashSet<_> = found.iter().map(|p| &side[p.target].0).collect();
                    assert_eq!(names.iter().map(|n| &n.0).collect::<HashSet<_>>(), targets, "{spelling}");
                }
            }
            let all: usize = side.iter().filter(|m| !alone.contains(&m.0[..])).map(rows).sum();
            assert_eq!(reached.len(), all, "{}: rows of {layout:?} that nothing reaches", model.family);
            for module in side.iter() {
                assert!(index.resolve(&module.0).is_some(), "{}", module.0);
            }
        }
    }
}

#[test]
fn adapters_tell_their_family() {
    let flux: &[(&str, usize)] = &[
        ("double_blocks", 19),
        ("single_blocks", 38),
        ("transformer_blocks", 19),
        ("single_transformer_blocks", 38),
    ];
    let depth_of = |family| match family {
        "Flux.1" | "Chroma" => flux,
        "SD 3" => &[("joint_blocks", 24), ("transformer_blocks", 24)],
        "Qwen-Image" => &[("transformer_blocks", 60)],
        "HunyuanVideo" | "HunyuanImage 2.1" => &[
            ("double_blocks", 20),
            ("single_blocks", 40),
            ("transformer_blocks", 20),
            ("single_transformer_blocks", 40),
        ],
        _ => &[],
    };
    for model in models().into_iter().chain(newer_models()) {
        for names in [&model.checkpoint, &model.diffusers] {
            let modules = attention(names, depth_of(model.family));
            assert!(modules.len() > 3, "{}", model.family);
            // Attention is all that Chroma shares with Flux.1.
            let family = if model.family == "Chroma" { "Flux.1" } else { model.family };
            assert_eq!(family_of(&modules), Some(family), "{:?}", modules[0]);
            assert!(related(family, model.family));
            for prefix in ["lora_unet_", "lycoris_", "lora_transformer_"] {
                let flat: Vec<_> = modules
                    .iter()
                    .map(|(name, s)| (format!("{prefix}{}", flatten(name)), s.clone()))
                    .collect();
                assert_eq!(family_of(&flat), Some(family), "{prefix}{:?}", flat[0]);
            }
        }
    }
    assert!(!related("Flux.1", "Flux.2"));
    assert!(!related("SD 1.x", "SDXL"));
}

#[test]
fn the_reason_is_the_evidence() {
    let reason = |modules: &[(&str, &[usize])]| guess(modules).map(|g| (g.family, g.reason));
    let xl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k";
    let why = format!("`{xl}` reads text of width 2048");
    assert_eq!(reason(&[(xl, &[640, 2048])]), Some(("SDXL", why)));
    let linear1 = "diffusion_model.single_blocks.3.linear1";
    let why = format!("`{linear1}` is [27648, 3072]");
    assert_eq!(reason(&[(linear1, &[27648, 3072])]), Some(("Flux.2", why)));
    // A Klein of width 3072 and Flux.1 have this one.
    assert_eq!(reason(&[("double_blocks.0.img_attn.qkv", &[9216, 3072])]), None);
    for nothing in [
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_unet_x",
        "lora_unet_mid_block_attentions_0_proj_in",
    ] {
        assert_eq!(reason(&[(nothing, &[])]), None, "{nothing}");
    }
    assert_eq!(reason(&[]), None);
}

#[test]
fn other_spellings_of_flux() {
    let model = models().into_iter().find(|m| m.family == "Flux.1").unwrap();
    let index = Index::new(&host("", &model.diffusers));
    let named = |module: &str| -> Vec<(&str, Option<Fraction>)> {
        let pieces = index.resolve(module).unwrap_or_else(|| panic!("{module}"));
        pieces.iter().map(|p| (model.diffusers[p.target].0.as_str(), p.rows)).collect()
    };
    let third = |first| Some(Fraction { first, count: 1, of: 3 });
    let qkv = vec![
        ("single_transformer_blocks.1.attn.to_q", third(0)),
        ("single_transformer_blocks.1.attn.to_k", third(1)),
        ("single_transformer_blocks.1.attn.to_v", third(2)),
    ];
    assert_eq!(named("diffusion_model.single_blocks.1.linear1_qkv"), qkv);
    assert_eq!(named("single_transformer_blocks.1.attn.to_qkv"), qkv);
    assert_eq!(
        named("double_blocks.0.processor.proj_lora2"),
        vec![("transformer_blocks.0.attn.to_add_out", None)]
    );
    let index = Index::new(&host("diffusion_model.", &model.checkpoint));
    let found = index.resolve("lora_transformer_single_transformer_blocks_1_attn_to_qkv").unwrap();
    assert_eq!(found[0].slice, Some(crate::view::Slice { axis: 0, start: 0, len: 9216 }));
}

#[test]
fn a_host_that_lacks_rows_or_has_odd_ones_is_not_split() {
    let index =
        Index::new(&[("transformer_blocks.0.attn.to_q", [8, 8]), ("transformer_blocks.0.attn.to_k", [8, 8])]);
    assert_eq!(index.resolve("double_blocks.0.img_attn.qkv"), None);
    assert_eq!(index.resolve("lora_unet_transformer_blocks_0_attn_to_q").map(|p| p[0].target), Some(0));
    let index = Index::new(&[("double_blocks.0.img_attn.qkv", [25, 8])]);
    assert_eq!(index.resolve("transformer_blocks.0.attn.to_q"), None);
}

#[test]
fn modules_of_encoders_are_translated_to_transformers() {
    for (module, name) in [
        (
            "lora_te1_text_model_encoder_layers_3_self_attn_q_proj",
            "text_model.encoder.layers.3.self_attn.q_proj",
        ),
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "text_model.encoder.layers.3.mlp.fc1"),
        (
            "text_encoder_2.text_model.encoder.layers.3.self_attn.out_proj",
            "text_model.encoder.layers.3.self_attn.out_proj",
        ),
        ("lora_te2_transformer_resblocks_3_mlp_c_fc", "text_model.encoder.layers.3.mlp.fc1"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "encoder.block.0.layer.0.SelfAttention.q"),
        (
            "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0",
            "encoder.block.0.layer.1.DenseReluDense.wi_0",
        ),
        ("lora_te_layers_0_self_attn_q_proj", "layers.0.self_attn.q_proj"),
    ] {
        for layout in [Layout::Checkpoint, Layout::Diffusers] {
            assert_eq!(
                translate("SDXL", module, layout),
                Some(vec![(name.to_owned(), None, None)]),
                "{module}"
            );
        }
    }
    let fused =
        translate("SDXL", "lora_te2_transformer_resblocks_3_attn_in_proj_weight", Layout::Diffusers).unwrap();
    let third = Some(Fraction { first: 1, count: 1, of: 3 });
    assert_eq!(fused[1], ("text_model.encoder.layers.3.self_attn.k_proj".to_owned(), third, None));
    assert_eq!(translate("Flux.1", "lora_unet_nothing_known", Layout::Diffusers), None);
    assert_eq!(translate("Mystery", "lora_unet_img_in", Layout::Diffusers), None);
    // SD3's last block: certain for the large model, not for what may be either.
    let last = |n: usize| {
        translate("SD 3", &format!("transformer_blocks.{n}.norm1_context.linear"), Layout::Checkpoint)
    };
    assert_eq!(last(37).map(|names| names.len()), Some(2));
    assert_eq!(last(22).map(|names| names.len()), Some(1));
    assert_eq!(last(23), None);
}
