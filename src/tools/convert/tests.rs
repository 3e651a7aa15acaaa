//! There and back through every spelling, and what the files do to a model's weights: the same.

mod families;

use super::*;
use crate::adapter::safetensors::{to_vec, File};
use crate::dtype::Dtype;
use crate::merge::cpu;
use crate::merge::ops::Term;
use crate::merge::plan::{Binding, Rules};
use crate::names::Index;
use crate::view::{Device, Tensor, View};
use std::sync::Arc;

/// A file's tensors: key, shape, values.
type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;
type Weights = Vec<(String, Vec<usize>)>;

/// A small generator (xorshift): values in (-1, 1) with few digits, so that sums of a handful of products are exact in f32.
struct Random(u64);

impl Random {
    fn value(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 32) % 63) as f32 / 32.0 - 31.0 / 32.0
    }

    fn tensor(&mut self, key: impl Into<String>, shape: &[usize]) -> (String, Vec<usize>, Vec<f32>) {
        let values = (0..shape.iter().product::<usize>()).map(|_| self.value()).collect();
        (key.into(), shape.to_vec(), values)
    }
}

fn convert(adapter: &Adapter, path: &Path, options: &Options<'_>) -> Result<Value> {
    super::convert(adapter, path, options, &mut Progress::none())
}

fn bytes(tensors: &Tensors, metadata: &[(&str, &str)]) -> Vec<u8> {
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(key, shape, v)| {
            (key.clone(), Dtype::F32, shape.clone(), v.iter().flat_map(|v| v.to_le_bytes()).collect())
        })
        .collect();
    let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    to_vec(&tensors, &metadata).unwrap()
}

fn adapter(tensors: &Tensors) -> Arc<Adapter> {
    Adapter::from_bytes(bytes(tensors, &[])).unwrap()
}

fn options(to: Spelling, family: Option<&str>) -> Options<'_> {
    Options { to, family, component: None, skip: false }
}

/// Converts into a folder of its own and reads the result.
fn converted(from: &Adapter, options: &Options<'_>) -> (tempfile::TempDir, Arc<Adapter>, Value) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.safetensors");
    let report = convert(from, &path, options).unwrap_or_else(|e| panic!("{options:?}: {e}"));
    let read = Adapter::open(&path).unwrap();
    assert!(read.keys().iter().all(|k| k.status == KeyStatus::Readable), "{:?}", read.keys());
    (folder, read, report)
}

/// Every tensor by its key in kohya's words: dtype, shape, bytes.
fn content(adapter: &Adapter) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let modules = adapter.modules().iter();
    let all = modules.flat_map(|m| m.algorithm.tensors().into_iter().map(move |(slot, t)| (m, slot, t)));
    all.map(|(m, slot, t)| {
        (format!("{}.{slot}", m.name), (t.dtype(), t.shape().to_vec(), t.bytes().unwrap().to_vec()))
    })
    .collect()
}

/// The keys as they stand in the file.
fn keys_of(path: &Path) -> Vec<String> {
    File::open(path).unwrap().entries().iter().map(|e| e.name.clone()).collect()
}

/// What the adapter makes of a host's weights, all of which start with the same values.
fn applied(adapter: &Adapter, host: &Weights) -> Vec<Vec<f32>> {
    let shapes: Vec<(&str, &[usize])> = host.iter().map(|(n, s)| (n.as_str(), &s[..])).collect();
    let binding =
        Binding::new(adapter, &Index::new(&shapes), &shapes, Rules { may_grow: false, other_families: true })
            .unwrap();
    let reached: BTreeSet<usize> = binding.bound.iter().map(|b| b.module).collect();
    for (i, module) in adapter.modules().iter().enumerate() {
        assert!(reached.contains(&i), "{} {:?} found no weight", module.name, module.algorithm.shape());
    }
    let mut random = Random(99);
    let mut result = Vec::new();
    for (target, (name, shape)) in host.iter().enumerate() {
        let base = Tensor::of_f32(random.tensor("", shape).2, shape);
        let terms: Vec<Term<'_>> =
            binding.bound.iter().filter(|b| b.target == target).flat_map(|b| b.terms(1.0)).collect();
        let mut out = vec![0f32; base.count()];
        // SAFETY: the view shows `out`, which is not touched while it lives.
        let view = unsafe { View::from_raw(out.as_mut_ptr().cast(), Device::Cpu, Dtype::F32, shape, None) };
        cpu::merge(name, &base, &view.unwrap(), &Default::default(), &terms).unwrap();
        result.push(out);
    }
    result
}

