//! BOFT: butterfly stages of block rotations, one after the other, over the output channels; then `rescale`.
//!
//! Liu et al. 2023, arXiv:2311.06243; LyCORIS. `oft_blocks` [m, n, b, b] (or `oft_diag`, the rotations themselves): stage i turns groups of b
//! channels; with `k = 2^i * b / 2`, position t of the groups holds channel `(t / 2k) * 2k + (t % 2) * k + (t % 2k) / 2`. R as in
//! [`super::oft`] (the constraint holds over all stages together), here not transposed. The strength s turns each stage into
//! `s * R + (1 - s) * I` and the rescaling into `1 + s * (rescale - 1)`.

use super::oft::{fit_rows, per_row, rotations, RESCALE};
use super::{malformed, Algorithm};
use crate::error::Result;
use crate::merge::ops::{Op, Rotate, Stage};
use crate::view::Tensor;

/// One BOFT module.
#[derive(Debug)]
struct Boft {
    /// As the file has them.
    tensors: Vec<(&'static str, Tensor)>,
    /// [m, n, b, b]
    blocks: Tensor,
    /// Whether the blocks are the rotations themselves.
    direct: bool,
    rescale: Option<Tensor>,
    constraint: Option<f32>,
}

/// A module whose `oft_blocks` have four axes.
pub(super) fn new(
    module: &str,
    tensors: Vec<(&'static str, Tensor)>,
    blocks: &Tensor,
    direct: bool,
    rescale: Option<Tensor>,
    constraint: Option<f32>,
) -> Result<Box<dyn Algorithm>> {
    let &[m, n, b, c] = blocks.shape() else { return Err(malformed(module, "four axes were expected")) };
    // The last stage must find partners within the weight: its step is 2^(m - 1) * b channels.
    let reach = u32::try_from(m - 1).ok().and_then(|m| 1usize.checked_shl(m)).and_then(|p| p.checked_mul(b));
    let fits = b == c && b % 2 == 0 && reach.is_some_and(|reach| (n * b) % reach == 0);
    if !fits {
        let what = format!(
            "blocks {:?} are no butterfly [m, n, b, b], b even, n * b a multiple of 2^(m-1) * b",
            blocks.shape()
        );
        return Err(malformed(module, what));
    }
    Ok(Box::new(Boft { tensors, blocks: blocks.clone(), direct, rescale, constraint }))
}

impl Algorithm for Boft {
    fn name(&self) -> &'static str {
        "BOFT"
    }

    /// The constraint stands in its place.
    fn alpha(&self) -> Option<f32> {
        self.constraint
    }

    fn shape(&self) -> Option<Vec<usize>> {
        None
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let (n, b) = (self.blocks.shape()[1], self.blocks.shape()[2]);
        let rows = n * b;
        fit_rows(module, rows, target)?;
        let values = match self.direct {
            true => self.blocks.to_f32(module)?.into_iter().map(f64::from).collect(),
            false => rotations(module, &self.blocks, self.constraint, rows)?,
        };
        let stages = values.chunks_exact(n * b * b).enumerate().map(|(i, values)| {
            let blocks = Tensor::of_f32(values.iter().map(|&v| v as f32).collect(), &[n, b, b]);
            let k = (1 << i) * b / 2;
            let order = (0..rows).map(|t| t / (2 * k) * 2 * k + t % 2 * k + t % (2 * k) / 2).collect();
            Stage { blocks: vec![blocks], order: Some(order) }
        });
        let stages = stages.collect();
        let rescale = per_row(module, RESCALE, self.rescale.as_ref(), rows)?;
        Ok(vec![Op::Rotate(Rotate { stages, rescale, axis: 0, interpolate: true })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (*name, tensor)).collect()
    }
}
