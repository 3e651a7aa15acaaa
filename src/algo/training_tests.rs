//! Every algorithm in training, on every kind of layer: its gradients against differences and fp64, its dW against what the same tensors do
//! when they are read from a file.

use super::draw::{Draw, Dropout};
use super::training::*;
use super::{Group, TRAINED};
use crate::merge::bypass::Geometry;
use crate::merge::cpu;
use crate::merge::ops::{Op, Storage, Term};
use crate::view::{Device, Tensor, View};
use tch::{Kind, Tensor as Torch};

struct Case {
    layer: Layer,
    x: &'static [i64],
}

fn cases() -> Vec<Case> {
    let sliding = |name, weight, stride: &[usize], padding: &[usize], dilation: &[usize], groups, x| {
        let geometry = Geometry {
            stride: stride.to_vec(),
            padding: padding.to_vec(),
            dilation: dilation.to_vec(),
            groups,
        };
        Case { layer: Layer::sliding(name, weight, &geometry, true).unwrap(), x }
    };
    let norm = |name: &str, form, x| Case {
        layer: Layer { name: name.into(), weight: vec![6], form, bias: true },
        x,
    };
    vec![
        sliding("linear", &[8, 6], &[1], &[0], &[1], 1, &[2, 3, 6]),
        sliding("linear, one row", &[8, 6], &[1], &[0], &[1], 1, &[6]),
        sliding("conv1d", &[8, 6, 3], &[2], &[1], &[1], 1, &[2, 6, 9]),
        // Large enough for the ways around dW that only pay off there.
        sliding("linear, wide", &[64, 96], &[1], &[0], &[1], 1, &[2, 3, 96]),
        sliding("conv1d, wide", &[64, 24, 3], &[1], &[1], &[1], 1, &[2, 24, 5]),
        sliding("conv2d", &[8, 6, 3, 3], &[1, 2], &[1, 0], &[1], 1, &[2, 6, 5, 7]),
        sliding("conv2d 1x1", &[8, 6, 1, 1], &[1], &[0], &[1], 1, &[2, 6, 3, 5]),
        sliding("conv2d dilated", &[8, 6, 3, 3], &[1], &[2], &[2], 1, &[2, 6, 6, 5]),
        sliding("conv2d grouped", &[8, 6, 3, 3], &[1], &[1], &[1], 2, &[2, 12, 5, 4]),
        sliding("conv3d", &[8, 6, 2, 3, 3], &[1, 2, 1], &[0, 1, 1], &[1], 1, &[1, 6, 3, 5, 4]),
        norm("layer norm", Form::LayerNorm { eps: 1e-5 }, &[2, 4, 6]),
        norm("rms norm", Form::RmsNorm { eps: 1e-6 }, &[2, 4, 6]),
        norm("group norm", Form::GroupNorm { groups: 3, eps: 1e-5 }, &[2, 6, 4, 3]),
    ]
}

pub(super) fn rule() -> Rule {
    Rule {
        dim: 4,
        alpha: 1.7,
        tucker: false,
        factor: -1,
        full_matrix: false,
        decompose_both: false,
        unbalanced_factorization: false,
        block_size: 2,
        nested: false,
        constraint: 0.0,
        rescaled: false,
        train_on_input: false,
        decompose: None,
        sig_type: Spectrum::Principal,
    }
}

/// The options that make a difference to an algorithm.
fn rules(algorithm: &str) -> Vec<Rule> {
    let plain = rule();
    let mut rules = vec![plain.clone(), Rule { dim: 3, block_size: 1, ..plain.clone() }];
    match algorithm {
        "lora" | "loha" | "lokr" => {
            let tucker = Rule { tucker: true, dim: 1, ..plain.clone() };
            rules.extend([tucker.clone(), Rule { dim: 2, ..tucker.clone() }]);
            rules.push(Rule { decompose: Some(true), ..plain.clone() });
            rules.extend([
                Rule { decompose: Some(false), ..plain.clone() },
                Rule { decompose: Some(true), ..tucker },
            ]);
        }
        "dylora" => rules.push(Rule { nested: true, ..plain.clone() }),
        "ia3" => rules.push(Rule { train_on_input: true, ..plain.clone() }),
        "diag-oft" | "boft" => {
            // BOFT has no blocks of 3.
            rules.pop();
            rules.push(Rule { rescaled: true, ..plain.clone() });
            rules.push(Rule { constraint: 1e-2, ..plain.clone() });
        }
        _ => {}
    }
    if algorithm == "lokr" {
        let thin = Rule { dim: 1, ..plain.clone() };
        rules.push(Rule { full_matrix: true, ..plain.clone() });
        rules.push(Rule { factor: 2, unbalanced_factorization: true, ..thin.clone() });
        rules.push(Rule { decompose_both: true, ..thin });
    }
    rules
}

