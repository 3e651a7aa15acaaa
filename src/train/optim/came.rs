//! CAME (Luo et al. 2023, arXiv:2307.02047, algorithm 2), operation by operation as `came_pytorch.CAME` 0.1.3 computes it: Adafactor whose
//! mean of updates is divided by how far the updates stray from it.
//!
//! ```text
//! V: running mean of g^2 + eps1 with b2, in rows and columns: factored.rs
//! u = g / sqrt(V)
//! u = u / max(1, rms(u) / clip_threshold)
//! m = b1 * m + (1 - b1) * u
//! S: running mean of (u - m)^2 + eps2 with b3, in rows and columns
//! p = p - lr * decay * p - lr * m / sqrt(S)               a parameter of one axis: - lr * m
//! ```

use super::factored::{clip, Squares};
use super::options::{Check, ABOVE_0, AT_LEAST_0, THREE_FRACTIONS, TWO_AT_LEAST_0};
use super::{given, mix, Layout, Now, Optimizer, Part, Rule, Run};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The numbers that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Decay rates of the means of updates, of squares and of deviations.
    pub betas: (f64, f64, f64),
    /// Added to the squares and to the squares of deviations.
    pub eps: (f64, f64),
    /// Largest root mean square of an update before the rate.
    pub clip_threshold: f64,
    /// Weight decay, multiplied by the rate.
    pub weight_decay: f64,
}

impl Default for Options {
    fn default() -> Self {
        Options { betas: (0.9, 0.999, 0.9999), eps: (1e-30, 1e-16), clip_threshold: 1.0, weight_decay: 0.0 }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] = &[
    ("betas", THREE_FRACTIONS),
    ("eps", TWO_AT_LEAST_0),
    ("clip_threshold", ABOVE_0),
    ("weight_decay", AT_LEAST_0),
];

/// CAME and its state.
pub struct CAME {
    options: Options,
    runs: Vec<Run>,
    parts: Vec<Part>,
    mean: Tensor,
    squares: Squares,
    deviations: Squares,
}

impl CAME {
    /// Fresh state.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        let runs = layout.runs();
        let (squares, deviations) = (Squares::new(&runs, true, master)?, Squares::new(&runs, false, master)?);
        Ok(CAME { options, runs, parts: layout.parts(), mean: master.f_zeros_like()?, squares, deviations })
    }
}

impl Optimizer for CAME {
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        step: u64,
    ) -> Result<()> {
        self.pass(master, gradient, &Now::of(learning_rate, step, master)?)
    }

    fn rule(&self) -> Option<Rule<'_>> {
        Some(given(&self.parts))
    }

    fn pass(&mut self, master: &Tensor, gradient: &Tensor, now: &Now) -> Result<()> {
        let Options { betas: (b1, b2, b3), eps, clip_threshold, weight_decay } = self.options;
        for (index, run) in self.runs.iter().enumerate() {
            let (mut p, mut m) = (run.view(master)?, run.view(&self.mean)?);
            let g = now.gradient(run.view(gradient)?)?;
            let rate = now.rate.f_mul(&now.share(run.factor)?)?;
            self.squares.update(index, &g.f_square()?.f_add_scalar_(eps.0)?, &now.share(1.0 - b2)?)?;
            let mut update = self.squares.inverse_root(index)?.f_mul_(&g)?;
            clip(&mut update, clip_threshold)?;
            let mut update = now.finite(update)?;
            mix(&mut m, &update, &now.share(1.0 - b1)?)?;
            let direction = if run.matrix() {
                let deviation = update.f_sub_(&m)?.f_square_()?.f_add_scalar_(eps.1)?;
                self.deviations.update(index, &deviation, &now.share(1.0 - b3)?)?;
                now.finite(self.deviations.inverse_root(index)?.f_mul_(&m)?)?
            } else {
                m
            };
            if weight_decay != 0.0 {
                let decay = p.f_mul(&rate.f_mul_scalar(weight_decay)?)?;
                let _ = p.f_sub_(&decay)?;
            }
            let _ = p.f_sub_(&direction.f_mul(&rate)?)?;
        }
        Ok(())
    }

    fn state(&self) -> Vec<(&'static str, &Tensor)> {
        let mut state = vec![("exp_avg", &self.mean)];
        state.extend(self.squares.state(["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"]));
        state.extend(self.deviations.state(["exp_avg_res_row", "exp_avg_res_col", "exp_avg_res"]));
        state
    }
}