fn close(a: &[Vec<f32>], b: &[Vec<f32>], what: &str) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        let size = a.iter().fold(1f32, |m, v| m.max(v.abs()));
        // One order of summation against another in fp32, over at most a few dozen products.
        let worst = a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst <= 1e-6 * size, "{what}: {worst} of {size}");
    }
}

/// A LoRA over these layers, the alphas in turn.
fn loras(random: &mut Random, weights: &Weights, prefix: &str, alphas: &[f32]) -> Tensors {
    let mut tensors = Tensors::new();
    for (i, (name, shape)) in weights.iter().enumerate() {
        let ones = vec![1; shape.len() - 2];
        tensors.push(
            random.tensor(format!("{prefix}{name}.lora_up.weight"), &[&[shape[0], 2], &ones[..]].concat()),
        );
        tensors
            .push(random.tensor(format!("{prefix}{name}.lora_down.weight"), &[&[2], &shape[1..]].concat()));
        tensors.push((format!("{prefix}{name}.alpha"), vec![], vec![alphas[i % alphas.len()]]));
    }
    tensors
}

type Shaped<'a> = (&'a str, &'a [usize]);

/// The tensors of one module per kind, with kohya's words.
fn kinds(random: &mut Random) -> Vec<(&'static str, Tensors)> {
    let mut make = |shapes: &[(&str, &[usize])], alpha: Option<f32>| -> Tensors {
        let mut tensors: Tensors = shapes.iter().map(|(slot, shape)| random.tensor(*slot, shape)).collect();
        tensors.extend(alpha.map(|a| ("alpha".to_owned(), vec![], vec![a])));
        tensors
    };
    let (up, down): (Shaped<'_>, Shaped<'_>) = (("lora_up.weight", &[12, 2]), ("lora_down.weight", &[2, 8]));
    vec![
        ("LoRA", make(&[up, down], Some(3.0))),
        (
            "LoCon",
            make(&[("lora_up.weight", &[12, 2, 1, 1]), ("lora_down.weight", &[2, 8, 3, 3])], Some(1.0)),
        ),
        ("DoRA", make(&[up, down, ("dora_scale", &[12, 1])], Some(1.0))),
        (
            "DoRA (LoCon)",
            make(
                &[
                    ("lora_up.weight", &[12, 2, 1, 1]),
                    ("lora_down.weight", &[2, 8, 3, 3]),
                    ("dora_scale", &[12, 1, 1, 1]),
                ],
                Some(1.0),
            ),
        ),
        (
            "LoHa",
            make(
                &[
                    ("hada_w1_a", &[12, 2]),
                    ("hada_w1_b", &[2, 8]),
                    ("hada_w2_a", &[12, 2]),
                    ("hada_w2_b", &[2, 8]),
                ],
                Some(1.0),
            ),
        ),
        (
            "LoHa",
            make(
                &[
                    ("hada_w1_a", &[2, 12]),
                    ("hada_w1_b", &[2, 8]),
                    ("hada_t1", &[2, 2, 3, 3]),
                    ("hada_w2_a", &[2, 12]),
                    ("hada_w2_b", &[2, 8]),
                    ("hada_t2", &[2, 2, 3, 3]),
                ],
                Some(1.0),
            ),
        ),
        ("LoKr", make(&[("lokr_w1", &[6, 2]), ("lokr_w2", &[2, 4])], Some(1.0))),
        ("LoKr", make(&[("lokr_w1", &[6, 2]), ("lokr_w2_a", &[2, 1]), ("lokr_w2_b", &[1, 4])], Some(2.0))),
        (
            "LoKr",
            make(
                &[
                    ("lokr_w1_a", &[6, 1]),
                    ("lokr_w1_b", &[1, 2]),
                    ("lokr_w2_a", &[2, 1]),
                    ("lokr_w2_b", &[1, 4]),
                ],
                Some(2.0),
            ),
        ),
        // What PEFT has no word for stands behind.
        (
            "LoCon",
            make(
                &[
                    ("lora_up.weight", &[12, 2, 1, 1]),
                    ("lora_down.weight", &[2, 8, 1, 1]),
                    ("lora_mid.weight", &[2, 2, 3, 3]),
                ],
                Some(1.0),
            ),
        ),
        ("DoRA", make(&[up, down, ("dora_scale", &[1, 8])], Some(1.0))),
        ("full", make(&[("diff", &[12, 8])], None)),
        ("LoRA", make(&[up, down, ("diff_b", &[12])], Some(1.0))),
        ("norm", make(&[("w_norm", &[12]), ("b_norm", &[12])], None)),
        (
            "GLoRA",
            make(
                &[
                    ("a1.weight", &[8, 2]),
                    ("a2.weight", &[2, 8]),
                    ("b1.weight", &[12, 2]),
                    ("b2.weight", &[2, 8]),
                ],
                Some(1.0),
            ),
        ),
        ("OFT", make(&[("oft_blocks", &[3, 4, 4])], Some(0.5))),
        (
            "T-LoRA",
            make(
                &[("p_layer.weight", &[12, 2]), ("q_layer.weight", &[2, 8]), ("lambda_layer", &[1, 2])],
                Some(2.0),
            ),
        ),
    ]
}