/// One algorithm on one layer.
struct Subject {
    what: String,
    case: Case,
    module: Box<dyn Trainable>,
    parameters: Vec<Parameter>,
    weight: Torch,
}

fn subjects() -> Vec<Subject> {
    let mut all = Vec::new();
    for begin in TRAINED {
        for rule in rules(begin.names[0]) {
            for case in cases() {
                let formless = begin.names[0] == "tlora" && case.layer.large_kernel();
                if formless || case.layer.is_norm() != (begin.names[0] == "norm") {
                    continue;
                }
                let what = format!("{} on {}, {rule:?}", begin.names[0], case.layer.name);
                let weight = wave(&long(&case.layer.weight), 0.4);
                let start = weight.to_kind(Kind::Float);
                let module = super::begin(begin, &case.layer, &rule, Some(&start));
                let module = module.unwrap_or_else(|e| panic!("{what}: {e}"));
                let parameters = module.parameters();
                all.push(Subject { what, case, module, parameters, weight });
            }
        }
    }
    all
}

pub(super) fn wave(shape: &[i64], phase: f64) -> Torch {
    let n = shape.iter().product::<i64>();
    let values: Vec<f64> = (0..n).map(|i| (i as f64 * 1.37 + phase).sin() * 0.7 + 0.05).collect();
    Torch::from_slice(&values).reshape(shape)
}

impl Subject {
    /// Values of a parameter, f64: those it starts with where they are given, moved a little.
    fn values(&self, at: usize) -> Torch {
        let parameter = &self.parameters[at];
        let shape = long(&parameter.shape);
        // In training V = W + dW is near W. Where it almost vanishes, a length from squares and products has few digits.
        let size = if self.module.name().starts_with("DoRA") { 0.5 } else { 1.0 };
        let moved = wave(&shape, at as f64 + 0.2) * size;
        match &parameter.init {
            Init::Values(start) => {
                let start = Torch::from_slice(start).to_kind(Kind::Double).reshape(&shape);
                if parameter.frozen {
                    start
                } else {
                    start + moved * 0.3
                }
            }
            Init::Constant(value) if *value != 0.0 => moved * 0.3 + f64::from(*value),
            _ => moved,
        }
    }

    /// The parameters as they are stored, leaves of this dtype.
    fn leaves(&self, kind: Kind) -> Vec<Torch> {
        let leaf = |at: usize| {
            let parameter = &self.parameters[at];
            let mut values = self.values(at);
            for (axis, (&size, &stored)) in parameter.shape.iter().zip(&parameter.stored).enumerate() {
                let mut rest = values.size();
                rest[axis] = (stored - size) as i64;
                values =
                    Torch::cat(&[values, Torch::zeros(&rest, (Kind::Double, tch::Device::Cpu))], axis as i64);
            }
            values.to_kind(kind).set_requires_grad(!parameter.frozen)
        };
        (0..self.parameters.len()).map(leaf).collect()
    }

    fn pass<'a>(&'a self, parameters: &'a [Torch], weight: &'a Torch, draw: Option<&'a Draw>) -> Pass<'a> {
        Pass {
            layer: &self.case.layer,
            parameters,
            weight: Some(weight),
            draw,
            ranks: None,
            compute: weight.kind(),
        }
    }

