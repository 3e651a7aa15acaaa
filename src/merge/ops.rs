//! The few primitives that every algorithm comes down to, on a target seen as a matrix W [O, C], C = I * kernel.
//!
//! The executors (`cpu.rs`, `torch.rs`) know these and nothing of algorithms.

use crate::view::{Slice, Tensor};

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
