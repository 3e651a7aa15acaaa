//! What a module adds to its weight, as thin factors where that is exact, else as the whole matrix.
//!
//! | primitive | thin factors | rank |
//! |---|---|---|
//! | up @ down | themselves | r |
//! | (u1 @ d1) o (u2 @ d2) | columns u1_i o u2_j, rows d1_i o d2_j | r1 r2 |
//! | kron(w1, w2) | kron of the factors of w1 and of w2 | rank(w1) rank(w2) |
//! | diff | none | |

use crate::adapter::Module;
use crate::dtype::{Dtype, Float};
use crate::error::{Error, Result};
use crate::linalg::{self, Matrix};
use crate::merge::cpu;
use crate::merge::ops::{Op, Term};
use crate::view::{Device, Tensor, View};

/// Both factors of a product.
pub type Pair = (Matrix, Matrix);

/// The tensor as a matrix.
pub fn matrix(module: &str, tensor: &Tensor) -> Result<Matrix> {
    let rows = tensor.shape().first().copied().unwrap_or(1);
    Ok(Matrix::new(tensor.to_f32(module)?, rows, tensor.count() / rows.max(1)))
}

/// The dtype in which a module's results are kept when nobody asks for another: that of its tensors, f32 where they differ or have 8 bits.
pub fn float_of<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Float {
    let mut floats = tensors.filter(|t| t.count() > 1).filter_map(|t| Float::of(t.dtype()));
    let first = floats.next().unwrap_or(Float::F32);
    if floats.all(|f| f == first) && !first.is_eight_bits() {
        first
    } else {
        Float::F32
    }
}

/// A module's shape as the tools write it: of all that is known of it the one with a kernel.
pub fn shape_of(module: &Module) -> Result<Vec<usize>> {
    module.algorithm.shape().ok_or_else(|| Error::Unsupported {
        what: format!("`{}`: {} does not tell the shape of its weight", module.name, module.algorithm.name()),
        hint: String::new(),
    })
}

/// The op's size as a matrix.
pub fn size(op: &Op) -> Option<[usize; 2]> {
    let of = |t: &Tensor, axis: usize| t.shape().get(axis).copied().unwrap_or(1);
    Some(match op {
        Op::LowRank(op) => [of(&op.up, 0), of(&op.down, 1)],
        Op::Hadamard(op) => [of(&op.pairs[0].0, 0), of(&op.pairs[0].1, 1)],
        Op::Kron(op) => [of(&op.w1, 0) * of(&op.w2, 0), of(&op.w1, 1) * of(&op.w2, 1)],
        Op::Dense(op) => [of(&op.diff, 0), of(&op.diff, 1)],
        _ => return None,
    })
}

/// The ranks of a LoKr's two halves, as its factors bound them.
pub fn kron_ranks(module: &Module, w1: &Tensor, w2: &Tensor) -> [usize; 2] {
    let tensors = module.algorithm.tensors();
    let bound = |inner: &str, half: &Tensor| {
        let factors =
            tensors.iter().find(|(slot, _)| *slot == inner).and_then(|(_, t)| t.shape().first().copied());
        half.shape().iter().copied().chain(factors).min().unwrap_or(1)
    };
    [bound("lokr_w1_b", w1), bound("lokr_w2_b", w2)]
}

/// The rank of the exact thin factors; `None` where the op has none.
pub fn exact_rank(module: &Module, op: &Op) -> Option<usize> {
    let rank = |t: &Tensor| t.shape().get(1).copied().unwrap_or(1);
    Some(match op {
        Op::LowRank(op) => rank(&op.up),
        Op::Hadamard(op) => rank(&op.pairs[0].0).checked_mul(rank(&op.pairs[1].0))?,
        Op::Kron(op) => {
            let [one, two] = kron_ranks(module, &op.w1, &op.w2);
            one.checked_mul(two)?
        }
        _ => return None,
    })
}

