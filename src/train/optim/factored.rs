//! A running mean of squares that keeps one number per row and column of a matrix (Shazeer & Stern 2018, arXiv:1804.04235), as Adafactor
//! and CAME need it. With more than two axes the last two are the matrix, one for every index before them.
//!
//! ```text
//! rows = b * rows + (1 - b) * mean over columns of x
//! cols = b * cols + (1 - b) * mean over rows of x
//! 1 / sqrt(estimate) = 1 / sqrt(rows / mean(rows)) * 1 / sqrt(cols)
//! ```
//!
//! A parameter of one axis keeps every mean. Parameters of one shape are computed as one.

use super::{mix, Run};
use crate::error::Result;
use tch::{Kind, Tensor};

/// The means of all parameters, those of a kind in one flat tensor.
pub struct Squares {
    rows: Tensor,
    cols: Tensor,
    whole: Tensor,
    places: Vec<Place>,
}

/// Where the means of a run lie.
struct Place {
    /// Of the run.
    shape: Vec<i64>,
    /// In `rows`, or in `whole`.
    first: i64,
    /// In `cols`, for a matrix.
    second: Option<i64>,
}

impl Place {
    fn rows(&self) -> &[i64] {
        &self.shape[..self.shape.len() - 1]
    }

    fn cols(&self) -> Vec<i64> {
        let n = self.shape.len();
        [&self.shape[..n - 2], &self.shape[n - 1..]].concat()
    }
}

fn count(shape: &[i64]) -> i64 {
    shape.iter().product()
}

impl Squares {
    /// Means of zero; `whole` says whether parameters of one axis have any.
    pub fn new(runs: &[Run], whole: bool, master: &Tensor) -> Result<Self> {
        let (mut places, mut ends) = (Vec::new(), [0i64; 3]);
        for run in runs {
            let (shape, matrix) = (run.shape(), run.matrix());
            let place = if matrix {
                Place { shape, first: ends[0], second: Some(ends[1]) }
            } else {
                Place { shape, first: ends[2], second: None }
            };
            if matrix {
                ends[0] += count(place.rows());
                ends[1] += count(&place.cols());
            } else if whole {
                ends[2] += count(&place.shape);
            }
            places.push(place);
        }
        let zeros = |length: i64| Tensor::f_zeros([length], (Kind::Float, master.device()));
        Ok(Squares { rows: zeros(ends[0])?, cols: zeros(ends[1])?, whole: zeros(ends[2])?, places })
    }

    /// Takes the new values x of run `index` into the mean: `share` is 1 - b, on the device.
    pub fn update(&self, index: usize, x: &Tensor, share: &Tensor) -> Result<()> {
        let place = &self.places[index];
        let (rows, cols) = self.views(place)?;
        let Some(mut cols) = cols else {
            return mix(&mut { rows }, x, share);
        };
        for (mean, axis) in [(&mut { rows }, -1i64), (&mut cols, -2)] {
            mix(mean, &x.f_mean_dim([axis].as_slice(), false, None::<Kind>)?, share)?;
        }
        Ok(())
    }

    /// 1 / sqrt of the estimate of run `index`, in its shape.
    pub fn inverse_root(&self, index: usize) -> Result<Tensor> {
        let place = &self.places[index];
        let (rows, cols) = self.views(place)?;
        let Some(cols) = cols else { return Ok(rows.f_rsqrt()?) };
        let mean = rows.f_mean_dim([-1i64].as_slice(), true, None::<Kind>)?;
        let rows = rows.f_div(&mean)?.f_rsqrt_()?.f_unsqueeze(-1)?;
        Ok(rows.f_mul(&cols.f_unsqueeze(-2)?.f_rsqrt()?)?)
    }

    fn views(&self, place: &Place) -> Result<(Tensor, Option<Tensor>)> {
        let view = |flat: &Tensor, offset: i64, shape: &[i64]| -> Result<Tensor> {
            Ok(flat.f_narrow(0, offset, count(shape))?.f_view_(shape)?)
        };
        Ok(match place.second {
            Some(second) => {
                (view(&self.rows, place.first, place.rows())?, Some(view(&self.cols, second, &place.cols())?))
            }
            None => (view(&self.whole, place.first, &place.shape)?, None),
        })
    }

    /// For a resume file, under the given names; empty ones are left out.
    pub fn state(&self, names: [&'static str; 3]) -> Vec<(&'static str, &Tensor)> {
        let tensors = [&self.rows, &self.cols, &self.whole];
        names.into_iter().zip(tensors).filter(|(_, tensor)| tensor.numel() > 0).collect()
    }
}

/// The root of each parameter's mean square, on the device; the first axis is that of the parameters.
pub fn rms(run: &Tensor) -> Result<Tensor> {
    let axes: Vec<i64> = (1..run.dim() as i64).collect();
    let count = run.numel() as f64 / run.size()[0] as f64;
    Ok(run.f_norm_scalaropt_dim(2, &axes[..], true)?.f_div_scalar(count.sqrt())?)
}

/// Scales each parameter's update down to the given root mean square, if it has more.
pub fn clip(update: &mut Tensor, threshold: f64) -> Result<()> {
    let excess = rms(update)?.f_div_scalar(threshold)?.f_clamp_min_(1.0)?;
    let _ = update.f_div_(&excess)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Layout;
    use super::*;

    fn wave(shape: &[i64]) -> Tensor {
        let n = shape.iter().product::<i64>();
        (Tensor::arange(n, (Kind::Float, tch::Device::Cpu)).sin() + 1.5).reshape(shape)
    }

    #[test]
    fn an_outer_product_and_a_vector_are_kept_whole() {
        let layout = Layout::of(&[&[3, 5], &[3, 5], &[4], &[2, 3, 1, 4]], 58);
        let squares = Squares::new(&layout.runs(), true, &wave(&[58])).unwrap();
        let outer = wave(&[2, 3, 1]) * wave(&[2, 1, 5]);
        let outers = wave(&[1, 2, 3, 1, 1]) * wave(&[1, 2, 3, 1, 4]);
        for (index, x) in [outer, wave(&[1, 4]), outers].iter().enumerate() {
            // Two updates with one value: b * (1 - b) + (1 - b) of it.
            squares.update(index, x, &Tensor::from(0.5)).unwrap();
            squares.update(index, x, &Tensor::from(0.5)).unwrap();
            let off = squares.inverse_root(index).unwrap() * (x * 0.75).sqrt() - 1.0;
            assert_eq!(off.size(), x.size());
            assert!(off.abs().max().double_value(&[]) < 1e-6, "{index}");
        }
        let lengths =
            squares.state(["rows", "cols", "whole"]).iter().map(|(_, t)| t.numel()).collect::<Vec<_>>();
        assert_eq!(lengths, [2 * 3 + 6, 2 * 5 + 24, 4]);
        let matrices = Squares::new(&Layout::of(&[&[3, 5]], 15).runs(), true, &wave(&[15])).unwrap();
        assert_eq!(matrices.state(["rows", "cols", "whole"]).len(), 2);
    }

    #[test]
    fn an_update_is_scaled_down_but_not_up() {
        let mut update = Tensor::cat(&[wave(&[1, 10]), wave(&[1, 10]) * 0.01], 0);
        let small = update.get(1).copy();
        clip(&mut update, 0.25).unwrap();
        assert!((rms(&update).unwrap().double_value(&[0, 0]) - 0.25).abs() < 1e-6);
        assert_eq!(update.get(1), small);
        let before = update.copy();
        clip(&mut update, 1.0).unwrap();
        assert_eq!(update, before);
    }
}
