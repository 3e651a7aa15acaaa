//! T-LoRA: `dW = alpha / rank * (P diag(lambda) Q - P0 diag(lambda0) Q0)`, where P0, lambda0, Q0 are what training began with.
//!
//! Soboleva et al. 2025, arXiv:2507.05964; LyCORIS. The file holds the first three only. What training began with are by default the leading
//! singular vectors of the layer's own weight, so their product is the weight's nearest matrix of that rank and is taken from the weight
//! again. A file trained from a random matrix, or from the last or middle singular vectors, does not say so and cannot be told apart.
//! Training masks the ranks by the timestep; a prefix of the ranks is the state under that mask.
//!
//! | tensor | shape |
//! |---|---|
//! | `p_layer.weight` | O, r, 1.. |
//! | `q_layer.weight` | r, I, 1.. |
//! | `lambda_layer` | 1, r |

use super::{malformed, matrix, required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::{LowRank, Op, Principal};
use crate::view::Tensor;

const P: &str = "p_layer.weight";
const Q: &str = "q_layer.weight";
const LAMBDA: &str = "lambda_layer";

pub(super) const RECIPE: Recipe =
    Recipe { name: "T-LoRA", marks: &[P, Q, LAMBDA], knows: &[P, Q, LAMBDA, ALPHA], read };

/// One module.
#[derive(Debug, Clone)]
struct Tlora {
    p: Tensor,
    q: Tensor,
    lambda: Tensor,
    alpha_tensor: Option<Tensor>,
    alpha: Option<f32>,
    rank: usize,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let (p, q) = (required(module, group, P)?.clone(), required(module, group, Q)?.clone());
    let lambda = required(module, group, LAMBDA)?.clone();
    let rank = lambda.count();
    let flat = |shape: &[usize]| shape.len() >= 2 && shape[2..].iter().all(|&d| d == 1);
    if !flat(p.shape()) || !flat(q.shape()) || p.shape()[1] != rank || q.shape()[0] != rank {
        let what = format!(
            "P {:?}, Q {:?} and lambda {:?} do not fit together",
            p.shape(),
            q.shape(),
            lambda.shape()
        );
        return Err(malformed(module, what));
    }
    let (alpha_tensor, alpha) = super::alpha(module, group)?;
    Ok(Box::new(Tlora { p, q, lambda, alpha_tensor, alpha, rank }))
}

impl Algorithm for Tlora {
    fn name(&self) -> &'static str {
        "T-LoRA"
    }

    fn rank(&self) -> Option<usize> {
        Some(self.rank)
    }

    fn alpha(&self) -> Option<f32> {
        self.alpha
    }

    fn shape(&self) -> Option<Vec<usize>> {
        Some([&[self.p.shape()[0]], &self.q.shape()[1..]].concat())
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let shape = self.shape().unwrap_or_default();
        super::fit(module, &shape, target)?;
        let scale = super::scale(self.alpha, self.rank);
        let q = matrix(module, &self.q, self.rank)?;
        let lambda = self.lambda.to_f32(module)?;
        let p = self.p.to_f32(module)?;
        let up = p.iter().enumerate().map(|(i, p)| p * lambda[i % self.rank]).collect();
        let up = Tensor::of_f32(up, &[shape[0], self.rank]);
        Ok(vec![
            Op::LowRank(LowRank { up, down: q, scale }),
            Op::Principal(Principal { rank: self.rank, scale: -scale }),
        ])
    }

    fn prefix(&self, module: &str, rank: usize) -> Option<Result<Box<dyn Algorithm>>> {
        let rank = rank.clamp(1, self.rank);
        let cut = || {
            let (p, lambda) = (super::columns(module, &self.p, rank)?, self.lambda.reshape(&[1, self.rank]));
            let lambda = lambda.ok_or_else(|| malformed(module, "a factor is not contiguous"))?;
            let lambda = super::columns(module, &lambda, rank)?;
            let q = self.q.rows(0..rank).ok_or_else(|| malformed(module, "a factor is not contiguous"))?;
            // A mask leaves alpha / rank of the whole as it is.
            let alpha = (super::scale(self.alpha, self.rank) * rank as f64) as f32;
            let alpha_tensor = Some(Tensor::of_f32(vec![alpha], &[]));
            Ok::<Box<dyn Algorithm>, _>(Box::new(Tlora {
                p,
                q,
                lambda,
                alpha_tensor,
                alpha: Some(alpha),
                rank,
            }))
        };
        Some(cut())
    }

    fn note(&self) -> Option<String> {
        let note = "read as trained from the leading singular vectors of the model's own weights, which the file does not say";
        Some(note.to_owned())
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors = vec![(P, &self.p), (Q, &self.q), (LAMBDA, &self.lambda)];
        tensors.extend(self.alpha_tensor.as_ref().map(|t| (ALPHA, t)));
        tensors
    }
}
