//! The few primitives that every algorithm comes down to, on a target seen as a matrix W [O, C], C = I * kernel.
//!
//! The executors (`cpu.rs`, `torch.rs`) know these and nothing of algorithms.

use crate::error::{Error, Result};
use crate::view::{Slice, Tensor};
use std::ops::Range;

/// What one module does to one weight. `s` is the user's strength.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Op {
    /// Adds a product of two thin matrices.
    LowRank(LowRank),
    /// Adds the elementwise product of two such products.
    Hadamard(Hadamard),
    /// Adds a Kronecker product.
    Kron(Kron),
    /// Adds a whole matrix.
    Dense(Dense),
    /// Multiplies rows or input channels.
    Scale(Scale),
}

/// `W += s * scale * up @ down`
#[derive(Debug, Clone)]
pub struct LowRank {
    /// [O, r]
    pub up: Tensor,
    /// [r, C]
    pub down: Tensor,
    /// The file's own factor, alpha / rank.
    pub scale: f64,
}

/// `W += s * scale * (up1 @ down1) o (up2 @ down2)`
#[derive(Debug, Clone)]
pub struct Hadamard {
    /// Two pairs of [O, r] and [r, C].
    pub pairs: [(Tensor, Tensor); 2],
    /// The file's own factor, alpha / rank.
    pub scale: f64,
}

/// `W += s * scale * kron(w1, w2)`, O = a * c, C = b * d
#[derive(Debug, Clone)]
pub struct Kron {
    /// [a, b]
    pub w1: Tensor,
    /// [c, d]
    pub w2: Tensor,
    /// The file's own factor.
    pub scale: f64,
}

/// `W += s * diff`
#[derive(Debug, Clone)]
pub struct Dense {
    /// [O, C]
    pub diff: Tensor,
}

/// `W += s * W o v`, v along an axis of the weight
#[derive(Debug, Clone)]
pub struct Scale {
    /// [O] or [I]
    pub v: Tensor,
    /// 0: one value per row; 1: one per input channel.
    pub axis: usize,
}

/// One op at one strength on all of a target or on a slice of it.
#[derive(Debug, Clone, Copy)]
pub struct Term<'a> {
    /// What to do.
    pub op: &'a Op,
    /// The user's number.
    pub strength: f64,
    /// Where, if not everywhere.
    pub slice: Option<Slice>,
}

/// The part of a weight that a slice names, as a shape and in the weight's matrix.
#[derive(Debug)]
pub struct Region {
    /// Shape of the part.
    pub shape: Vec<usize>,
    /// Its rows.
    pub rows: Range<usize>,
    /// Its columns.
    pub cols: Range<usize>,
}

impl Region {
    /// Checks `slice` against the weight's shape; `None` is all of it.
    pub fn of(name: &str, weight: &[usize], slice: Option<Slice>) -> Result<Self> {
        let mut shape = weight.to_vec();
        let (mut rows, mut cols) =
            (0..weight.first().copied().unwrap_or(1), 0..weight.iter().skip(1).product());
        if let Some(Slice { axis, start, len }) = slice {
            let size = weight.get(axis).copied().unwrap_or(0);
            let end = start.checked_add(len).filter(|&end| axis < 2 && axis < weight.len() && end <= size);
            let Some(end) = end else {
                return Err(Error::argument(
                    format!("`{name}`: a slice of {len} from {start} along axis {axis} is outside a weight of shape {weight:?}"),
                    "slices are ranges of axis 0 (rows) or 1 (input channels)",
                ));
            };
            shape[axis] = len;
            let kernel: usize = weight.iter().skip(2).product();
            match axis {
                0 => rows = start..end,
                _ => cols = start * kernel..end * kernel,
            }
        }
        Ok(Region { shape, rows, cols })
    }
}

impl Term<'_> {
    /// The user's number times the file's own factor, as the executors compute with it.
    pub fn coefficient(&self, name: &str) -> Result<f32> {
        let scale = match self.op {
            Op::LowRank(op) => op.scale,
            Op::Hadamard(op) => op.scale,
            Op::Kron(op) => op.scale,
            Op::Dense(_) | Op::Scale(_) => 1.0,
        };
        let product = (self.strength * scale) as f32;
        match product.is_finite() {
            true => Ok(product),
            false => Err(Error::argument(
                format!("`{name}`: strength {} times the file's scale {scale} is beyond fp32", self.strength),
                "1 is the usual strength",
            )),
        }
    }
}
