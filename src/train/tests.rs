//! The network as a whole: resume, files, accumulation, order of registration.

use super::network::Network;
use super::Config;
use crate::adapter::safetensors::File;
use crate::algo::training::{long, Form, Layer};
use crate::algo::TRAINED;
use crate::dtype::Float;
use crate::error::Error;
use crate::merge::bypass::Geometry;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

fn conv(groups: usize) -> Geometry {
    Geometry { padding: vec![1], groups, ..Geometry::default() }
}

/// Linear 6 -> 5, conv 4 -> 6 (3x3), grouped conv 4 -> 6 (3x3, 2 groups).
const MODULES: [(&str, &[usize], usize); 3] =
    [("b.linear", &[5, 6], 1), ("a.conv", &[6, 4, 3, 3], 1), ("c.grouped", &[6, 2, 3, 3], 2)];

fn network(options: &str) -> Network {
    let mut network = Network::new(Config::parse(options).unwrap()).unwrap();
    for (name, weight, groups) in MODULES {
        let geometry = if weight.len() == 2 { Geometry::default() } else { conv(groups) };
        network.add_module(name, weight, geometry).unwrap();
    }
    network.build(Device::Cpu).unwrap();
    network
}

/// A smooth tensor that differs with `phase`.
fn wave(shape: &[i64], phase: f64) -> Tensor {
    let n = shape.iter().product::<i64>();
    let values: Vec<f32> = (0..n).map(|i| ((i as f64 * 0.61 + phase) * 1.7).sin() as f32).collect();
    Tensor::from_slice(&values).reshape(shape)
}

fn input(module: usize, t: u64) -> (Tensor, Tensor) {
    let (x, y): (&[i64], &[i64]) =
        if module == 0 { (&[2, 3, 6], &[2, 3, 5]) } else { (&[2, 4, 5, 4], &[2, 6, 5, 4]) };
    (wave(x, t as f64 + module as f64 * 0.3), wave(y, t as f64 * 1.1 + module as f64))
}

/// One micro-step in which every layer's output shall become a given tensor; gives the loss.
fn micro_step(network: &mut Network, t: u64) -> f64 {
    let (mut loss, t) = (0.0, t % 2);
    for module in 0..network.modules() {
        let (x, target) = input(module, t);
        let y = target.zeros_like();
        network.forward(module, &x, None, &y).unwrap();
        let error = &y - &target;
        loss += error.square().sum(Kind::Double).double_value(&[]);
        network.backward(module, &x, None, &(error * 2.0), false).unwrap();
    }
    network.step().unwrap();
    loss
}

fn bits(network: &Network) -> Vec<u32> {
    let flat = Vec::<f32>::try_from(network.parameters().unwrap()).unwrap();
    flat.into_iter().map(f32::to_bits).collect()
}

const RUN: &str = r#"{"network_dim": 3, "network_alpha": 2, "conv_dim": 2, "conv_alpha": 1.5, "learning_rate": 0.05, "lr_scheduler": "cosine",
    "max_train_steps": 30, "lr_warmup_steps": 3, "seed": 5, "gradient_accumulation_steps": 3, "mixed_precision": "no"}"#;

#[test]
fn a_resumed_run_ends_on_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    // 3 micro-steps per update: after 30 between two updates, after 31 and 32 in the middle of an accumulation.
    for precision in ["no", "bf16"] {
        let run = RUN.replace("\"no\"", &format!("\"{precision}\""));
        let mut whole = network(&run);
        let losses: Vec<f64> = (0..60).map(|t| micro_step(&mut whole, t)).collect();
        assert!(losses[58] < 0.95 * losses[0], "nothing was learned: {} -> {}", losses[0], losses[58]);
        for cut in [30, 31, 32] {
            let file = folder.path().join(format!("{precision}-{cut}.safetensors"));
            let mut first = network(&run);
            for t in 0..cut {
                micro_step(&mut first, t);
            }
            first.save_state(&file).unwrap();
            drop(first);
            let mut second = network(&run.replace("\"seed\": 5", "\"seed\": 6"));
            assert_ne!(bits(&second), bits(&whole));
            second.load_state(&file).unwrap();
            for t in cut..60 {
                assert_eq!(
                    micro_step(&mut second, t).to_bits(),
                    losses[t as usize].to_bits(),
                    "cut {cut}, micro-step {t}"
                );
            }
            assert_eq!(bits(&second), bits(&whole), "cut {cut}");
        }
    }
}