fn named(module: &str, tensors: &Tensors) -> Tensors {
    tensors.iter().map(|(slot, s, v)| (format!("{module}.{slot}"), s.clone(), v.clone())).collect()
}

#[test]
fn every_kind_keeps_its_bits() {
    const LAST_OF_PEFT: usize = 9;
    let module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q";
    for (i, (kind, tensors)) in kinds(&mut Random(3)).into_iter().enumerate() {
        let source = adapter(&named(module, &tensors));
        assert_eq!(source.modules()[0].algorithm.name(), kind);
        let family = Some("SDXL");
        for by in [Spelling::Comfyui, Spelling::Diffusers, Spelling::Peft] {
            let folder = tempfile::tempdir().unwrap();
            let fails = convert(&source, &folder.path().join("x"), &options(by, family)).is_err();
            let lycoris = matches!(kind, "LoHa" | "LoKr");
            let expected =
                by != Spelling::Comfyui && (i >= LAST_OF_PEFT || by == Spelling::Diffusers && lycoris);
            assert_eq!(fails, expected, "{kind} {i} to {by:?}");
            if fails {
                assert_eq!(
                    std::fs::read_dir(folder.path()).unwrap().count(),
                    0,
                    "{kind}: something was written"
                );
                continue;
            }
            let (_a, there, _) = converted(&source, &options(by, family));
            let (_b, back, _) = converted(&there, &options(Spelling::Kohya, family));
            assert_eq!(content(&back), content(&source), "{kind} {i} by {by:?}");
        }
    }
}

fn result_text(source: &Adapter) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    convert(source, &path, &options(Spelling::Peft, Some("Flux.1"))).unwrap_err().to_string()
}

#[test]
fn every_kind_is_cut_by_rows() {
    // Three projections of one weight: the host's layout has them apart, PEFT's file too.
    let host: Weights = ["q", "k", "v"]
        .map(|p| (format!("transformer.transformer_blocks.0.attn.to_{p}.weight"), vec![4, 8]))
        .into();
    for (kind, tensors) in kinds(&mut Random(5)).into_iter().filter(|(kind, t)| {
        matches!(*kind, "LoRA" | "DoRA" | "LoHa" | "LoKr")
            && t.iter().all(|(slot, s, _)| s.len() < 3 && slot != "diff_b")
    }) {
        let source = adapter(&named("lora_unet_double_blocks_0_img_attn_qkv", &tensors));
        if tensors.iter().any(|(slot, ..)| slot == "lokr_w1_a") {
            // At rank 1 PEFT keeps a half of 2 x 2 whole.
            assert!(result_text(&source).contains("other halves whole"));
            continue;
        }
        let input = tensors.iter().any(|(slot, s, _)| slot == "dora_scale" && s[0] == 1);
        if input {
            assert!(result_text(&source).contains("magnitudes of outputs"));
            continue;
        }
        let (_a, there, report) = converted(&source, &options(Spelling::Peft, Some("Flux.1")));
        assert_eq!(report["summary"]["written"], 3, "{kind}");
        close(&applied(&there, &host), &applied(&source, &host), kind);
        let (_b, back, _) = converted(&there, &options(Spelling::Kohya, Some("Flux.1")));
        assert_eq!(content(&back), content(&source), "{kind}");
    }
}

