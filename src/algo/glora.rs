//! GLoRA: `dW = alpha / rank * (W @ a1 @ a2 + b1 @ b2)`, the first product along the input channels.
//!
//! Chavan et al. 2023, arXiv:2306.07967; LyCORIS.
//!
//! | tensor | now | before May 2024: `dW = scale * ((W @ a2) @ a1 + b2 @ b1)` |
//! |---|---|---|
//! | `a1.weight` | I, r | r, I |
//! | `a2.weight` | r, I | I, r |
//! | `b1.weight` | O, r | r, I |
//! | `b2.weight` | r, I, kernel | O, r |
//!
//! The shapes tell the two apart, those of the factors or else the weight's. Where the weight fits both (a square one, at full rank) it is the
//! present layout, and the report says so.

use super::{malformed, matrix, required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::{LowRank, Op, RightLowRank};
use crate::view::Tensor;

const NAMES: [&str; 4] = ["a1.weight", "a2.weight", "b1.weight", "b2.weight"];

pub(super) const RECIPE: Recipe =
    Recipe { name: "GLoRA", marks: &NAMES, knows: &[NAMES[0], NAMES[1], NAMES[2], NAMES[3], ALPHA], read };

/// One GLoRA module.
#[derive(Debug)]
struct Glora {
    /// As the file has them.
    tensors: Vec<(&'static str, Tensor)>,
    /// The ways to read the factors, the likelier first.
    readings: Vec<Reading>,
    alpha: Option<f32>,
}

/// The factors in the order of the present layout.
#[derive(Debug)]
struct Reading {
    /// [I, r], [r, I]
    a: [Tensor; 2],
    /// [O, r], [r, I, kernel..]
    b: [Tensor; 2],
    rank: usize,
}

impl Reading {
    fn of([a1, a2, b1, b2]: [&Tensor; 4]) -> Option<Self> {
        let rank = rank_of(a1.shape(), a2.shape(), b1.shape(), b2.shape())?;
        Some(Reading { a: [a1.clone(), a2.clone()], b: [b1.clone(), b2.clone()], rank })
    }

    fn shape(&self) -> Vec<usize> {
        [&[self.b[0].shape()[0]], &self.b[1].shape()[1..]].concat()
    }
}

/// Rank of four factors in the present layout: a1 [I, r], a2 [r, I], b1 [O, r], b2 [r, I, ..].
fn rank_of(a1: &[usize], a2: &[usize], b1: &[usize], b2: &[usize]) -> Option<usize> {
    let thin = |shape: &[usize]| shape.len() >= 2 && shape[2..].iter().all(|&d| d == 1);
    let fits = thin(a1) && thin(a2) && thin(b1) && b2.len() >= 2;
    let rank = fits.then(|| a2[0])?;
    (a1[1] == rank && b1[1] == rank && b2[0] == rank && a1[0] == a2[1] && b2[1] == a1[0]).then_some(rank)
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let [a1, a2, b1, b2] = NAMES.map(|name| required(module, group, name));
    let (a1, a2, b1, b2) = (a1?, a2?, b1?, b2?);
    let both = [Reading::of([a1, a2, b1, b2]), Reading::of([a2, a1, b2, b1])];
    let mut readings: Vec<Reading> = both.into_iter().flatten().collect();
    // A rank above the width is possible, and unlikely.
    readings.sort_by_key(|r| r.rank > r.a[0].shape()[0]);
    if readings.is_empty() {
        let shapes: Vec<_> = [a1, a2, b1, b2].iter().map(|t| t.shape()).collect();
        return Err(malformed(module, format!("a1, a2, b1, b2 do not fit together: {shapes:?}")));
    }
    let (alpha_tensor, alpha) = super::alpha(module, group)?;
    let own = group.tensors.iter().filter(|(name, _)| *name != ALPHA).cloned();
    let tensors = own.chain(alpha_tensor.map(|t| (ALPHA, t))).collect();
    Ok(Box::new(Glora { tensors, readings, alpha }))
}

impl Algorithm for Glora {
    fn name(&self) -> &'static str {
        "GLoRA"
    }

    fn rank(&self) -> Option<usize> {
        self.readings.first().map(|r| r.rank)
    }

    fn alpha(&self) -> Option<f32> {
        self.alpha
    }

    fn shape(&self) -> Option<Vec<usize>> {
        self.readings.first().map(Reading::shape)
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let fits = |r: &&Reading| super::fit(module, &r.shape(), target).is_ok();
        let Some(Reading { a, b, rank }) = self.readings.iter().find(fits) else {
            return super::fit(module, &self.shape().unwrap_or_default(), target).map(|()| Vec::new());
        };
        let scale = super::scale(self.alpha, *rank);
        let [a1, a2] = [matrix(module, &a[0], a[0].shape()[0])?, matrix(module, &a[1], *rank)?];
        let [up, down] = [matrix(module, &b[0], b[0].shape()[0])?, matrix(module, &b[1], *rank)?];
        Ok(vec![Op::RightLowRank(RightLowRank { a1, a2, scale }), Op::LowRank(LowRank { up, down, scale })])
    }

    fn note(&self) -> Option<String> {
        (self.readings.len() > 1).then(|| {
            let note = "both GLoRA layouts fit the factors; the weight's shape decides, and where it fits both it is W @ a1 @ a2 + b1 @ b2";
            note.to_owned()
        })
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (*name, tensor)).collect()
    }
}