    /// What [`Trainable::accumulate`] adds to zero; `None` for parameters that are frozen.
    fn gradients(&self, pass: &Pass, x: &Torch, grad_y: &Torch, want_input: bool) -> Gradients {
        tch::no_grad(|| {
            let into: Vec<Torch> = pass.parameters.iter().map(Torch::zeros_like).collect();
            let input = self.module.accumulate(pass, x, grad_y, want_input, &into).unwrap();
            let some = |(p, to): (&Parameter, Torch)| (!p.frozen).then_some(to);
            Gradients { parameters: self.parameters.iter().zip(into).map(some).collect(), input }
        })
    }

    /// A tensor in the shape of the layer's output.
    fn output(&self) -> Torch {
        let y = self.case.layer.apply(&wave(self.case.x, 3.0), &self.weight).unwrap();
        wave(&y.size(), 5.0)
    }
}

fn assert_close(what: &str, got: &Torch, want: &Torch, tolerance: f64) {
    assert_eq!(got.size(), want.size(), "{what}");
    let norm = |t: &Torch| t.to_kind(Kind::Double).norm().double_value(&[]);
    let (off, scale) = (norm(&(got - want)), norm(want));
    assert!(off <= tolerance * scale, "{what}: off by {off} of {scale}");
}

/// The loss is the output times a constant; its derivative along a direction is the gradient times that direction. Masks belong to the
/// formula: they are the same ones in each evaluation.
#[test]
fn gradients_are_those_of_differences() {
    let dropout = Dropout { values: 0.3, ranks: 0.3, modules: 0.0 };
    let draws = Draw::new(&Torch::from(3i64), 11, dropout);
    for subject in subjects() {
        for draw in [None, Some(&draws)] {
            let (leaves, x, grad_y) =
                (subject.leaves(Kind::Double), wave(subject.case.x, 3.0), subject.output());
            let pass = subject.pass(&leaves, &subject.weight, draw);
            let got = subject.gradients(&pass, &x, &grad_y, true);
            let without = subject.gradients(&pass, &x, &grad_y, false);
            assert!(without.input.is_none());
            // DyLoRA moves what it draws and holds the rest; differences move all.
            if subject.module.name() == "DyLoRA" && draw.is_some() {
                continue;
            }
            let tensors: Vec<Torch> = leaves.iter().map(|p| p.detach()).chain([x.copy()]).collect();
            let loss = |at: usize, direction: &Torch, by: f64| {
                tch::no_grad(|| {
                    let mut moved: Vec<Torch> = tensors.iter().map(Torch::copy).collect();
                    moved[at] += direction * by;
                    let (x, parameters) = moved.split_last().unwrap();
                    let pass = subject.pass(parameters, &subject.weight, draw);
                    (subject.module.forward(&pass, x).unwrap() * &grad_y).sum(Kind::Double).double_value(&[])
                })
            };
            let gradients: Vec<Option<&Torch>> =
                got.parameters.iter().map(Option::as_ref).chain([got.input.as_ref()]).collect();
            assert_eq!(gradients.len(), tensors.len(), "{}", subject.what);
            for (at, gradient) in gradients.iter().enumerate() {
                let frozen = subject.parameters.get(at).is_some_and(|p| p.frozen);
                assert_eq!(gradient.is_none(), frozen, "{}, tensor {at}", subject.what);
                let Some(gradient) = gradient else { continue };
                for phase in [0.3, 1.1, 2.6] {
                    // Only along the values: what is stored behind them never moves.
                    let mut direction = tensors[at].zeros_like();
                    let shape = subject.parameters.get(at).map_or(tensors[at].size(), |p| long(&p.shape));
                    let mut inner = direction.shallow_clone();
                    for (axis, &size) in shape.iter().enumerate() {
                        inner = inner.narrow(axis as i64, 0, size);
                    }
                    inner.copy_(&wave(&shape, phase));
                    direction = direction.contiguous();
                    let step = 1e-5;
                    let difference =
                        (loss(at, &direction, step) - loss(at, &direction, -step)) / (2.0 * step);
                    let product = (*gradient * &direction).sum(Kind::Double).double_value(&[]);
                    let scale = gradient.norm().double_value(&[]) * direction.norm().double_value(&[]);
                    // The third derivative leaves 1e-10, rounding of the losses 1e-16 / 1e-5 of their size.
                    assert!(
                        (difference - product).abs() <= 1e-7 * scale.max(1.0),
                        "{}, tensor {at}, draw {}: {product} but by differences {difference}",
                        subject.what,
                        draw.is_some(),
                    );
                }
            }
        }
    }
}