#[test]
fn parts_that_are_missing_change_nothing() {
    let host: Weights = vec![
        ("diffusion_model.double_blocks.0.img_attn.qkv.weight".into(), vec![12, 8]),
        ("diffusion_model.double_blocks.0.img_attn.qkv.bias".into(), vec![12]),
    ];
    let place = |p: &str| format!("transformer.transformer_blocks.0.attn.to_{p}");
    let mut random = Random(13);
    for (slots, fits) in [
        (vec![("lora_up.weight", vec![4, 2]), ("lora_down.weight", vec![2, 8])], true),
        (vec![("diff", vec![4, 8])], true),
        (vec![("diff_b", vec![4])], true),
        (
            vec![
                ("lora_up.weight", vec![4, 2]),
                ("lora_down.weight", vec![2, 8]),
                ("dora_scale", vec![4, 1]),
            ],
            false,
        ),
        (
            vec![
                ("hada_w1_a", vec![4, 2]),
                ("hada_w1_b", vec![2, 8]),
                ("hada_w2_a", vec![4, 2]),
                ("hada_w2_b", vec![2, 8]),
            ],
            false,
        ),
    ] {
        let mut tensors = Tensors::new();
        for part in ["v", "q"] {
            tensors.extend(
                slots.iter().map(|(slot, shape)| random.tensor(format!("{}.{slot}", place(part)), shape)),
            );
        }
        let source = adapter(&tensors);
        let path = tempfile::tempdir().unwrap();
        match convert(&source, &path.path().join("x"), &options(Spelling::Kohya, Some("Flux.1"))) {
            Err(error) if !fits => assert!(
                error.to_string().contains(&place("v")) && error.to_string().contains(&place("q")),
                "{error}"
            ),
            result => {
                assert!(fits && result.is_ok(), "{slots:?}: {result:?}");
                let (_a, there, _) = converted(&source, &options(Spelling::Kohya, Some("Flux.1")));
                close(&applied(&there, &host), &applied(&source, &host), slots[0].0);
            }
        }
    }
}

#[test]
fn alpha_stands_in_every_kohya_file() {
    let mut random = Random(1);
    let tensors = kinds(&mut random);
    for (kind, tensors) in &tensors[..9] {
        let mut tensors = named(SDXL_Q, tensors);
        tensors.retain(|(key, ..)| !key.ends_with(".alpha"));
        let (folder, there, _) = converted(&adapter(&tensors), &options(Spelling::Kohya, Some("SDXL")));
        let keys = keys_of(&folder.path().join("out.safetensors"));
        assert!(keys.contains(&format!("{SDXL_Q}.alpha")), "{kind}: {keys:?}");
        let rank = there.modules()[0].algorithm.rank();
        assert_eq!(there.modules()[0].algorithm.alpha(), rank.map(|r| r as f32), "{kind}");
    }
}

#[test]
fn ranks_add_and_scales_must_agree() {
    let place = |p: &str| format!("transformer.transformer_blocks.0.attn.to_{p}");
    let mut random = Random(17);
    let mut make = |ranks: [usize; 3], alphas: [f32; 3]| {
        let mut tensors = Tensors::new();
        for ((p, rank), alpha) in ["q", "k", "v"].iter().zip(ranks).zip(alphas) {
            tensors.push(random.tensor(format!("{}.lora_up.weight", place(p)), &[4, rank]));
            tensors.push(random.tensor(format!("{}.lora_down.weight", place(p)), &[rank, 8]));
            tensors.push((format!("{}.alpha", place(p)), vec![], vec![alpha]));
        }
        adapter(&tensors)
    };
    let host: Weights = vec![("diffusion_model.double_blocks.0.img_attn.qkv.weight".into(), vec![12, 8])];
    let source = make([1, 2, 3], [0.5, 1.0, 1.5]);
    let (_a, there, _) = converted(&source, &options(Spelling::Kohya, Some("Flux.1")));
    let module = &there.modules()[0];
    assert_eq!((module.algorithm.rank(), module.algorithm.alpha()), (Some(6), Some(3.0)));
    close(&applied(&there, &host), &applied(&source, &host), "ranks");
    let source = make([2, 2, 2], [1.0, 2.0, 1.0]);
    let folder = tempfile::tempdir().unwrap();
    let error =
        convert(&source, &folder.path().join("x"), &options(Spelling::Kohya, Some("Flux.1"))).unwrap_err();
    let text = error.to_string();
    assert!(["to_q", "to_k", "to_v", "different scales"].iter().all(|w| text.contains(w)), "{text}");
}