/// The exact thin factors, of [`exact_rank`] ranks, without the op's scale.
pub fn factors(module: &Module, op: &Op) -> Result<Pair> {
    let name = &module.name;
    match op {
        Op::LowRank(op) => Ok((matrix(name, &op.up)?, matrix(name, &op.down)?)),
        Op::Hadamard(op) => {
            let [(u1, d1), (u2, d2)] = &op.pairs;
            let (u1, d1, u2, d2) =
                (matrix(name, u1)?, matrix(name, d1)?, matrix(name, u2)?, matrix(name, d2)?);
            let (r1, r2) = (u1.cols, u2.cols);
            let mut up = Vec::with_capacity(u1.rows * r1 * r2);
            for (a, b) in u1.values.chunks_exact(r1).zip(u2.values.chunks_exact(r2)) {
                a.iter().for_each(|x| up.extend(b.iter().map(|y| x * y)));
            }
            let mut down = Vec::with_capacity(d1.cols * r1 * r2);
            for a in d1.values.chunks_exact(d1.cols) {
                for b in d2.values.chunks_exact(d2.cols) {
                    down.extend(a.iter().zip(b).map(|(x, y)| x * y));
                }
            }
            Ok((Matrix::new(up, u1.rows, r1 * r2), Matrix::new(down, r1 * r2, d1.cols)))
        }
        Op::Kron(op) => {
            let ranks = kron_ranks(module, &op.w1, &op.w2);
            let one = thin(name, matrix(name, &op.w1)?, ranks[0])?;
            let two = thin(name, matrix(name, &op.w2)?, ranks[1])?;
            Ok((kron(&one.0, &two.0), kron(&one.1, &two.1)))
        }
        _ => Err(Error::Backend(format!("`{name}`: {op:?} has no thin factors"))),
    }
}

/// A matrix of this rank as a product; of full rank it is its own factor.
fn thin(name: &str, a: Matrix, rank: usize) -> Result<Pair> {
    if rank >= a.rows.min(a.cols) {
        let one = identity(rank);
        return Ok(if a.rows <= a.cols { (one, a) } else { (a, one) });
    }
    let (up, down, _) = linalg::svd(&a).ok_or_else(|| not_finite(name))?;
    Ok((columns(&up, rank), rows(&down, rank)))
}

/// The first rows.
pub fn rows(a: &Matrix, count: usize) -> Matrix {
    Matrix::new(a.values[..count * a.cols].to_vec(), count, a.cols)
}

/// The first columns.
pub fn columns(a: &Matrix, count: usize) -> Matrix {
    let values = a.values.chunks_exact(a.cols.max(1)).flat_map(|row| &row[..count]).copied().collect();
    Matrix::new(values, a.rows, count)
}

fn identity(n: usize) -> Matrix {
    let values = (0..n * n).map(|at| if at / n == at % n { 1.0 } else { 0.0 }).collect();
    Matrix::new(values, n, n)
}

/// `out[u * c + p, v * d + q] = a[u, v] b[p, q]`
pub fn kron(a: &Matrix, b: &Matrix) -> Matrix {
    let mut values = Vec::with_capacity(a.values.len() * b.values.len());
    for row in a.values.chunks_exact(a.cols.max(1)) {
        for inner in b.values.chunks_exact(b.cols.max(1)) {
            row.iter().for_each(|x| values.extend(inner.iter().map(|y| x * y)));
        }
    }
    Matrix::new(values, a.rows * b.rows, a.cols * b.cols)
}

/// The sum of terms on a weight of this shape, as a matrix: on the pristine `base`, or on nothing where no term reads it.
pub fn sum(name: &str, shape: &[usize], terms: &[Term<'_>], base: Option<&Tensor>) -> Result<Matrix> {
    let rows = shape.first().copied().unwrap_or(1);
    let count: usize = shape.iter().product();
    let start = base.map(|base| base.to_f32(name)).transpose()?;
    let pristine = Tensor::of_f32(start.clone().unwrap_or_else(|| vec![0f32; count]), shape);
    let mut values = vec![0f32; count];
    // SAFETY: the view shows `values`, which is neither moved nor touched until the merge is done.
    let out = unsafe { View::from_raw(values.as_mut_ptr().cast(), Device::Cpu, Dtype::F32, shape, None)? };
    cpu::merge(name, pristine.view(), &out, &Default::default(), terms)?;
    if let Some(start) = start {
        values.iter_mut().zip(&start).for_each(|(v, w)| *v -= w);
    }
    Ok(Matrix::new(values, rows, count / rows.max(1)))
}

/// A module with a value that is no number.
pub fn not_finite(name: &str) -> Error {
    Error::Key {
        key: name.to_owned(),
        file: None,
        what: "holds a value that is not finite".into(),
        hint: "the file is damaged, or its training diverged".into(),
    }
}
