//! The few primitives that every algorithm comes down to, on a target seen as a matrix W [O, C], C = I * kernel.
//!
//! The executors (`cpu.rs`, `torch.rs`) know these and nothing of algorithms.

use crate::error::{Error, Result};
use crate::view::{Slice, Tensor};
use std::ops::Range;

/// What one module does to one weight.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Op {
    /// Adds a product of two thin matrices.
    LowRank(LowRank),
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