#[test]
fn a_state_between_backward_and_step_keeps_its_gradient() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.safetensors");
    let mut first = network("{}");
    let (x, grad) = input(0, 1);
    first.backward(0, &x, None, &grad, false).unwrap();
    first.save_state(&file).unwrap();
    let mut second = network("{}");
    second.load_state(&file).unwrap();
    assert_eq!(second.step().unwrap(), first.step().unwrap());
    assert_eq!(bits(&second), bits(&first));
}

#[test]
fn the_state_of_another_network_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.safetensors");
    network(RUN).save_state(&file).unwrap();
    let refusal = |options: &str| {
        let mut other = network(options);
        let before = bits(&other);
        let text = other.load_state(&file).unwrap_err().to_string();
        assert_eq!(bits(&other), before);
        text
    };
    let rank = refusal(&RUN.replace("\"network_dim\": 3", "\"network_dim\": 4"));
    assert!(
        rank.contains("another network") && rank.contains("lora_unet_b_linear") && rank.contains("[3,6]"),
        "{rank}"
    );
    let alpha = refusal(&RUN.replace("\"network_alpha\": 2", "\"network_alpha\": 1"));
    assert!(alpha.contains("has constants {\"alpha\":2.0} in the file, {\"alpha\":1.0} here"), "{alpha}");
    let mut smaller = Network::new(Config::parse(RUN).unwrap()).unwrap();
    smaller.add_module("b.linear", &[5, 6], Geometry::default()).unwrap();
    smaller.build(Device::Cpu).unwrap();
    let text = smaller.load_state(&file).unwrap_err().to_string();
    assert!(text.contains("3 modules, this network 1") && text.contains("lora_unet_a_conv"), "{text}");
    let adapter = folder.path().join("adapter.safetensors");
    network(RUN).save(&adapter, Float::F32, &BTreeMap::new(), false).unwrap();
    let text = network(RUN).load_state(&adapter).unwrap_err().to_string();
    assert!(text.contains("not a training state"), "{text}");
    // In the middle of an accumulation, another length of it cannot go on.
    let mut middle = network(RUN);
    micro_step(&mut middle, 0);
    middle.save_state(&file).unwrap();
    let text = refusal(&RUN.replace("steps\": 3, \"mixed", "steps\": 2, \"mixed"));
    assert!(text.contains("1 of 3 accumulation steps"), "{text}");
}