const SDXL_Q: &str = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q";

/// A pipeline's adapter: U-Net and both encoders.
fn pipeline(random: &mut Random) -> Tensors {
    let mut tensors = Tensors::new();
    for module in [
        SDXL_Q,
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    ] {
        let width = if module.ends_with("to_k") { 2048 } else { 8 };
        tensors.push(random.tensor(format!("{module}.lora_up.weight"), &[8, 2]));
        tensors.push(random.tensor(format!("{module}.lora_down.weight"), &[2, width]));
        tensors.push((format!("{module}.alpha"), vec![], vec![1.0]));
    }
    tensors
}

#[test]
fn every_component_has_its_name() {
    let source = Adapter::from_bytes(bytes(
        &pipeline(&mut Random(1)),
        &[("ss_network_dim", "2"), ("modelspec.title", "t")],
    ))
    .unwrap();
    let (folder, diffusers, report) = converted(&source, &options(Spelling::Diffusers, None));
    assert_eq!(report["family"]["name"], "SDXL");
    let metadata = diffusers.metadata();
    assert_eq!(metadata["ss_network_dim"], "2");
    assert_eq!(metadata["modelspec.title"], "t");
    let config: Value = serde_json::from_str(&metadata["lora_adapter_metadata"]).unwrap();
    for head in ["unet", "text_encoder", "text_encoder_2"] {
        assert_eq!(
            (&config[format!("{head}.r")], &config[format!("{head}.lora_alpha")]),
            (&json!(2), &json!(1)),
            "{head}"
        );
    }
    let keys = keys_of(&folder.path().join("out.safetensors"));
    let unet = "unet.down_blocks.1.attentions.0.transformer_blocks.0";
    for key in [
        format!("{unet}.attn1.to_q.lora_A.weight"),
        format!("{unet}.attn2.to_k.lora_B.weight"),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight".into(),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_B.weight".into(),
    ] {
        assert!(keys.contains(&key), "{key} in {keys:?}");
    }
    assert_eq!(keys.len(), 8, "{keys:?}");
    let (folder, comfyui, _) = converted(&diffusers, &options(Spelling::Comfyui, None));
    let keys = keys_of(&folder.path().join("out.safetensors"));
    for key in [
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_up.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_down.weight",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.alpha",
    ] {
        assert!(keys.iter().any(|k| k == key), "{key} in {keys:?}");
    }
    let (_c, back, _) = converted(&comfyui, &options(Spelling::Kohya, None));
    assert_eq!(content(&back), content(&source));
}

#[test]
fn peft_takes_one_component_and_keeps_a_strangers_configuration() {
    let source = adapter(&pipeline(&mut Random(1)));
    let folder = tempfile::tempdir().unwrap();
    let peft = options(Spelling::Peft, None);
    let error = convert(&source, folder.path(), &peft).unwrap_err().to_string();
    assert!(error.contains("text_encoder, text_encoder_2, unet"), "{error}");
    let one = |component| Options { component: Some(component), ..peft.clone() };
    let report = convert(&source, folder.path(), &one("text_encoder_2")).unwrap();
    assert_eq!(report["summary"]["written"], 1);
    let keys = keys_of(&folder.path().join("adapter_model.safetensors"));
    assert_eq!(keys[0], "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight");
    // The same file again may be replaced; another one beside it would take its alphas away.
    convert(&source, folder.path(), &one("unet")).unwrap();
    let error = convert(&source, &folder.path().join("other.safetensors"), &one("unet")).unwrap_err();
    assert!(error.to_string().contains("another adapter's configuration"), "{error}");
    assert!(!folder.path().join("other.safetensors").exists());
    assert!(convert(&source, folder.path(), &one("text_encoder_3")).is_err());
}

