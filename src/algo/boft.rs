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

#[cfg(feature = "torch")]
pub(super) use training::BEGIN;

/// The same formula in training: every stage adds `(R_i - I)` of what the stages before it made of W.
#[cfg(feature = "torch")]
mod training {
    use crate::algo::oft::training::Training;
    use crate::algo::training::{Begin, Layer, Rule, Trainable};
    use crate::error::{Error, Result};
    use tch::Tensor;

    pub(in crate::algo) const BEGIN: Begin = Begin { names: &["boft"], new };

    fn new(layer: &Layer, rule: &Rule, _: Option<&Tensor>) -> Result<Box<dyn Trainable>> {
        let (outputs, name, dim) = (layer.weight[0], &layer.name, rule.dim);
        let Some((size, count)) = butterfly(outputs, dim) else {
            let what = format!(
                "`{name}`: BOFT needs blocks of an even size, up to {dim}, and a power of two of them: {outputs} outputs have none"
            );
            let leave = "leave the layer out: algo none for its name in name_algo_map";
            let hint = match outputs % 2 {
                // The odd part of the number, doubled.
                0 => format!(
                    "set network_dim to {} or more, or {leave}",
                    2 * (outputs >> outputs.trailing_zeros())
                ),
                _ => format!("no size divides an odd number; {leave}"),
            };
            return Err(Error::argument(what, hint));
        };
        // As many as it takes for every channel to meet every other.
        let stages = count.trailing_zeros() as usize + 1;
        Ok(Box::new(Training::new("BOFT", layer, rule, &[stages, count, size, size], turned)))
    }

    /// (size, number) of the blocks: the largest even size up to `dim` of which a power of two makes up the outputs.
    fn butterfly(outputs: usize, dim: usize) -> Option<(usize, usize)> {
        let fits = |size: &usize| outputs % size == 0 && (outputs / size).is_power_of_two();
        let size = (1..=dim.min(outputs) / 2).rev().map(|half| 2 * half).find(fits)?;
        Some((size, outputs / size))
    }

    /// What the stages add to the weight.
    fn turned(turns: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let (size, cols) = (turns.size()[2], weight.size()[1]);
        let mut sum = weight.f_zeros_like()?;
        for stage in 0..turns.size()[0] {
            let k = (1 << stage) * size / 2;
            // Channel h * k + j of 2k stands at position 2j + h.
            let rows = weight.f_add(&sum)?.f_reshape([-1, 2, k, cols])?.f_transpose(1, 2)?;
            let added = turns.f_select(0, stage)?.f_bmm(&rows.f_reshape([-1, size, cols])?)?;
            let added = added.f_reshape([-1, k, 2, cols])?.f_transpose(1, 2)?;
            sum = sum.f_add(&added.f_reshape(weight.size())?)?;
        }
        Ok(sum)
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::algo::training_tests::rule;
        use crate::merge::bypass::Geometry;

        #[test]
        fn an_impossible_size_names_the_smallest_that_works() {
            let begin = |outputs, dim| {
                let layer = Layer::sliding("layer", &[outputs, 4], &Geometry::default(), false).unwrap();
                new(&layer, &Rule { dim, ..rule() }, None)
            };
            for (outputs, least) in [(1280, 10), (640, 10), (3072, 6), (9216, 18), (11008, 86), (6, 6)] {
                assert!(begin(outputs, least).is_ok());
                let error = begin(outputs, least - 1).unwrap_err();
                assert!(error.hint().contains(&format!("network_dim to {least} or more")), "{error:?}");
            }
            let error = begin(77, 77).unwrap_err();
            assert!(error.hint().contains("odd") && !error.hint().contains("network_dim"), "{error:?}");
        }

        #[test]
        fn blocks_are_those_of_lycoris() {
            // lycoris.functional.general.power2factorization 4.1.3 and boft_m of its module.
            for (outputs, dim, want) in
                [(320, 16, [6, 32, 10]), (1280, 64, [6, 32, 40]), (3072, 8, [10, 512, 6]), (8, 9, [1, 1, 8])]
            {
                let (size, count) = butterfly(outputs, dim).unwrap();
                assert_eq!([count.trailing_zeros() as usize + 1, count, size], want);
            }
        }
    }
}
