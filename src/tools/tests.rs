//! The golden rules of the tools, on small files: what each writes must do to a weight what it says.

use super::combine::{self, combine};
use super::extract::{self, extract};
use super::resize::{self, resize};
use crate::adapter::safetensors::{to_vec, File};
use crate::adapter::Adapter;
use crate::dtype::{Dtype, Float};
use crate::error::Error;
use crate::linalg::{splitmix, Matrix};
use crate::merge::ops::Term;
use crate::progress::{Cancel, Progress};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A safetensors file in the making.
struct Maker {
    folder: tempfile::TempDir,
    state: u64,
}

type Rows = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

impl Maker {
    fn new() -> Self {
        Maker { folder: tempfile::tempdir().unwrap(), state: 5 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn random(&mut self, key: &str, shape: &[usize], float: Float) -> (String, Dtype, Vec<usize>, Vec<u8>) {
        let count = shape.iter().product::<usize>();
        let mut next = || (splitmix(&mut self.state) >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        let values: Vec<f32> = (0..count).map(|_| next() * 0.3).collect();
        tensor(key, shape, float, &values)
    }

    fn write(&self, name: &str, rows: &Rows) -> PathBuf {
        let path = self.path(name);
        let metadata =
            BTreeMap::from([("ss_network_dim".into(), "8".into()), ("sshs_model_hash".into(), "x".into())]);
        std::fs::write(&path, to_vec(rows, &metadata).unwrap()).unwrap();
        path
    }

    /// A LoRA of every kind of layer.
    fn lora(&mut self, name: &str, rank: usize, alpha: f32, float: Float) -> PathBuf {
        let mut rows = Rows::new();
        for (module, shapes) in [
            ("lora_unet_linear", [vec![40, rank], vec![rank, 30]]),
            ("lora_unet_conv", [vec![24, rank, 1, 1], vec![rank, 12, 3, 3]]),
            ("lora_unet_point", [vec![24, rank, 1, 1], vec![rank, 20, 1, 1]]),
        ] {
            rows.push(self.random(&format!("{module}.lora_down.weight"), &shapes[1], float));
            rows.push(self.random(&format!("{module}.lora_up.weight"), &shapes[0], float));
            rows.push(tensor(&format!("{module}.alpha"), &[], float, &[alpha]));
        }
        self.write(name, &rows)
    }

    fn loha(&mut self, name: &str, module: &str, [o, r, i]: [usize; 3]) -> PathBuf {
        let key = |slot: &str| format!("{module}.{slot}");
        let rows = vec![
            self.random(&key("hada_w1_a"), &[o, r], Float::F32),
            self.random(&key("hada_w1_b"), &[r, i], Float::F32),
            self.random(&key("hada_w2_a"), &[o, r], Float::F32),
            self.random(&key("hada_w2_b"), &[r, i], Float::F32),
            tensor(&key("alpha"), &[], Float::F32, &[1.5]),
        ];
        self.write(name, &rows)
    }

    /// kron of [4, 2] and a product [10, 2] @ [2, 15].
    fn lokr(&mut self, name: &str, module: &str) -> PathBuf {
        let key = |slot: &str| format!("{module}.{slot}");
        let rows = vec![
            self.random(&key("lokr_w1"), &[4, 2], Float::F32),
            self.random(&key("lokr_w2_a"), &[10, 2], Float::F32),
            self.random(&key("lokr_w2_b"), &[2, 15], Float::F32),
            tensor(&key("alpha"), &[], Float::F32, &[3.0]),
        ];
        self.write(name, &rows)
    }
}

fn tensor(key: &str, shape: &[usize], float: Float, values: &[f32]) -> (String, Dtype, Vec<usize>, Vec<u8>) {
    let mut bytes = vec![0u8; values.len() * float.size()];
    float.write(values, &mut bytes);
    (key.to_owned(), float.dtype(), shape.to_vec(), bytes)
}

/// What every module of a file adds to a weight of zeros, and to its bias.
fn deltas(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let adapter = Adapter::open(path).unwrap();
    let mut all = BTreeMap::new();
    for module in adapter.modules() {
        let shape = module.algorithm.shape().unwrap_or_else(|| vec![1]);
        let mut add = |name: String, shape: &[usize], ops: Vec<crate::merge::ops::Op>| {
            let terms: Vec<Term<'_>> = ops.iter().map(|op| Term { op, strength: 1.0, slice: None }).collect();
            let sum = super::delta::sum(&name, shape, &terms, None).unwrap();
            all.insert(name, sum.values.iter().map(|&v| f64::from(v)).collect());
        };
        if module.algorithm.changes().weight {
            add(module.name.clone(), &shape, module.algorithm.lower(&module.name, &shape).unwrap());
        }
        if module.algorithm.changes().bias {
            let bias = [shape[0]];
            add(
                format!("{}.bias", module.name),
                &bias,
                module.algorithm.lower_bias(&module.name, &bias).unwrap(),
            );
        }
    }
    all
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

/// |a - b| / |a|
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    norm(a.iter().zip(b).map(|(a, b)| a - b)) / norm(a.iter().copied())
}

fn resized(source: &Path, output: &Path, options: &str) -> Value {
    resize(source, output, &resize::Options::parse(options).unwrap(), &mut Progress::none()).unwrap()
}

fn combined(inputs: &[(&Path, f64)], output: &Path, options: &str) -> Result<Value, Error> {
    combine(inputs, output, &combine::Options::parse(options).unwrap(), &mut Progress::none())
}

fn module<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["modules"].as_array().unwrap().iter().find(|m| m["module"] == name).unwrap()
}

#[test]
fn a_resized_file_is_as_far_off_as_it_says_and_smaller() {
    let mut maker = Maker::new();
    for (float, tolerance) in [(Float::F32, 1e-5), (Float::F16, 1e-3), (Float::BF16, 1e-2)] {
        let source = maker.lora("in", 8, 3.0, float);
        let output = maker.path("out");
        let report = resized(&source, &output, r#"{"rank": 5, "conv_rank": 3}"#);
        let (before, after) = (deltas(&source), deltas(&output));
        for (name, rank) in [("lora_unet_linear", 5), ("lora_unet_conv", 3), ("lora_unet_point", 3)] {
            let entry = module(&report, name);
            assert_eq!((entry["old_rank"].as_u64(), entry["new_rank"].as_u64()), (Some(8), Some(rank)));
            let stated = entry["error"].as_f64().unwrap();
            let error = distance(&before[name], &after[name]);
            assert!((error - stated).abs() < tolerance * error, "{name} {float:?}: {error}, stated {stated}");
            assert!(stated > 0.05 && stated < 1.0);
        }
        assert!(std::fs::metadata(&output).unwrap().len() < std::fs::metadata(&source).unwrap().len());
        let metadata = File::open(&output).unwrap().metadata().clone();
        assert_eq!(metadata["ss_network_dim"], "Dynamic", "two ranks");
        assert!(!metadata.contains_key("sshs_model_hash"));
    }
}

#[test]
fn what_would_not_shrink_is_the_same_file() {
    let mut maker = Maker::new();
    let source = maker.lora("in", 4, 2.0, Float::F16);
    let output = maker.path("out");
    for options in [r#"{"rank": 4}"#, r#"{"rank": 64}"#, r#"{"method": "sv_fro", "param": 1.0}"#] {
        let report = resized(&source, &output, options);
        assert_eq!(report["summary"]["resized"], 0, "{options}");
        assert_eq!(std::fs::read(&output).unwrap(), std::fs::read(&source).unwrap(), "{options}");
    }
    // One rank fewer of a tiny module does not pay for the metadata: the file stays, also under its own name.
    let rows = vec![
        maker.random("lora_unet_x.lora_down.weight", &[2, 3], Float::F16),
        maker.random("lora_unet_x.lora_up.weight", &[3, 2], Float::F16),
    ];
    let tiny = maker.write("tiny", &rows);
    let before = std::fs::read(&tiny).unwrap();
    assert_eq!(resized(&tiny, &tiny, r#"{"rank": 1}"#)["summary"]["resized"], 0);
    assert_eq!(std::fs::read(&tiny).unwrap(), before);
    let loha = maker.loha("loha", "lora_unet_x", [6, 2, 5]);
    let report = resized(&loha, &output, r#"{"rank": 1}"#);
    assert_eq!(report["modules"][0]["status"], "copied");
    assert_eq!(std::fs::read(&output).unwrap(), std::fs::read(&loha).unwrap());
}

#[test]
fn what_stands_beside_the_factors_stays() {
    let mut maker = Maker::new();
    let key = |slot: &str| format!("lora_unet_x.{slot}");
    let mut rows = vec![
        maker.random(&key("lora_down.weight"), &[6, 10, 1, 1], Float::F32),
        maker.random(&key("lora_mid.weight"), &[6, 6, 3, 3], Float::F32),
        maker.random(&key("lora_up.weight"), &[40, 6, 1, 1], Float::F32),
        maker.random(&key("diff_b"), &[40], Float::F32),
        tensor(&key("scalar"), &[], Float::F32, &[0.5]),
    ];
    let source = maker.write("tucker", &rows);
    let output = maker.path("out");
    let report = resized(&source, &output, r#"{"rank": 2}"#);
    let entry = module(&report, "lora_unet_x");
    assert_eq!(entry["status"], "resized");
    let (before, after) = (deltas(&source), deltas(&output));
    let error = distance(&before["lora_unet_x"], &after["lora_unet_x"]);
    assert!((error - entry["error"].as_f64().unwrap()).abs() < 1e-5);
    assert_eq!(before["lora_unet_x.bias"], after["lora_unet_x.bias"]);
    // With five ranks the folded factors are larger than the core was.
    assert_eq!(resized(&source, &output, r#"{"rank": 5}"#)["modules"][0]["status"], "copied");

    rows.retain(|(name, ..)| !name.ends_with("mid.weight") && !name.ends_with("scalar"));
    rows.push(maker.random(&key("dora_scale"), &[40, 1, 1, 1], Float::F32));
    let source = maker.write("dora", &rows);
    let report = resized(&source, &output, r#"{"rank": 3}"#);
    assert_eq!(report["modules"][0]["note"], "its magnitude is kept as it was");
    let (from, to) = (File::open(&source).unwrap(), File::open(&output).unwrap());
    for slot in ["dora_scale", "diff_b"] {
        let bytes = |file: &File| file.bytes(file.get(&key(slot)).unwrap()).to_vec();
        assert_eq!(bytes(&from), bytes(&to));
    }
}

#[test]
fn loha_and_lokr_become_lora_exactly_where_the_rank_allows() {
    let mut maker = Maker::new();
    let output = maker.path("out");
    let sources =
        [(maker.loha("loha", "lora_unet_x", [20, 2, 30]), 4), (maker.lokr("lokr", "lora_unet_x"), 4)];
    for (source, exact) in sources {
        let report = resized(&source, &output, &format!(r#"{{"rank": {exact}, "convert": true}}"#));
        assert_eq!(
            (&report["modules"][0]["status"], &report["modules"][0]["new_rank"]),
            (&"converted".into(), &exact.into())
        );
        let (before, after) = (deltas(&source), deltas(&output));
        assert!(distance(&before["lora_unet_x"], &after["lora_unet_x"]) < 1e-6);
        let report = resized(&source, &output, r#"{"rank": 2, "convert": true}"#);
        let error = distance(&before["lora_unet_x"], &deltas(&output)["lora_unet_x"]);
        let stated = report["modules"][0]["error"].as_f64().unwrap();
        assert!((error - stated).abs() < 1e-5 && error > 0.01, "{error} {stated}");
        // The nearest of its rank: what an SVD of the whole leaves.
        let cols = before["lora_unet_x"].len() / if exact == 4 && source.ends_with("loha") { 20 } else { 40 };
        let values = before["lora_unet_x"].iter().map(|&v| v as f32).collect::<Vec<_>>();
        let whole = Matrix::new(values, before["lora_unet_x"].len() / cols, cols);
        let s = crate::linalg::svd(&whole).unwrap().2;
        let optimum = (norm(s[2..].iter().copied())) / norm(s.iter().copied());
        assert!((error - optimum).abs() < 1e-5, "{error} {optimum}");
    }
}

#[test]
fn one_adapter_alone_is_itself_and_its_negative() {
    let mut maker = Maker::new();
    let source = maker.lora("in", 4, 2.5, Float::F16);
    let output = maker.path("out");
    combined(&[(&source, 1.0)], &output, "").unwrap();
    assert_eq!(std::fs::read(&output).unwrap(), std::fs::read(&source).unwrap());

    for source in [source, maker.loha("loha", "lora_unet_x", [6, 2, 5]), maker.lokr("lokr", "lora_unet_x")] {
        let report = combined(&[(&source, -1.0)], &output, "").unwrap();
        assert_eq!(report["modules"][0]["form"], "scaled");
        let (before, after) = (deltas(&source), deltas(&output));
        for (name, before) in before {
            assert_eq!(before, after[&name].iter().map(|v| -v).collect::<Vec<_>>(), "{name}");
        }
        let (from, to) = (File::open(&source).unwrap(), File::open(&output).unwrap());
        for entry in from.entries().iter().filter(|e| !e.name.ends_with("alpha")) {
            assert_eq!(from.bytes(entry), to.bytes(to.get(&entry.name).unwrap()), "only alpha changes");
        }
    }
}

#[test]
fn a_concatenation_is_the_sum_whatever_the_algorithms() {
    let mut maker = Maker::new();
    let lora = maker.lora("lora", 4, 2.0, Float::F32);
    let other = maker.lora("other", 7, 9.0, Float::F32);
    let loha = maker.loha("loha", "lora_unet_linear", [40, 2, 30]);
    let lokr = maker.lokr("lokr", "lora_unet_linear");
    let key = |slot: &str| format!("lora_unet_linear.{slot}");
    let mut rows = vec![
        maker.random(&key("diff"), &[40, 30], Float::F32),
        maker.random(&key("diff_b"), &[40], Float::F32),
    ];
    rows.push(maker.random("lora_unet_norm.w_norm", &[12], Float::F32));
    rows.push(maker.random("lora_unet_norm.b_norm", &[12], Float::F32));
    let full = maker.write("full", &rows);
    let output = maker.path("out");
    let check = |inputs: &[(&Path, f64)], form: &str, rank: Option<u64>| {
        let report = combined(inputs, &output, "").unwrap();
        let entry = module(&report, "lora_unet_linear");
        assert_eq!((entry["form"].as_str(), entry["rank"].as_u64()), (Some(form), rank), "{entry}");
        let after = deltas(&output);
        let mut sum: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for (path, weight) in inputs {
            for (name, delta) in deltas(path) {
                let sum = sum.entry(name).or_insert_with(|| vec![0.0; delta.len()]);
                sum.iter_mut().zip(delta).for_each(|(s, d)| *s += weight * d);
            }
        }
        assert_eq!(sum.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (name, sum) in sum {
            assert!(distance(&sum, &after[&name]) < 1e-6, "{name}");
        }
    };
    check(&[(&lora, 0.8), (&other, -0.5)], "concatenated", Some(11));
    check(&[(&lora, -0.3), (&loha, 2.0), (&lokr, 1.0)], "concatenated", Some(12));
    check(&[(&lora, 1.0), (&full, 0.7)], "whole", None);
    check(&[(&full, 0.5), (&full, 0.25), (&lokr, -1.0)], "whole", None);
    check(&[(&full, 0.5)], "scaled", None);
    check(&[(&lora, 1.0), (&other, 0.0)], "copied", Some(4));
}

#[test]
fn a_cut_sum_is_the_nearest_and_linear_has_its_cross_terms() {
    let mut maker = Maker::new();
    let (a, b) = (maker.lora("a", 4, 4.0, Float::F32), maker.lora("b", 4, 2.0, Float::F32));
    let output = maker.path("out");
    let (da, db) = (deltas(&a), deltas(&b));
    let report = combined(&[(&a, 1.0), (&b, -2.0)], &output, r#"{"method": "svd", "rank": 3}"#).unwrap();
    let sum: Vec<f64> =
        da["lora_unet_linear"].iter().zip(&db["lora_unet_linear"]).map(|(a, b)| a - 2.0 * b).collect();
    let whole = Matrix::new(sum.iter().map(|&v| v as f32).collect(), 40, 30);
    let s = crate::linalg::svd(&whole).unwrap().2;
    let optimum = norm(s[3..].iter().copied()) / norm(s.iter().copied());
    let error = distance(&sum, &deltas(&output)["lora_unet_linear"]);
    let stated = module(&report, "lora_unet_linear")["error"].as_f64().unwrap();
    assert!((error - optimum).abs() < 1e-5 && (stated - optimum).abs() < 1e-5, "{error} {stated} {optimum}");
    // At the sum's own rank nothing is lost, through sparse methods of full density too.
    for options in [
        r#"{"method": "svd", "rank": 8}"#,
        r#"{"method": "magnitude_prune", "density": 1, "rank": 8}"#,
        r#"{"method": "dare", "density": 1}"#,
    ] {
        combined(&[(&a, 1.0), (&b, -2.0)], &output, options).unwrap();
        assert!(distance(&sum, &deltas(&output)["lora_unet_linear"]) < 1e-5, "{options}");
    }
    // The same file twice at 1/2: (2 sqrt(1/2) up)(2 sqrt(1/2) down) is twice the delta, where the sum is the delta.
    combined(&[(&a, 0.5), (&a, 0.5)], &output, r#"{"method": "linear"}"#).unwrap();
    let twice: Vec<f64> = da["lora_unet_linear"].iter().map(|v| 2.0 * v).collect();
    assert!(distance(&twice, &deltas(&output)["lora_unet_linear"]) < 1e-6);
    let c = maker.lora("c", 5, 2.0, Float::F32);
    let error = combined(&[(&a, 1.0), (&c, 1.0)], &output, r#"{"method": "linear"}"#).unwrap_err();
    assert!(
        error.to_string().contains("lora_unet_linear") && error.to_string().contains("rank 5"),
        "{error}"
    );
}

#[test]
fn what_needs_its_weight_is_refused_by_name() {
    let mut maker = Maker::new();
    let lora = maker.lora("lora", 4, 2.0, Float::F32);
    let rows = vec![
        maker.random("lora_unet_linear.lora_down.weight", &[2, 30], Float::F32),
        maker.random("lora_unet_linear.lora_up.weight", &[40, 2], Float::F32),
        maker.random("lora_unet_linear.dora_scale", &[40, 1], Float::F32),
    ];
    let dora = maker.write("dora", &rows);
    let output = maker.path("out");
    for inputs in [vec![(&*dora, 1.0), (&*lora, 1.0)], vec![(&*dora, 0.5)]] {
        let error = combined(&inputs, &output, "").unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
        assert!(
            error.to_string().contains("lora_unet_linear") && error.to_string().contains("DoRA"),
            "{error}"
        );
        assert!(!output.exists());
    }
    let rows = vec![maker.random("lora_unet_y.w_norm", &[3], Float::F32)];
    let norms = maker.write("norms", &rows);
    let report = combined(&[(&dora, 1.0), (&norms, 0.5)], &output, "").unwrap();
    assert_eq!(module(&report, "lora_unet_linear")["form"], "copied");
}

#[test]
fn files_of_two_spellings_meet() {
    let mut maker = Maker::new();
    let mut file = |name: &str, module: &str, [down, up]: [&str; 2]| {
        let rows = vec![
            maker.random(&format!("{module}.{down}"), &[3, 16], Float::F32),
            maker.random(&format!("{module}.{up}"), &[16, 3], Float::F32),
        ];
        maker.write(name, &rows)
    };
    let inner = "attentions.0.transformer_blocks.0.attn1.to_q";
    let kohya = format!("lora_unet_down_blocks_1_{}", inner.replace('.', "_"));
    let kohya = file("kohya", &kohya, ["lora_down.weight", "lora_up.weight"]);
    let peft = file("peft", &format!("unet.down_blocks.1.{inner}"), ["lora_A.weight", "lora_B.weight"]);
    let output = maker.path("out");
    for inputs in [[(&*kohya, 1.0), (&*peft, 0.5)], [(&*peft, 0.5), (&*kohya, 1.0)]] {
        let report = combined(&inputs, &output, "").unwrap();
        assert_eq!(
            (&report["summary"]["modules"], &report["summary"]["shared"]),
            (&1.into(), &1.into()),
            "{report}"
        );
        let all: Vec<_> = [&kohya, &peft, &output].map(|p| deltas(p).into_values().next().unwrap()).into();
        let sum: Vec<f64> = all[0].iter().zip(&all[1]).map(|(a, b)| a + 0.5 * b).collect();
        assert!(distance(&sum, &all[2]) < 1e-6);
    }
}

#[test]
fn an_extracted_lora_is_the_difference() {
    let mut maker = Maker::new();
    let attention = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight";
    let conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight";
    let norm_key = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight";
    let still = "model.diffusion_model.input_blocks.2.0.in_layers.2.weight";
    let base_rows = vec![
        maker.random(attention, &[40, 30], Float::F32),
        maker.random(conv, &[12, 10, 3, 3], Float::F32),
        maker.random(norm_key, &[10], Float::F32),
        maker.random(still, &[8, 8, 3, 3], Float::F32),
        maker.random("first_stage_model.decoder.conv_in.weight", &[8, 8, 3, 3], Float::F32),
    ];
    let base = maker.write("base", &base_rows);
    // Add a LoRA of rank 3 to the first two, something to the norm and the VAE.
    let mut tuned_rows = base_rows.clone();
    let mut wanted = BTreeMap::new();
    for at in [0, 1, 2, 4] {
        let (name, _, shape, bytes) = &mut tuned_rows[at];
        let (rows, cols) = (shape[0], shape[1..].iter().product::<usize>());
        let mut diff = Matrix::zeros(rows, cols);
        let up = Matrix::new((0..rows * 3).map(|i| (i as f32).sin() * 0.1).collect(), rows, 3);
        let down = Matrix::new((0..3 * cols).map(|i| (i as f32 * 0.7).cos()).collect(), 3, cols);
        diff.add_product(1.0, &up, &down);
        let mut values = vec![0f32; rows * cols];
        Float::F32.read(bytes, &mut values);
        values.iter_mut().zip(&diff.values).for_each(|(v, d)| *v += d);
        Float::F32.write(&values, bytes);
        wanted.insert(name.clone(), diff.values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
    }
    let tuned = maker.write("tuned", &tuned_rows);
    let output = maker.path("out");
    let run = |options: &str| {
        let options = extract::Options::parse(options).unwrap();
        extract(&tuned, &base, &output, &options, &mut Progress::none())
    };
    let report = run(r#"{"rank": 8, "conv_rank": 4, "energy": 0.999999, "norms": true}"#).unwrap();
    let made = deltas(&output);
    let names: Vec<_> = made.keys().map(String::as_str).collect();
    let root = "lora_unet_down_blocks_";
    let [to_q, conv1, norm1] =
        ["1_attentions_0_transformer_blocks_0_attn1_to_q", "0_resnets_0_conv1", "0_resnets_0_norm1"]
            .map(|inner| format!("{root}{inner}"));
    assert_eq!(names, [&conv1, &norm1, &to_q]);
    // The sums were rounded into the weights: 2^-24 of their size, seen against a smaller difference.
    for (module, key) in [(&to_q, attention), (&conv1, conv), (&norm1, norm_key)] {
        assert!(distance(&wanted[key], &made[module]) < 1e-5, "{module}");
    }
    assert_eq!(
        module(&report, &to_q)["rank"],
        2,
        "sines of one frequency span two directions, and energy finds them"
    );
    assert_eq!(report["summary"]["unchanged"], 1);

    let report = run(r#"{"rank": 1}"#).unwrap();
    let entry = module(&report, &to_q);
    let error = distance(&wanted[attention], &deltas(&output)[&to_q]);
    assert!((error - entry["error"].as_f64().unwrap()).abs() < 1e-4 && error > 0.1, "{error} {entry}");
    let error = run(r#"{"rank": 1, "min_diff": 100}"#).unwrap_err();
    assert!(error.to_string().contains("do not differ"), "{error}");
}

#[test]
fn a_cancel_leaves_nothing_and_bad_options_are_named() {
    let mut maker = Maker::new();
    let source = maker.lora("in", 8, 3.0, Float::F32);
    let output = maker.path("out");
    let cancel = Cancel::default();
    cancel.request();
    let mut progress = Progress { report: None, cancel: Some(cancel) };
    let options = resize::Options::parse(r#"{"rank": 2}"#).unwrap();
    assert!(matches!(resize(&source, &output, &options, &mut progress), Err(Error::Cancelled)));
    let options = combine::Options::parse("").unwrap();
    assert!(matches!(combine(&[(&source, 0.5)], &output, &options, &mut progress), Err(Error::Cancelled)));
    assert_eq!(std::fs::read_dir(maker.folder.path()).unwrap().count(), 1, "no output, no sibling");

    let problem = |e: Error| e.to_string();
    for (text, what) in [
        (r#"{"rnak": 2}"#, "nearest is `rank`"),
        ("", "`rank` is missing"),
        (r#"{"method": "sv_ratio"}"#, "`param` is missing"),
        (r#"{"rank": 3, "param": 0.5}"#, "no meaning with method fixed"),
    ] {
        let told = problem(resize::Options::parse(text).unwrap_err());
        assert!(told.contains(what), "{told}");
    }
    for (text, what) in [
        (r#"{"rank": 2}"#, "no meaning with method concat"),
        (r#"{"method": "svd"}"#, "`rank` is missing"),
        (r#"{"method": "ties"}"#, "`density` is missing"),
        (r#"{"method": "cat"}"#, "expected one of concat, svd"),
    ] {
        let told = problem(combine::Options::parse(text).unwrap_err());
        assert!(told.contains(what), "{told}");
    }
    assert!(problem(extract::Options::parse("{}").unwrap_err()).contains("`rank` is missing"));
    let error = combined(&[(&source, 0.0)], &output, "").unwrap_err();
    assert!(error.to_string().contains("nothing to combine"));
    assert!(combined(&[(&source, f64::NAN)], &output, "").is_err());
}