/// What is stored behind a parameter's values gets no gradient, so that it stays zero.
#[test]
fn padding_has_a_gradient_of_zero() {
    for subject in subjects() {
        let (leaves, x, grad_y) = (subject.leaves(Kind::Double), wave(subject.case.x, 3.0), subject.output());
        let pass = subject.pass(&leaves, &subject.weight, None);
        let got = subject.gradients(&pass, &x, &grad_y, false);
        for (parameter, gradient) in subject.parameters.iter().zip(&got.parameters) {
            let Some(gradient) = gradient else { continue };
            assert_eq!(gradient.size(), long(&parameter.stored), "{}", subject.what);
            let mut inner = gradient.shallow_clone();
            for (axis, &size) in parameter.shape.iter().enumerate() {
                inner = inner.narrow(axis as i64, 0, size as i64);
            }
            let square = |t: &Torch| t.square().sum(Kind::Double).double_value(&[]);
            assert!(square(&inner) > 0.0, "{}: `{}` has no gradient", subject.what, parameter.slot);
            assert_eq!(gradient.count_nonzero(None), inner.count_nonzero(None), "{}", subject.what);
        }
    }
}

/// fp32 beside the same in fp64.
#[test]
fn gradients_in_fp32_are_within_a_millionth() {
    for subject in subjects() {
        let run = |kind: Kind| {
            let (leaves, weight) = (subject.leaves(kind), subject.weight.to_kind(kind));
            let (x, grad_y) = (wave(subject.case.x, 3.0).to_kind(kind), subject.output().to_kind(kind));
            let pass = subject.pass(&leaves, &weight, None);
            subject.gradients(&pass, &x, &grad_y, true)
        };
        // As one vector: a single small one may be a difference of large sums.
        let all = |g: Gradients| {
            let flat = |t: &Torch| t.to_kind(Kind::Double).reshape([-1]);
            Torch::cat(&g.parameters.iter().flatten().chain(&g.input).map(flat).collect::<Vec<_>>(), 0)
        };
        // The stages of BOFT round one behind the other, and so do lengths and what they divide.
        let longer = ["BOFT", "DoRA"].iter().any(|name| subject.module.name().starts_with(name));
        let tolerance = if longer { 4e-6 } else { 1e-6 };
        assert_close(&subject.what, &all(run(Kind::Float)), &all(run(Kind::Double)), tolerance);
    }
}

/// W with the ops applied, by the CPU executor in fp32.
pub(super) fn merged(ops: &[Op], base: &Torch) -> Torch {
    let terms: Vec<Term> = ops.iter().map(|op| Term { op, strength: 1.0, slice: None }).collect();
    let mut weight = Vec::<f32>::try_from(base.to_kind(Kind::Float).reshape([-1])).unwrap();
    let mut merged = weight.clone();
    let sizes: Vec<usize> = base.size().iter().map(|&d| d as usize).collect();
    let view = |data: &mut Vec<f32>| {
        let (data, device, dtype) = (data.as_mut_ptr().cast(), Device::Cpu, crate::dtype::Dtype::F32);
        // SAFETY: the vectors hold as many elements as the shape and outlive the views.
        unsafe { View::from_raw(data, device, dtype, &sizes, None) }.unwrap()
    };
    let (from, out) = (view(&mut weight), view(&mut merged));
    cpu::merge("layer", &from, &out, &Storage::default(), &terms).unwrap();
    Torch::from_slice(&merged).to_kind(Kind::Double).reshape(base.size())
}

