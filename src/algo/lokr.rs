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
    w1: Half,
    w2: Half,
    /// Of the thin factors; `None` when both halves are whole.
    rank: Option<usize>,
    alpha: Option<f32>,
}

/// One half of the product. Thin factors stay thin until a weight bounds their size.
#[derive(Debug)]
struct Half {
    factors: Factors,
    rows: usize,
    /// The shape behind the rows: columns, kernel; for w2's flattened factors one number.
    inner: Vec<usize>,
    rank: Option<usize>,
}

#[derive(Debug)]
enum Factors {
    Whole(Tensor),
    /// [rows, r] and [r, columns..]
    Thin(Tensor, Tensor),
    /// [r, rows], [r, r, kernel..] and [r, columns]
    Core(Tensor, Tensor, Tensor),
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
        let factors = Factors::Whole(super::matrix(module, tensor, rows)?);
        return Ok(Half { factors, rows, inner: inner.to_vec(), rank: None });
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
    let [rows, own] = match core {
        Some(_) => [left.shape()[1], left.shape()[0]],
        None => [left.shape()[0], left.shape()[1]],
    };
    if own != rank {
        return Err(malformed(module, format!("factors of different rank: {}", shapes())));
    }
    let (left, right) = (left.clone(), right.clone());
    let (factors, inner) = match core {
        Some(core) => {
            if core.shape().len() < 3 || core.shape()[..2] != [rank, rank] {
                let what = format!("`{T2}` {:?} is no core of rank {rank}: {}", core.shape(), shapes());
                return Err(malformed(module, what));
            }
            let inner = [&[right.shape()[1]], &core.shape()[2..]].concat();
            (Factors::Core(left, core.clone(), right), inner)
        }
        None => {
            let inner = right.shape()[1..].to_vec();
            (Factors::Thin(left, super::matrix(module, &right, rank)?), inner)
        }
    };
    Ok(Half { factors, rows, inner, rank: Some(rank) })
}

impl Half {
    /// The half as a matrix.
    fn matrix(&self, module: &str) -> Result<Tensor> {
        match &self.factors {
            Factors::Whole(matrix) => Ok(matrix.clone()),
            Factors::Thin(left, right) => product(module, left, right),
            Factors::Core(left, core, right) => {
                product(module, &super::transposed(module, left)?, &super::fold(module, core, right)?)
            }
        }
    }
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
    let (mut w1, w2) = (half(module, group, W1, None)?, half(module, group, W2, core)?);
    let rank = w2.rank.or(w1.rank);
    let mut tensors: Vec<_> = group.tensors.iter().filter(|(name, _)| *name != ALPHA).cloned().collect();
    let (alpha_tensor, alpha) = match (rank, group.config.as_ref().and_then(|c| c.scale(module))) {
        (Some(_), _) => super::alpha(module, group)?,
        // Without a rank alpha means nothing; LyCORIS' 100000 is infinite in an fp16 file.
        (None, None | Some(1.0)) => {
            let own = group.get(ALPHA).filter(|t| t.count() == 1);
            let float = own.filter(|t| crate::dtype::Float::wide(t.dtype()).is_some()).cloned();
            let number = || own.and_then(|t| t.scalar()).map(|v| Tensor::of_f32(vec![v as f32], &[]));
            (float.or_else(number), None)
        }
        // PEFT's scale has no other place in the tensors than a half itself. The alpha beside it tells readers that none is missing.
        (None, Some(scale)) => {
            let whole = w1.matrix(module)?;
            let values = whole.to_f32(module)?.into_iter().map(|v| (f64::from(v) * scale) as f32).collect();
            let whole = Tensor::of_f32(values, whole.shape());
            tensors.iter_mut().filter(|(name, _)| *name == W1[0]).for_each(|(_, t)| *t = whole.clone());
            w1.factors = Factors::Whole(whole);
            (Some(Tensor::of_f32(vec![1.0], &[])), None)
        }
    };
    tensors.extend(alpha_tensor.map(|t| (ALPHA, t)));
    Ok(Box::new(Lokr { tensors, w1, w2, rank, alpha }))
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
        let (rows, b) = (self.w1.rows.checked_mul(self.w2.rows)?, self.w1.inner.first()?);
        Some(match self.w2.inner.split_first() {
            Some((d, kernel)) => [&[rows, b.checked_mul(*d)?], kernel].concat(),
            None => vec![rows, *b],
        })
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let mut shape = self.shape().unwrap_or_default();
        // A w2 of thin factors is flattened in the file: its columns are d * kernel, and only the weight tells the kernel.
        let kernel = target.get(2..).unwrap_or(&[]);
        let taps: usize = kernel.iter().product();
        if let ([cols], [_, wide]) = (&self.w2.inner[..], &mut shape[..]) {
            if taps > 1 && cols % taps == 0 {
                *wide /= taps;
                shape.extend(kernel);
            }
        }
        super::fit(module, &shape, target)?;
        let scale = self.rank.map_or(1.0, |rank| super::scale(self.alpha, rank));
        Ok(vec![Op::Kron(Kron { w1: self.w1.matrix(module)?, w2: self.w2.matrix(module)?, scale })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (*name, tensor)).collect()
    }
}