#[test]
fn everything_that_cannot_be_said_is_listed_or_left_out() {
    let mut random = Random(1);
    let mut tensors = pipeline(&mut random);
    let block = "lora_unet_input_blocks_4_1_transformer_blocks_0";
    tensors.push(random.tensor(format!("{block}_ff_net_2.diff"), &[8, 8]));
    tensors.push(random.tensor(format!("{block}_norm1.w_norm"), &[8]));
    tensors.push(random.tensor("lora_unet_no_such_layer.lora_up.weight", &[8, 2]));
    tensors.push(random.tensor("lora_unet_no_such_layer.lora_down.weight", &[2, 8]));
    tensors.push(random.tensor("lora_unet_half.lora_up.weight", &[8, 2]));
    let source = adapter(&tensors);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    let error = convert(&source, &path, &options(Spelling::Diffusers, None)).unwrap_err().to_string();
    for name in ["_ff_net_2", "_norm1", "no_such_layer", "lora_unet_half.lora_up.weight", "4 modules"] {
        assert!(error.contains(name), "{name} in {error}");
    }
    assert!(!path.exists());
    let skip = Options { skip: true, ..options(Spelling::Diffusers, None) };
    let report = convert(&source, &path, &skip).unwrap();
    assert_eq!(report["left_out"].as_array().unwrap().len(), 4);
    assert_eq!(report["summary"]["written"], 4);
    assert_eq!(keys_of(&path).len(), 8);
}

#[test]
fn one_configuration_speaks_for_all_of_its_modules() {
    let mut random = Random(1);
    let loha = named("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_v", &kinds(&mut random)[4].1);
    let mut tensors = pipeline(&mut random);
    tensors.retain(|(key, ..)| !key.contains("_te"));
    tensors.extend(loha);
    let source = adapter(&tensors);
    let folder = tempfile::tempdir().unwrap();
    let error = convert(&source, folder.path(), &options(Spelling::Peft, None)).unwrap_err().to_string();
    assert!(error.contains("attn1_to_v") && error.contains("one configuration holds one method"), "{error}");
    let skip = Options { skip: true, ..options(Spelling::Peft, None) };
    assert_eq!(convert(&source, folder.path(), &skip).unwrap()["summary"]["written"], 2);
}

#[test]
fn what_is_left_out_takes_its_neighbours_along() {
    let mut random = Random(1);
    let mut tensors = pipeline(&mut random);
    // One module of the first encoder has a magnitude, the others of it none; the second encoder has the same path.
    for te in ["te1", "te1", "te2"].iter().zip(["v_proj", "k_proj", "q_proj"]) {
        let module = format!("lora_{}_text_model_encoder_layers_0_self_attn_{}", te.0, te.1);
        tensors.push(random.tensor(format!("{module}.lora_up.weight"), &[8, 2]));
        tensors.push(random.tensor(format!("{module}.lora_down.weight"), &[2, 8]));
    }
    tensors.push(random.tensor("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.dora_scale", &[8, 1]));
    let source = adapter(&tensors);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    let error = convert(&source, &path, &options(Spelling::Diffusers, None)).unwrap_err().to_string();
    assert!(
        error.contains("`lora_te1_text_model_encoder_layers_0_self_attn_q_proj`: has a magnitude"),
        "{error}"
    );
    let skip = Options { skip: true, ..options(Spelling::Diffusers, None) };
    let report = convert(&source, &path, &skip).unwrap();
    assert_eq!((&report["summary"]["left_out"], &report["summary"]["written"]), (&json!(1), &json!(6)));
    assert!(keys_of(&path).iter().any(|k| k.starts_with("text_encoder_2.") && k.contains("q_proj")));

    // q, k and v of unequal scales cannot be one; nothing of them stands alone.
    let place = |p: &str| format!("transformer.transformer_blocks.0.attn.{p}");
    let mut tensors = Tensors::new();
    for (p, alpha) in [("to_q", 1.0), ("to_k", 2.0), ("to_out.0", 1.0)] {
        tensors.push(random.tensor(format!("{}.lora_up.weight", place(p)), &[4, 2]));
        tensors.push(random.tensor(format!("{}.lora_down.weight", place(p)), &[2, 8]));
        tensors.push((format!("{}.alpha", place(p)), vec![], vec![alpha]));
    }
    let skip = Options { skip: true, ..options(Spelling::Kohya, Some("Flux.1")) };
    let report = convert(&adapter(&tensors), &path, &skip).unwrap();
    assert_eq!((&report["summary"]["left_out"], &report["summary"]["written"]), (&json!(2), &json!(1)));
}

