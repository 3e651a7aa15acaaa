//! Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), operation by operation as `transformers.optimization.Adafactor` computes it. With
//! relative_step the rate is a function of the step alone, the schedule `adafactor`.
//!
//! ```text
//! a = lr * max(eps2, rms(p))                              with scale_parameter, else lr
//! b = 1 - t^decay_rate
//! V: running mean of g^2 + eps1 with b, in rows and columns: factored.rs
//! u = g / sqrt(V)
//! u = a * u / max(1, rms(u) / clip_threshold)
//! m = b1 * m + (1 - b1) * u                               with beta1, else m = u
//! p = p - a * decay * p - m
//! ```

use super::factored::{clip, rms, Squares};
use super::options::{Check, ABOVE_0, AT_LEAST_0, FLAG, FRACTION, NEGATIVE, TWO_AT_LEAST_0};
use super::{given, mix, Layout, Now, Optimizer, Part, Rule, Run};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The numbers that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Added to the squares; and the least scale of a parameter.
    pub eps: (f64, f64),
    /// Largest root mean square of an update before the rate.
    pub clip_threshold: f64,
    /// Exponent of the step in the decay rate of the mean of squares.
    pub decay_rate: f64,
    /// Decay rate of a mean of the updates; none unless given.
    pub beta1: Option<f64>,
    /// Weight decay, multiplied by the rate.
    pub weight_decay: f64,
    /// Whether the rate is relative to the size of the parameter.
    pub scale_parameter: bool,
    /// Whether the rate follows from the step, instead of from learning_rate.
    pub relative_step: bool,
    /// Whether the relative step rises from 1e-6.
    pub warmup_init: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            eps: (1e-30, 1e-3),
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            weight_decay: 0.0,
            scale_parameter: true,
            relative_step: true,
            warmup_init: false,
        }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] = &[
    ("eps", TWO_AT_LEAST_0),
    ("clip_threshold", ABOVE_0),
    ("decay_rate", NEGATIVE),
    ("beta1", FRACTION),
    ("weight_decay", AT_LEAST_0),
    ("scale_parameter", FLAG),
    ("relative_step", FLAG),
    ("warmup_init", FLAG),
];

/// Adafactor and its state.
pub struct Adafactor {
    options: Options,
    runs: Vec<Run>,
    parts: Vec<Part>,
    squares: Squares,
    mean: Option<Tensor>,
}

impl Adafactor {
    /// Fresh state.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        let mean = options.beta1.map(|_| master.f_zeros_like()).transpose()?;
        let runs = layout.runs();
        let squares = Squares::new(&runs, true, master)?;
        Ok(Adafactor { options, runs, parts: layout.parts(), squares, mean })
    }
}

impl Optimizer for Adafactor {
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
        let o = self.options;
        // The count is 0 before a first update that counts, and 0 to this power no number.
        let fresh = now.finite(now.step.f_pow_tensor_scalar(o.decay_rate)?)?;
        for (index, run) in self.runs.iter().enumerate() {
            let (mut p, g) = (run.view(master)?, now.gradient(run.view(gradient)?)?);
            let mut rate = now.rate.f_mul(&now.share(run.factor)?)?;
            if o.scale_parameter {
                rate = rms(&p)?.f_clamp_min_(o.eps.1)?.f_mul_(&rate)?;
            }
            self.squares.update(index, &g.f_square()?.f_add_scalar_(o.eps.0)?, &fresh)?;
            let mut update = self.squares.inverse_root(index)?.f_mul_(&g)?;
            clip(&mut update, o.clip_threshold)?;
            let mut update = now.finite({ update }.f_mul_(&rate)?)?;
            if let (Some(mean), Some(b1)) = (&self.mean, o.beta1) {
                let mut m = run.view(mean)?;
                mix(&mut m, &update, &now.share(1.0 - b1)?)?;
                update = m;
            }
            if o.weight_decay != 0.0 {
                let decay = p.f_mul(&rate.f_mul_scalar(o.weight_decay)?)?;
                let _ = p.f_sub_(&decay)?;
            }
            let _ = p.f_sub_(&update)?;
        }
        Ok(())
    }

    fn state(&self) -> Vec<(&'static str, &Tensor)> {
        let mut state = self.squares.state(["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"]);
        state.extend(self.mean.as_ref().map(|mean| ("exp_avg", mean)));
        state
    }
}
