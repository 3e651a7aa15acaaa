//! LoHa: `dW = alpha / rank * (w1_a @ w1_b) o (w2_a @ w2_b)`, o elementwise.
//!
//! FedPara: Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS. With Tucker cores each of the two products is
//! `R[p, q, k] = sum_ij t[i, j, k] a[i, p] b[j, q]`.
//!
//! | tensor | Linear | conv | conv with Tucker cores |
//! |---|---|---|---|
//! | `hada_w1_a`, `hada_w2_a` | O, r | O, r | r, O |
//! | `hada_w1_b`, `hada_w2_b` | r, I | r, I * kernel | r, I |
//! | `hada_t1`, `hada_t2` | | | r, r, kernel |

use super::{malformed, required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::{Hadamard, Op};
use crate::view::Tensor;

const A: [&str; 2] = ["hada_w1_a", "hada_w2_a"];
const B: [&str; 2] = ["hada_w1_b", "hada_w2_b"];
const T: [&str; 2] = ["hada_t1", "hada_t2"];

pub(super) const RECIPE: Recipe = Recipe {
    name: "LoHa",
    marks: &[A[0], B[0], A[1], B[1]],
    knows: &[A[0], B[0], A[1], B[1], T[0], T[1], ALPHA],
    read,
};

/// One LoHa module.
#[derive(Debug)]
struct Loha {
    a: [Tensor; 2],
    b: [Tensor; 2],
    /// Both or none.
    cores: Option<[Tensor; 2]>,
    alpha_tensor: Option<Tensor>,
    alpha: Option<f32>,
    rank: usize,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let get = |names: [&str; 2]| {
        Ok::<_, crate::error::Error>([
            required(module, group, names[0])?.clone(),
            required(module, group, names[1])?.clone(),
        ])
    };
    let (a, b) = (get(A)?, get(B)?);
    let cores = (group.get(T[0]).is_some() || group.get(T[1]).is_some()).then(|| get(T)).transpose()?;
    let rank = b[0].shape()[0];
    let rank_axis = if cores.is_some() { 0 } else { 1 };
    for i in 0..2 {
        let fits = a[i].shape().len() == 2
            && b[i].shape().len() >= 2
            && a[i].shape()[rank_axis] == rank
            && b[i].shape()[0] == rank
            && a[i].shape() == a[0].shape()
            && b[i].shape() == b[0].shape();
        let core_fits = cores.as_ref().is_none_or(|t| {
            t[i].shape().len() > 2 && t[i].shape()[..2] == [rank, rank] && t[i].shape() == t[0].shape()
        });
        if !fits || !core_fits {
            let core = cores.as_ref().map(|t| format!(", core {:?}", t[i].shape())).unwrap_or_default();
            let what = format!(
                "factors of rank {rank} do not fit together: {:?}, {:?}{core}",
                a[i].shape(),
                b[i].shape()
            );
            return Err(malformed(module, what));
        }
    }
    let (alpha_tensor, alpha) = super::alpha(module, group)?;
    Ok(Box::new(Loha { a, b, cores, alpha_tensor, alpha, rank }))
}

impl Algorithm for Loha {
    fn name(&self) -> &'static str {
        "LoHa"
    }

    fn rank(&self) -> Option<usize> {
        Some(self.rank)
    }

    fn alpha(&self) -> Option<f32> {
        self.alpha
    }

    fn shape(&self) -> Option<Vec<usize>> {
        let [a, b] = [self.a[0].shape(), self.b[0].shape()];
        Some(match &self.cores {
            Some(t) => [&[a[1], b[1]], &t[0].shape()[2..]].concat(),
            None => [&[a[0]], &b[1..]].concat(),
        })
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let shape = self.shape().unwrap_or_default();
        super::fit(module, &shape, target)?;
        let pair = |i: usize| match &self.cores {
            Some(t) => Ok((super::transposed(module, &self.a[i])?, super::fold(module, &t[i], &self.b[i])?)),
            None => Ok((
                super::matrix(module, &self.a[i], shape[0])?,
                super::matrix(module, &self.b[i], self.rank)?,
            )),
        };
        let pairs = [pair(0), pair(1)].into_iter().collect::<Result<Vec<_>>>()?;
        let pairs = pairs.try_into().map_err(|_| malformed(module, "needs two pairs of factors"))?;
        Ok(vec![Op::Hadamard(Hadamard { pairs, scale: super::scale(self.alpha, self.rank) })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors =
            vec![(A[0], &self.a[0]), (B[0], &self.b[0]), (A[1], &self.a[1]), (B[1], &self.b[1])];
        if let Some(t) = &self.cores {
            tensors.extend([(T[0], &t[0]), (T[1], &t[1])]);
        }
        tensors.extend(self.alpha_tensor.as_ref().map(|t| (ALPHA, t)));
        tensors
    }
}