/// The tensors in a file's form, read and merged: W + dW.
#[test]
fn the_change_is_that_of_the_file() {
    for subject in subjects() {
        let name = &subject.case.layer.name;
        let mut group = Group::default();
        for (at, parameter) in subject.parameters.iter().enumerate().filter(|(_, p)| p.saved) {
            let values = subject.values(at).to_kind(Kind::Float).reshape([-1]);
            let tensor = Tensor::of_f32(Vec::<f32>::try_from(values).unwrap(), &parameter.shape);
            group.tensors.push((parameter.slot, tensor));
        }
        for (slot, value) in subject.module.constants() {
            group.tensors.push((slot, Tensor::of_f32(vec![value as f32], &[])));
        }
        let read = super::read(name, group).unwrap_or_else(|e| panic!("{}: {e}", subject.what));
        assert_eq!(family(read.name()), family(subject.module.name()));
        let ops = read.lower(name, &subject.case.layer.weight).unwrap();
        let leaves = subject.leaves(Kind::Double);
        let pass = subject.pass(&leaves, &subject.weight, None);
        let delta = tch::no_grad(|| subject.module.delta(&pass)).unwrap();
        // fp32 against fp64, and factors that the file's way computes in fp32 first.
        assert_close(&subject.what, &merged(&ops, &subject.weight), &(&subject.weight + delta), 2e-6);
        assert_eq!(read.changes().bias, subject.module.shift(&pass).is_some(), "{}", subject.what);
        if let Some(shift) = subject.module.shift(&pass) {
            let shift = shift.detach();
            let ops = read.lower_bias(name, &[shift.numel()]).unwrap();
            assert_close(&subject.what, &merged(&ops, &shift.zeros_like()), &shift, 1e-7);
        }
    }
}

/// Forward is the layer with dW for its weight, however an algorithm computes it.
#[test]
fn forward_is_the_layer_with_the_change() {
    for subject in subjects() {
        let (leaves, x) = (subject.leaves(Kind::Double), wave(subject.case.x, 3.0));
        let (pass, layer) = (subject.pass(&leaves, &subject.weight, None), &subject.case.layer);
        tch::no_grad(|| {
            let mut want = layer.apply(&x, &subject.module.delta(&pass).unwrap()).unwrap();
            if let Some(shift) = subject.module.shift(&pass) {
                want += shift.reshape(layer.channels(&want));
            }
            let got = subject.module.forward(&pass, &x).unwrap();
            assert_close(&subject.what, &got, &want, 1e-12);
            let base = wave(&want.size(), 7.0);
            let sum = base.copy();
            subject.module.add_forward(&pass, &x, &sum).unwrap();
            assert_close(&subject.what, &sum, &(base + want), 1e-12);
        });
    }
}

/// What chance leaves out does not depend on how a forward is computed.
#[test]
fn a_forward_around_the_change_leaves_out_the_same() {
    let draw = Draw::new(&Torch::from(3i64), 11, Dropout { values: 0.3, ranks: 0.3, modules: 0.0 });
    let around = ["loha", "lokr", "glora", "ia3"];
    for subject in subjects().iter().filter(|s| around.iter().any(|name| s.what.starts_with(name))) {
        let (leaves, x) = (subject.leaves(Kind::Double), wave(subject.case.x, 3.0));
        let pass = subject.pass(&leaves, &subject.weight, Some(&draw));
        let (got, want) = (subject.module.forward(&pass, &x), by_delta(&*subject.module, &pass, &x));
        assert_close(&subject.what, &got.unwrap().detach(), &want.unwrap().detach(), 1e-12);
    }
}

/// `shrunk` gives factors that make dW so much smaller.
#[test]
fn factors_shrink_the_change() {
    let mut some = 0;
    for subject in subjects() {
        let ratio = Torch::from(0.37f64);
        let Some(factors) = subject.module.shrunk(&ratio).unwrap() else { continue };
        let leaves = subject.leaves(Kind::Double);
        let smaller: Vec<Torch> = leaves.iter().zip(&factors).map(|(p, f)| p * f).collect();
        tch::no_grad(|| {
            let delta = |p: &[Torch]| subject.module.delta(&subject.pass(p, &subject.weight, None)).unwrap();
            assert_close(&subject.what, &delta(&smaller), &(delta(&leaves) * 0.37), 1e-9);
            let norm = subject.module.norm(&subject.pass(&leaves, &subject.weight, None)).unwrap();
            assert_close(&subject.what, &norm, &delta(&leaves).norm(), 1e-12);
        });
        some += 1;
    }
    assert!(some > 0);
}
