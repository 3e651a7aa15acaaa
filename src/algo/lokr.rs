//! LoKr: `dW = scale * kron(w1, w2)`, that is `dW[u * c + p, v * d + q, k] = scale * w1[u, v] * w2[p, q, k]`.
//!
//! LyCORIS (KronA: Edalati et al. 2022, arXiv:2212.10650). Either half is whole or a product of thin factors; the shapes in the file decide, and
//! a factorisation is never guessed.
//!
//! | tensor | shape |
//! |---|---|
//! | `lokr_w1`, or `lokr_w1_a` @ `lokr_w1_b` | a, b, or a, r and r, b |
//! | `lokr_w2`, or `lokr_w2_a` @ `lokr_w2_b` | c, d, kernel, or c, r and r, d * kernel |
//! | with a Tucker core `lokr_t2` | r, r, kernel; `lokr_w2_a` r, c and `lokr_w2_b` r, d: `w2[p, q, k] = sum_ij t2[i, j, k] a[i, p] b[j, q]` |
//!
//! scale = alpha / r, of w2's factors or else of w1's. With both halves whole there is no r: the scale is 1 whatever alpha says (LyCORIS writes an
//! alpha of no meaning then); PEFT's is alpha / r of its configuration also then.

use super::{malformed, required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::{Kron, Op};
use crate::view::Tensor;

const W1: [&str; 3] = ["lokr_w1", "lokr_w1_a", "lokr_w1_b"];
const W2: [&str; 3] = ["lokr_w2", "lokr_w2_a", "lokr_w2_b"];
const T2: &str = "lokr_t2";

pub(super) const RECIPE: Recipe = Recipe {
    name: "LoKr",
    marks: &[W1[0], W1[1], W1[2], W2[0], W2[1], W2[2]],
    knows: &[W1[0], W1[1], W1[2], W2[0], W2[1], W2[2], T2, ALPHA],
    read,
};

/// One LoKr module.
#[derive(Debug)]
struct Lokr {
    /// As the file has them.
    tensors: Vec<(&'static str, Tensor)>,
    /// [a, b]
    w1: Tensor,
    /// [c, d * kernel]
    w2: Tensor,
    /// d, kernel
    inner: Vec<usize>,
    /// Of the thin factors; `None` when both halves are whole.
    rank: Option<usize>,
    alpha: Option<f32>,
    /// The scale when both halves are whole.
    whole_scale: f64,
}

/// One half: as a matrix, the shape behind its rows, and the rank of its factors.
struct Half {
    matrix: Tensor,
    inner: Vec<usize>,
    rank: Option<usize>,
}

fn half(module: &str, group: &Group, names: [&str; 3], core: Option<&Tensor>) -> Result<Half> {
    let [whole, a, b] = names;
    if group.get(whole).is_some() {
        if let Some(extra) = [a, b].into_iter().find(|name| group.get(name).is_some()) {
            return Err(malformed(module, format!("both `{whole}` and `{extra}` are there")));
        }
        let tensor = required(module, group, whole)?;
        let Some((&rows, inner)) = tensor.shape().split_first().filter(|(_, inner)| !inner.is_empty()) else {
            return Err(malformed(
                module,
                format!("`{whole}` must have two axes or more, it is {:?}", tensor.shape()),
            ));
        };
        return Ok(Half { matrix: super::matrix(module, tensor, rows)?, inner: inner.to_vec(), rank: None });
    }
    if group.get(a).is_none() && group.get(b).is_none() {
        return Err(malformed(module, format!("neither `{whole}` nor `{a}` and `{b}` are there")));
    }
    let (left, right) = (required(module, group, a)?, required(module, group, b)?);
    let shapes = || format!("`{a}` {:?}, `{b}` {:?}", left.shape(), right.shape());
    let rank = right.shape()[0];
    if left.shape().len() != 2 || right.shape().len() < 2 {
        return Err(malformed(module, format!("factors must have two axes: {}", shapes())));
    }
    let (left, right, inner) = match core {
        Some(core) => {
            let inner = [&[right.shape()[1]], core.shape().get(2..).unwrap_or(&[])].concat();
            (super::transposed(module, left)?, super::fold(module, core, right)?, inner)
        }
        None => (left.clone(), super::matrix(module, right, rank)?, right.shape()[1..].to_vec()),
    };
    if left.shape()[1] != right.shape()[0] {
        return Err(malformed(module, format!("factors of different rank: {}", shapes())));
    }
    Ok(Half { matrix: product(module, &left, &right)?, inner, rank: Some(rank) })
}

/// left @ right, in f64, rounded once.
fn product(module: &str, left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let (rows, rank, cols) = (left.shape()[0], left.shape()[1], right.shape()[1]);
    let (left, right) = (left.to_f32(module)?, right.to_f32(module)?);
    let mut out = vec![0f64; rows * cols];
    for (out, left) in out.chunks_exact_mut(cols).zip(left.chunks_exact(rank)) {
        for (&l, right) in left.iter().zip(right.chunks_exact(cols)) {
            out.iter_mut().zip(right).for_each(|(o, &r)| *o += f64::from(l) * f64::from(r));
        }
    }
    Ok(Tensor::of_f32(out.into_iter().map(|v| v as f32).collect(), &[rows, cols]))
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let core = group.get(T2).is_some().then(|| required(module, group, T2)).transpose()?;
    if core.is_some() && group.get(W2[0]).is_some() {
        return Err(malformed(module, format!("both `{}` and `{T2}` are there", W2[0])));
    }
    let (one, two) = (half(module, group, W1, None)?, half(module, group, W2, core)?);
    let rank = two.rank.or(one.rank);
    // Without a rank alpha means nothing; LyCORIS' 100000 is infinite in an fp16 file.
    let (alpha_tensor, alpha) = match rank {
        Some(_) => super::alpha(module, group)?,
        None => (group.get(ALPHA).cloned(), None),
    };
    let own = group.tensors.iter().filter(|(name, _)| *name != ALPHA).cloned();
    let tensors = own.chain(alpha_tensor.map(|t| (ALPHA, t))).collect();
    let whole_scale = group.config.as_ref().and_then(|c| c.scale(module)).unwrap_or(1.0);
    Ok(Box::new(Lokr { tensors, w1: one.matrix, w2: two.matrix, inner: two.inner, rank, alpha, whole_scale }))
}

impl Algorithm for Lokr {
    fn name(&self) -> &'static str {
        "LoKr"
    }

    fn rank(&self) -> Option<usize> {
        self.rank
    }

    fn alpha(&self) -> Option<f32> {
        self.alpha
    }

    fn shape(&self) -> Option<Vec<usize>> {
        let (rows, b) = (self.w1.shape()[0] * self.w2.shape()[0], self.w1.shape()[1]);
        Some(match self.inner.split_first() {
            Some((d, kernel)) => [&[rows, b * d], kernel].concat(),
            None => vec![rows, b],
        })
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let ([a, b], c) = ([self.w1.shape()[0], self.w1.shape()[1]], self.w2.shape()[0]);
        // A w2 of thin factors is flattened in the file: its columns are d * kernel, and only the weight tells the kernel.
        let kernel = target.get(2..).unwrap_or(&[]);
        let taps: usize = kernel.iter().product();
        let shape = match self.inner.as_slice() {
            [cols] if taps > 1 && cols % taps == 0 => [&[a * c, b * (cols / taps)], kernel].concat(),
            [d, own @ ..] => [&[a * c, b * d], own].concat(),
            [] => vec![a * c, b],
        };
        super::fit(module, &shape, target)?;
        let scale = self.rank.map_or(self.whole_scale, |rank| super::scale(self.alpha, rank));
        Ok(vec![Op::Kron(Kron { w1: self.w1.clone(), w2: self.w2.clone(), scale })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (*name, tensor)).collect()
    }
}