#[test]
fn an_unknown_family_is_respelled_as_far_as_its_names_go() {
    let mut random = Random(1);
    let mut make = |module: &str| {
        adapter(&vec![
            random.tensor(format!("{module}.lora_up.weight"), &[8, 2]),
            random.tensor(format!("{module}.lora_down.weight"), &[2, 8]),
        ])
    };
    let dotted = make("diffusion_model.some_layers.0.my_proj");
    let (_a, kohya, report) = converted(&dotted, &options(Spelling::Kohya, None));
    assert_eq!(report["family"], Value::Null);
    assert_eq!(kohya.modules()[0].name, "lora_unet_some_layers_0_my_proj");
    assert_eq!(kohya.modules()[0].algorithm.alpha(), Some(2.0), "alpha is written");
    let folder = tempfile::tempdir().unwrap();
    for (source, to) in
        [(&kohya, Spelling::Comfyui), (&kohya, Spelling::Peft), (&dotted, Spelling::Diffusers)]
    {
        let error = convert(source, &folder.path().join("x"), &options(to, None)).unwrap_err();
        assert!(error.hint().contains("family"), "{error}");
    }
    // Of many modules some are named.
    let weights: Weights = (0..9).map(|i| (format!("some_layers_{i}_my_proj"), vec![8, 8])).collect();
    let many = adapter(&loras(&mut Random(2), &weights, "lora_unet_", &[2.0; 9]));
    let error =
        convert(&many, &folder.path().join("x"), &options(Spelling::Peft, None)).unwrap_err().to_string();
    assert!(error.contains("9 modules") && error.contains("_3_my_proj` and 5 more: "), "{error}");
    assert!(!error.contains("_4_my_proj"), "{error}");
    let peft = make("base_model.model.some_layers.0.my_proj");
    let (_b, diffusers, _) = converted(&peft, &options(Spelling::Diffusers, None));
    assert_eq!(diffusers.modules()[0].name, "transformer.some_layers.0.my_proj");
    assert!(names::family("flux.1").is_ok() && names::family("Flux 1").is_err());
}

#[test]
fn alphas_are_told_by_whole_names() {
    let family = Some("Flux.1");
    let mut random = Random(1);
    // `proj_out` is the end of another module's name.
    let weights: Weights = vec![
        ("proj_out".into(), vec![8, 8]),
        ("single_transformer_blocks.0.proj_out".into(), vec![8, 8]),
        ("single_transformer_blocks.1.proj_out".into(), vec![8, 8]),
        ("single_transformer_blocks.2.proj_out".into(), vec![8, 8]),
    ];
    let source = adapter(&loras(&mut random, &weights, "transformer.", &[3.0, 1.0, 1.0, 0.25]));
    for to in [Spelling::Peft, Spelling::Diffusers] {
        let (_a, there, _) = converted(&source, &options(to, family));
        let mut alphas: Vec<_> =
            there.modules().iter().map(|m| (m.name.clone(), m.algorithm.alpha().unwrap())).collect();
        alphas.sort_by(|a, b| a.0.len().cmp(&b.0.len()).then_with(|| a.0.cmp(&b.0)));
        assert_eq!(alphas.iter().map(|a| a.1).collect::<Vec<_>>(), [3.0, 1.0, 1.0, 0.25], "{alphas:?}");
    }
}

#[test]
fn ia3_moves_where_one_plus_w_is_exact() {
    let module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k";
    let make = |w: Vec<f32>, on_input: f32| {
        let n = w.len();
        adapter(&vec![
            (format!("{module}.weight"), vec![n], w),
            (format!("{module}.on_input"), vec![], vec![on_input]),
        ])
    };
    let family = Some("SDXL");
    for flag in [0.0, 1.0] {
        let source = make(vec![0.5, -0.25, 3.0], flag);
        let (_a, peft, _) = converted(&source, &options(Spelling::Peft, family));
        assert_eq!(peft.modules()[0].algorithm.tensors()[0].1.to_f32("").unwrap(), [1.5, 0.75, 4.0]);
        let (_b, back, _) = converted(&peft, &options(Spelling::Kohya, family));
        assert_eq!(content(&back), content(&source));
    }
    let folder = tempfile::tempdir().unwrap();
    let refused =
        |source: &Adapter, to| convert(source, folder.path(), &options(to, family)).unwrap_err().to_string();
    assert!(refused(&make(vec![1e-9], 0.0), Spelling::Peft).contains("exact"));
    assert!(refused(&make(vec![0.5], 0.0), Spelling::Comfyui).contains("(IA)^3"));
}
