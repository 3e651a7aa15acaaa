//! Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682, algorithm 1), operation by operation as
//! `schedulefree.AdamWScheduleFree` 1.4.1 computes it.
//!
//! ```text
//! lr = lr * min(1, t / warmup_steps)
//! v = b2 * v + (1 - b2) * g^2
//! u = g / (sqrt(v / (1 - b2^t)) + eps) + decay * y
//! y, z, x from lr and u: schedule_free.rs
//! ```

use super::options::{Check, AT_LEAST_0, BETAS_OF_AVERAGE, FINITE, WHOLE};
use super::schedule_free::Average;
use super::{Layout, Optimizer, Rule};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The numbers that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// How near gradients are taken to the average; decay rate of the running mean of g^2.
    pub betas: (f64, f64),
    /// Added to the root.
    pub eps: f64,
    /// Weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// Steps of a linear rise of the rate, which begins above 0.
    pub warmup_steps: u64,
    /// Exponent of the step in the average's weights.
    pub r: f64,
    /// Exponent of the learning rate in the average's weights.
    pub weight_lr_power: f64,
}

impl Default for Options {
    fn default() -> Self {
        let betas = (0.9, 0.999);
        Options { betas, eps: 1e-8, weight_decay: 0.0, warmup_steps: 0, r: 0.0, weight_lr_power: 2.0 }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] = &[
    ("betas", BETAS_OF_AVERAGE),
    ("eps", AT_LEAST_0),
    ("weight_decay", AT_LEAST_0),
    ("warmup_steps", WHOLE),
    ("r", FINITE),
    ("weight_lr_power", AT_LEAST_0),
];

/// AdamWScheduleFree and its state.
pub struct AdamWScheduleFree {
    options: Options,
    average: Average,
    square: Tensor,
}

impl AdamWScheduleFree {
    /// Fresh state.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        let average = Average::new(options.betas.0, options.r, options.weight_lr_power, layout, master)?;
        Ok(AdamWScheduleFree { options, average, square: master.f_zeros_like()? })
    }
}

impl Optimizer for AdamWScheduleFree {
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        step: u64,
    ) -> Result<()> {
        let Options { betas: (_, b2), eps, weight_decay, warmup_steps, .. } = self.options;
        let rise = if step <= warmup_steps { step as f64 / warmup_steps as f64 } else { 1.0 };
        let (square, correction) = (&self.square, 1.0 - b2.powf(step as f64));
        self.average.step((master, gradient), (learning_rate * rise, weight_decay), step, |part, g| {
            let mut v = part.of(square)?;
            let _ = v.f_mul_scalar_(b2)?.f_addcmul_(&g.f_mul_scalar(1.0 - b2)?, g)?;
            let _ = g.f_div_(&v.f_div_scalar(correction)?.f_sqrt_()?.f_add_scalar_(eps)?)?;
            Ok(())
        })
    }

    fn rule(&self) -> Option<Rule<'_>> {
        let Options { betas, eps, weight_decay, warmup_steps, r, weight_lr_power } = self.options;
        let numbers = vec![betas.0, r, weight_lr_power, betas.1, eps, weight_decay, warmup_steps as f64];
        Some(self.average.rule("adamw_schedule_free", numbers, &self.square))
    }

    fn averaged(&self, master: &Tensor) -> Result<Option<Tensor>> {
        self.average.averaged(master).map(Some)
    }

    fn restart(&mut self, master: &Tensor) -> Result<()> {
        self.average.restart(master)
    }

    fn state(&self) -> Vec<(&'static str, &Tensor)> {
        let mut state = self.average.state();
        state.push(("exp_avg_sq", &self.square));
        state
    }
}