#[cfg(feature = "torch")]
pub(super) use training::BEGIN;

/// The same formula in training. Both parts are low ranks, `(W @ a1) @ a2` and `b1 @ b2`, so neither dW nor a second product with W is needed.
#[cfg(feature = "torch")]
mod training {
    use super::{ALPHA, NAMES};
    use crate::algo::training::{by_delta, scaled, Begin, Init, Layer, Parameter, Pass, Rule, Trainable};
    use crate::error::Result;
    use tch::Tensor;

    pub(in crate::algo) const BEGIN: Begin =
        Begin { names: &["glora"], new: |layer, rule, _| Ok(Box::new(Training::new(layer, rule))) };

    /// A GLoRA module in training.
    #[derive(Debug)]
    struct Training {
        weight: Vec<usize>,
        rank: usize,
        alpha: f64,
    }

    impl Training {
        fn new(layer: &Layer, rule: &Rule) -> Self {
            Training { weight: layer.weight.clone(), rank: rule.dim, alpha: rule.alpha }
        }

        /// alpha / rank * W @ a1 as [O, r, kernel..].
        fn turned(&self, pass: &Pass) -> Result<Tensor> {
            let (base, a1) = (pass.base()?, &pass.parameters[0]);
            let rank = a1.size()[1];
            let flat = base.f_reshape([self.weight[0] as i64, self.weight[1] as i64, -1])?;
            let a1 = self.scaled(&a1.f_reshape([-1, rank])?)?;
            let mut shape = pass.shape();
            shape[1] = rank;
            Ok(Tensor::f_einsum("oik,ir->ork", &[flat, a1], None::<i64>)?.f_reshape(shape)?)
        }

        fn scaled(&self, t: &Tensor) -> Result<Tensor> {
            scaled(t, self.alpha / self.rank as f64)
        }
    }

    impl Trainable for Training {
        fn name(&self) -> &'static str {
            "GLoRA"
        }

        fn rank(&self) -> Option<usize> {
            Some(self.rank)
        }

        fn constants(&self) -> Vec<(&'static str, f64)> {
            vec![(ALPHA, self.alpha)]
        }

        fn parameters(&self) -> Vec<Parameter> {
            let (outputs, inputs, kernel) = (self.weight[0], self.weight[1], &self.weight[2..]);
            let (rank, point) = (self.rank, vec![1; kernel.len()]);
            // The factors that start at zero read the input. LoRA+ raises the others: they read the ranks, as `up` does.
            let left = |slot, rows: usize| {
                let shape = [&[rows, rank], &point[..]].concat();
                Parameter::new(slot, &shape, Init::kaiming(&shape)).ranked(1).plus()
            };
            let right = |slot, kernel: &[usize]| {
                Parameter::new(slot, &[&[rank, inputs], kernel].concat(), Init::ZEROS).ranked(0)
            };
            let [a1, a2, b1, b2] = NAMES;
            vec![left(a1, inputs), right(a2, &point), left(b1, outputs), right(b2, kernel)]
        }

        fn needs_weight(&self) -> bool {
            true
        }

        fn delta(&self, pass: &Pass) -> Result<Tensor> {
            let [a2, b1, b2] = [1, 2, 3].map(|i| &pass.parameters[i]);
            let (outputs, rank) = (self.weight[0] as i64, a2.size()[0]);
            let (turned, a2) =
                (self.turned(pass)?.f_reshape([outputs, rank, -1])?, a2.f_reshape([rank, -1])?);
            let a = Tensor::f_einsum("ork,ri->oik", &[turned, a2], None::<i64>)?;
            let b = self.scaled(&b1.f_reshape([-1, rank])?)?.f_matmul(&b2.f_reshape([rank, -1])?)?;
            Ok(a.f_reshape(pass.shape())?.f_add(&b.f_reshape(pass.shape())?)?)
        }

        fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor> {
            let layer = pass.layer;
            if layer.groups() > 1 {
                // a2 and b2 belong to all groups alike: only dW itself has the groups' shape.
                return by_delta(self, pass, x);
            }
            let [a2, b1, b2] = [1, 2, 3].map(|i| &pass.parameters[i]);
            let a = layer.apply(&layer.pointwise(x, a2)?, &self.turned(pass)?)?;
            let b = layer.pointwise(&layer.apply(x, b2)?, &self.scaled(b1)?)?;
            pass.dropped(a.f_add(&b)?)
        }
    }
}