#[test]
fn accumulation_averages_and_reports_updates() {
    let plain = r#"{"max_grad_norm": 0, "learning_rate": 0.01}"#;
    let (mut once, mut thrice) =
        (network(plain), network(&plain.replace('}', r#", "gradient_accumulation_steps": 3}"#)));
    let (x, grad) = input(0, 4);
    once.backward(0, &x, None, &grad, false).unwrap();
    let want = once.step().unwrap();
    for i in 0..3 {
        thrice.backward(0, &x, None, &(&grad * f64::from(i)), false).unwrap();
        let step = thrice.step().unwrap();
        assert_eq!((step.updated, step.step), (i == 2, u64::from(i == 2)));
        if step.updated {
            assert!((step.grad_norm - want.grad_norm).abs() < 1e-6 * want.grad_norm);
        }
    }
    let (a, b) = (once.parameters().unwrap(), thrice.parameters().unwrap());
    assert!((a - b).abs().max().double_value(&[]) < 1e-7);
    assert_eq!(thrice.gradients().unwrap().abs().max().double_value(&[]), 0.0);
}

#[test]
fn clipping_bounds_the_norm_that_the_optimizer_sees() {
    // Without momentum or decay, and with a large eps, AdamW's change is proportional to the gradient.
    let options = |norm| {
        format!(
            r#"{{"max_grad_norm": {norm}, "learning_rate": 1, "optimizer_args": {{"betas": [0, 0], "eps": 1e6, "weight_decay": 0}}}}"#
        )
    };
    let change = |norm: f64| {
        let mut network = network(&options(norm));
        let before = network.parameters().unwrap().copy();
        let (x, grad) = input(0, 4);
        network.backward(0, &x, None, &grad, false).unwrap();
        let got = network.step().unwrap().grad_norm;
        (got, (network.parameters().unwrap() - before).norm().double_value(&[]) * 1e6)
    };
    let (norm, free) = change(0.0);
    assert!(norm > 0.1 && (free / norm - 1.0).abs() < 2e-2, "{norm} {free}");
    let (same, clipped) = change(norm / 4.0);
    assert_eq!(same, norm, "the norm before clipping is reported");
    assert!((clipped / free - 0.25).abs() < 1e-2, "{clipped} {free}");
    assert_eq!(change(norm * 4.0), (norm, free));
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let mut network = network("{}");
    micro_step(&mut network, 0);
    let (before, (x, grad)) = (bits(&network), input(0, 1));
    network.backward(0, &x, None, &(&grad * f64::NAN), false).unwrap();
    for _ in 0..2 {
        let error = network.step().unwrap_err();
        assert!(matches!(error, Error::Train { .. }) && error.to_string().contains("step 2"), "{error}");
        assert!(!error.hint().is_empty());
    }
    assert_eq!(bits(&network), before);
    network.zero_gradients().unwrap();
    network.backward(0, &x, None, &grad, false).unwrap();
    assert_eq!(network.step().unwrap().step, 2);
}

#[test]
fn a_step_that_nobody_waits_for_leaves_out_what_is_not_finite() {
    let (mut waited, mut ahead) = (network(RUN), network(RUN));
    for t in 0..12 {
        micro_step(&mut waited, t);
        for module in 0..3 {
            let (x, target) = input(module, t % 2);
            let y = target.zeros_like();
            ahead.forward(module, &x, None, &y).unwrap();
            ahead.backward(module, &x, None, &((y - target) * 2.0), false).unwrap();
        }
        ahead.step_ahead().unwrap();
    }
    assert_eq!(bits(&ahead), bits(&waited));
    assert_eq!(ahead.progress().unwrap(), (4, 0));
    let told = ahead.results().unwrap();
    assert_eq!((told.step, told.updated, told.skipped), (4, true, 0));
    assert_eq!(told.learning_rate, ahead.config().schedule().learning_rate(3));
    let (x, grad) = input(0, 1);
    for _ in 0..6 {
        ahead.backward(0, &x, None, &(&grad * f64::NAN), false).unwrap();
        ahead.step_ahead().unwrap();
    }
    assert_eq!(bits(&ahead), bits(&waited));
    let told = ahead.results().unwrap();
    assert_eq!((told.step, told.updated, told.skipped), (4, false, 2));
    for t in 12..15 {
        assert_eq!(micro_step(&mut ahead, t).to_bits(), micro_step(&mut waited, t).to_bits());
    }
    assert_eq!(bits(&ahead), bits(&waited));
    assert_eq!(ahead.results().unwrap().skipped, 0, "told once");
    let refusal = ahead.hold(true).unwrap_err();
    assert!(matches!(refusal, Error::Unsupported { .. }) && refusal.hint().contains("all optimizers can"));
}

#[test]
fn the_average_is_that_of_its_formula() {
    let folder = tempfile::tempdir().unwrap();
    let run = RUN.replace("\"seed\": 5", "\"seed\": 5, \"ema_decay\": 0.75");
    let values = |tensor: &Tensor| Vec::<f32>::try_from(tensor).unwrap();
    let (mut network, mut plain) = (network(&run), self::network(RUN));
    let mut want: Vec<f64> = values(plain.parameters().unwrap()).into_iter().map(f64::from).collect();
    for t in 0..30 {
        micro_step(&mut network, t);
        micro_step(&mut plain, t);
        if plain.progress().unwrap().1 == 0 {
            let now = values(plain.parameters().unwrap());
            want.iter_mut().zip(now).for_each(|(ema, p)| *ema = 0.75 * *ema + 0.25 * f64::from(p));
        }
    }
    assert_eq!(bits(&network), bits(&plain), "it changes nothing else");
    let (ema, master) = (values(network.ema().unwrap()), values(network.parameters().unwrap()));
    let off = |a: &[f32]| a.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    // Ten sums in fp32 of numbers below 2.
    assert!(off(&ema) < 1e-6 && off(&master) > 1e-2, "{} {}", off(&ema), off(&master));

    // A file of the average, a state with it.
    let [of_ema, of_master, state] =
        ["ema", "master", "state"].map(|name| folder.path().join(format!("{name}.safetensors")));
    network.save(&of_ema, Float::F32, &BTreeMap::new(), true).unwrap();
    network.save(&of_master, Float::F32, &BTreeMap::new(), false).unwrap();
    network.save_state(&state).unwrap();
    let mut other = self::network(&run);
    other.load_weights(&of_ema).unwrap();
    assert_eq!(values(other.parameters().unwrap()), ema);
    other.load_weights(&of_master).unwrap();
    assert_eq!(values(other.parameters().unwrap()), master);
    other.load_state(&state).unwrap();
    for t in 30..36 {
        micro_step(&mut network, t);
        micro_step(&mut other, t);
    }
    assert_eq!(values(other.ema().unwrap()), values(network.ema().unwrap()));
    assert_ne!(values(other.ema().unwrap()), ema);
    // From here on the average of other weights.
    other.load_weights(&of_master).unwrap();
    assert_eq!(values(other.ema().unwrap()), master);

    let text = plain.load_state(&state).unwrap_err().to_string();
    assert!(text.contains("ema_decay"), "{text}");
    assert!(plain.save(&of_ema, Float::F32, &BTreeMap::new(), true).is_err());
    // Before the first step it is where the parameters are, also those that the host wrote.
    let mut fresh = self::network(&run);
    let _ = fresh.parameters().unwrap().shallow_clone().fill_(0.5);
    fresh.refresh().unwrap();
    fresh.save(&of_ema, Float::F32, &BTreeMap::new(), true).unwrap();
    assert_eq!(tensors(&of_ema)["lora_unet_b_linear.lora_up.weight"].1[..4], 0.5f32.to_le_bytes());
}

#[test]
fn start_values_do_not_depend_on_the_order_of_modules() {
    let a = network("{}");
    let mut b = Network::new(Config::parse("{}").unwrap()).unwrap();
    for (name, weight, groups) in MODULES.iter().rev() {
        b.add_module(name, weight, if weight.len() == 2 { Geometry::default() } else { conv(*groups) })
            .unwrap();
    }
    tch::manual_seed(99);
    b.build(Device::Cpu).unwrap();
    assert_eq!(bits(&a), bits(&b));
    assert_ne!(bits(&a), bits(&network(r#"{"seed": 1}"#)));
    // U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)); the modules come in the order of their names, conv first (fan_in 36).
    let flat = Vec::<f32>::try_from(a.parameters().unwrap()).unwrap();
    let largest = flat[..16 * 36].iter().fold(0f32, |m, v| m.max(v.abs()));
    assert!((0.98 / 6.0..=1.0 / 6.0).contains(&largest), "{largest}");
    assert_eq!(flat[16 * 36..16 * 36 + 6 * 16], [0.0; 96], "up starts at zero");
}

fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let file = File::open(path).unwrap();
    file.entries().iter().map(|e| (e.name.clone(), (e.shape.clone(), file.bytes(e).to_vec()))).collect()
}

#[test]
fn a_saved_file_reads_back_the_same_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let mut trained = network(RUN);
    for t in 0..9 {
        micro_step(&mut trained, t);
    }
    let extra = BTreeMap::from([
        ("ss_base_model_version".to_owned(), "sdxl_base_v1-0".to_owned()),
        ("ss_output_name".into(), "mine".into()),
    ]);
    trained.save(&path, Float::F32, &extra, false).unwrap();
    let saved = tensors(&path);
    assert_eq!(saved.len(), 9);
    assert_eq!(saved["lora_unet_b_linear.lora_down.weight"].0, [3, 6]);
    assert_eq!(saved["lora_unet_a_conv.lora_up.weight"].0, [6, 2, 1, 1]);
    assert_eq!(saved["lora_unet_c_grouped.lora_down.weight"].0, [2, 2, 3, 3]);
    assert_eq!(saved["lora_unet_b_linear.alpha"], (vec![], 2f32.to_le_bytes().to_vec()));
    assert_eq!(saved["lora_unet_a_conv.alpha"].1, 1.5f32.to_le_bytes());
    let file = File::open(&path).unwrap();
    let names: Vec<_> = file.entries().iter().map(|e| e.name.as_str()).collect();
    assert!(names.is_sorted(), "{names:?}");
    let meta = file.metadata();
    for (key, want) in [
        ("ss_network_module", "networks.lora"),
        ("ss_network_dim", "3"),
        ("ss_network_alpha", "2"),
        ("ss_learning_rate", "0.05"),
        ("ss_steps", "3"),
        ("ss_max_train_steps", "30"),
        ("ss_output_name", "mine"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
    ] {
        assert_eq!(meta.get(key).map(String::as_str), Some(want), "{key}");
    }
    assert!(meta["ss_network_args"].contains("\"conv_dim\":\"2\""));
    let body: Vec<u8> = file.entries().iter().flat_map(|e| file.bytes(e).to_vec()).collect();
    use sha2::Digest;
    assert_eq!(meta["sshs_model_hash"], format!("{:x}", sha2::Sha256::digest(&body)));

    let mut next = network(&RUN.replace("\"seed\": 5", "\"seed\": 6"));
    assert_eq!(next.load_weights(&path).unwrap(), 3);
    assert_eq!(bits(&next), bits(&trained));
    let mut other = network(
        &RUN.replace("\"network_dim\": 3, \"network_alpha\": 2", "\"network_dim\": 4, \"network_alpha\": 3"),
    );
    let before = bits(&other);
    let text = other.load_weights(&path).unwrap_err().to_string();
    for part in [
        "`lora_unet_b_linear` has alpha 2",
        "lora_down.weight` has shape [3, 6]",
        "lora_up.weight` has shape [5, 3]",
    ] {
        assert!(text.contains(part), "`{part}` is missing in: {text}");
    }
    assert_eq!(bits(&other), before);
}

#[test]
fn values_that_a_dtype_cannot_hold_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let network = network("{}");
    let _ = network.parameters().unwrap().narrow(0, 0, 1).fill_(1e6);
    let error = network.save(&path, Float::F16, &BTreeMap::new(), false).unwrap_err();
    assert!(error.to_string().contains("lora_unet_a_conv.lora_down.weight"), "{error}");
    assert!(!path.exists());
    network.save(&path, Float::BF16, &BTreeMap::new(), false).unwrap();
    assert_eq!(tensors(&path)["lora_unet_b_linear.lora_up.weight"].1.len(), 5 * 16 * 2);
}

#[test]
fn wrong_calls_are_errors() {
    let mut open = Network::new(Config::parse("{}").unwrap()).unwrap();
    assert!(open.build(Device::Cpu).is_err(), "no modules");
    let mut add = |name: &str, weight: &[usize], geometry| open.add_module(name, weight, geometry);
    assert!(add("a.weight", &[4, 4], Geometry::default()).is_ok());
    assert!(add("diffusion_model.a", &[4, 4], Geometry::default())
        .unwrap_err()
        .to_string()
        .contains("lora_unet_a"));
    assert!(add("", &[4, 4], Geometry::default()).is_err());
    assert!(add("b", &[4], Geometry::default()).is_err());
    assert!(add("b", &[4, 0], Geometry::default()).is_err());
    assert!(add("b", &[4, 4, 3, 3], conv(3)).is_err());
    assert!(add("b", &[4, 4, 3, 3], Geometry { stride: vec![1, 1, 1], ..Geometry::default() }).is_err());
    assert!(
        add("b", &[4, usize::MAX / 2], Geometry::default()).is_ok(),
        "shapes are only numbers until build"
    );
    assert!(open.build(Device::Cpu).is_err(), "and then too many");
    let x = wave(&[2, 4], 0.0);
    assert!(open.forward(0, &x, None, &x).is_err(), "not built");

    let mut built = network("{}");
    assert!(built.add_module("late", &[4, 4], Geometry::default()).is_err());
    assert!(built.build(Device::Cpu).is_err());
    let (x, y) = input(0, 0);
    assert!(built.forward(7, &x, None, &y).is_err());
    assert!(matches!(built.forward(0, &x, None, &x).unwrap_err(), Error::Shape { .. }));
    assert!(matches!(built.forward(0, &x.to_kind(Kind::Double), None, &y).unwrap_err(), Error::Dtype { .. }));
    assert!(built.backward(0, &y, None, &x, true).is_err());
}

#[test]
fn tensors_of_a_host_may_have_another_dtype() {
    let mut network = network("{}");
    let _ = network.parameters().unwrap().shallow_clone().fill_(0.1);
    network.built.as_mut().unwrap().params.refresh().unwrap();
    // One rounding of the results is all that may differ, since the sums run in fp32.
    for (kind, rounding) in [(Kind::Float, 0.0), (Kind::BFloat16, 1.0 / 256.0), (Kind::Half, 1.0 / 2048.0)] {
        for module in 0..3 {
            let (x, y) = input(module, 3);
            let (x, y) = (x.to_kind(kind).set_requires_grad(true), y.to_kind(kind));
            let (exact_x, exact_y) = (x.detach().to_kind(Kind::Float), y.to_kind(Kind::Float));
            let exact_out = exact_y.copy();
            network.zero_gradients().unwrap();
            network.forward(module, &exact_x, None, &exact_out).unwrap();
            let exact_grad_x = network.backward(module, &exact_x, None, &exact_y, true).unwrap().unwrap();
            let exact_gradient = network.gradients().unwrap().copy();
            let out = y.copy();
            network.zero_gradients().unwrap();
            // The host records its own graph, or none, around the calls.
            tch::with_grad(|| network.forward(module, &x, None, &out)).unwrap();
            let grad_x = tch::no_grad(|| network.backward(module, &x, None, &y, true)).unwrap().unwrap();
            assert!(!out.requires_grad() && !x.grad().defined(), "the host's graph is left alone");
            let close = |got: &Tensor, want: &Tensor, tolerance: f64| {
                let scale = want.abs().max().double_value(&[]);
                let off = (got.to_kind(Kind::Float) - want).abs().max().double_value(&[]);
                assert!(off <= tolerance * scale, "{kind:?}, module {module}: off by {off} of {scale}");
            };
            close(&out, &exact_out, rounding);
            close(&grad_x, &exact_grad_x, rounding);
            close(network.gradients().unwrap(), &exact_gradient, 0.0);
        }
    }
}

#[test]
fn sixteen_bit_training_follows_fp32() {
    for (precision, tolerance) in [("bf16", 2e-2), ("fp16", 3e-3)] {
        let run = RUN.replace("\"no\"", &format!("\"{precision}\""));
        let (mut half, mut full) = (network(&run), network(RUN));
        for t in 0..60 {
            let (a, b) = (micro_step(&mut half, t), micro_step(&mut full, t));
            assert!((a / b - 1.0).abs() < tolerance, "{precision}, micro-step {t}: loss {a} beside {b}");
        }
    }
}

#[test]
fn norms_of_changes_are_bounded() {
    let run = |bound: &str| {
        let mut network = network(&RUN.replace("{\"network_dim\"", &format!("{{{bound}\"network_dim\"")));
        for t in 0..30 {
            micro_step(&mut network, t);
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("adapter.safetensors");
        network.save(&file, Float::F32, &BTreeMap::new(), false).unwrap();
        let file = File::open(&file).unwrap();
        MODULES.map(|(name, weight, _)| {
            let name = super::network::file_name(name);
            let values = |slot: &str, rows: usize| {
                let entry = file.get(&format!("{name}.{slot}")).unwrap();
                let values: Vec<f32> = file
                    .bytes(entry)
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                    .collect();
                Tensor::from_slice(&values).to_kind(Kind::Double).reshape([rows as i64, -1])
            };
            let rank = file.get(&format!("{name}.lora_down.weight")).unwrap().shape[0];
            let alpha = values("alpha", 1).double_value(&[0, 0]);
            let delta = values("lora_up.weight", weight[0]).matmul(&values("lora_down.weight", rank));
            delta.norm().double_value(&[]) * alpha / rank as f64
        })
    };
    let free = run("");
    let most = free.iter().fold(0.0f64, |a, &b| a.max(b)) * 0.6;
    assert!(free.iter().any(|&norm| norm > most) && free.iter().any(|&norm| norm < most), "{free:?}");
    let bounded = run(&format!("\"scale_weight_norms\": {most}, "));
    assert!(bounded.iter().all(|&norm| norm <= most * (1.0 + 1e-6)), "{bounded:?} above {most}");
    assert!(bounded.iter().any(|&norm| norm > most * (1.0 - 1e-6)), "{bounded:?} far below {most}");
}

#[test]
fn a_network_takes_ranks_and_values_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let mut first = network(r#"{"network_dim": 3, "network_alpha": 2, "conv_dim": 5, "seed": 4}"#);
    micro_step(&mut first, 0);
    first.save(&file, Float::F32, &BTreeMap::new(), false).unwrap();
    let options = |dim: bool| {
        format!(r#"{{"network_weights": {:?}, "dim_from_weights": {dim}}}"#, file.to_str().unwrap())
    };
    let second = network(&options(true));
    assert_eq!(bits(&second), bits(&first));
    let mut other = Network::new(Config::parse(&options(true)).unwrap()).unwrap();
    assert_eq!(other.add_module("not.in.it", &[4, 4], Geometry::default()).unwrap(), None);
    // Without them the ranks differ, which is told, and nothing is built.
    let mut third = Network::new(Config::parse(&options(false)).unwrap()).unwrap();
    third.add_module("b.linear", &[5, 6], Geometry::default()).unwrap();
    let text = third.build(Device::Cpu).unwrap_err().to_string();
    assert!(text.contains("has shape [3, 6], this network [16, 6]"), "{text}");
    assert!(third.parameters().is_err());
}

/// dW is zero at first, for every algorithm, kind of layer and choice of parameters; and it can become something else.
#[test]
fn a_fresh_module_changes_nothing() {
    let sliding = |weight: &[usize], geometry: Geometry, x: &[i64]| {
        (Layer::sliding("layer", weight, &geometry, true).unwrap(), Some(geometry), x.to_vec())
    };
    let norm = |form, x: &[i64]| {
        (Layer { name: "layer".into(), weight: vec![6], form, bias: true }, None, x.to_vec())
    };
    let layers = [
        sliding(&[64, 96], Geometry::default(), &[2, 3, 96]),
        sliding(&[8, 6, 3], conv(1), &[2, 6, 5]),
        sliding(&[8, 6, 3, 3], conv(1), &[2, 6, 5, 4]),
        sliding(&[8, 6, 3, 3], conv(2), &[2, 12, 5, 4]),
        norm(Form::LayerNorm { eps: 1e-5 }, &[2, 4, 6]),
        norm(Form::RmsNorm { eps: 1e-5 }, &[2, 4, 6]),
        norm(Form::GroupNorm { groups: 3, eps: 1e-5 }, &[2, 6, 4, 3]),
    ];
    let choices = [
        r#""mixed_precision": "no""#,
        r#""mixed_precision": "bf16""#,
        r#""use_tucker": true"#,
        r#""decompose_both": true"#,
        r#""full_matrix": true"#,
        r#""train_on_input": true"#,
    ];
    let mut modules = 0;
    for (begin, choice) in TRAINED.iter().flat_map(|begin| choices.map(|choice| (begin, choice))) {
        for (layer, geometry, x) in &layers {
            let options = format!(r#"{{"algo": "{}", "network_dim": 2, {choice}}}"#, begin.names[0]);
            let what = format!("{options} on {layer:?}");
            let (x, weight) = (wave(x, 0.0), wave(&long(&layer.weight), 1.0));
            let mut network = Network::new(Config::parse(&options).unwrap()).unwrap();
            if begin.names[0] == "tlora" && layer.large_kernel() {
                assert!(network.add_layer(layer.clone(), geometry.clone(), Some(&weight)).is_err(), "{what}");
                continue;
            }
            if network.add_layer(layer.clone(), geometry.clone(), Some(&weight)).unwrap().is_none() {
                assert_ne!(layer.is_norm(), begin.names[0] == "norm", "{what}");
                continue;
            }
            network.build(Device::Cpu).unwrap();
            let base = layer.apply(&x, &weight).unwrap();
            let y = base.copy();
            network.forward(0, &x, Some(&weight), &y).unwrap();
            let norm = |t: &Tensor| t.norm().double_value(&[]);
            assert!(norm(&(y - &base)) <= 1e-6 * norm(&base), "{what}");
            network.backward(0, &x, Some(&weight), &base, false).unwrap();
            assert!(network.step().unwrap().grad_norm > 0.0, "{what}");
            // Tensors of a host may have any strides.
            let mut run = |lay: &dyn Fn(&Tensor) -> Tensor| {
                network.zero_gradients().unwrap();
                let (x, y) = (lay(&x), lay(&base));
                let grad_x = network.backward(0, &x, Some(&weight), &y, true).unwrap().unwrap();
                network.forward(0, &x, Some(&weight), &y).unwrap();
                (y, grad_x, network.gradients().unwrap().copy())
            };
            let rows = run(&Tensor::copy);
            let turned = run(&|t| t.transpose(0, -1).contiguous().transpose(0, -1));
            assert!(rows.0.equal(&turned.0) && rows.1.equal(&turned.1) && rows.2.equal(&turned.2), "{what}");
            modules += 1;
        }
    }
    // T-LoRA has no form for the three convolutions.
    assert_eq!(modules, choices.len() * (4 * (TRAINED.len() - 1) - 3 + 3));
}
