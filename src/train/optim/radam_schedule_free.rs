//! Schedule-free RAdam (Defazio et al. 2024, arXiv:2405.15682, with the rectification of Liu et al. 2019, arXiv:1908.03265), operation by
//! operation as `schedulefree.RAdamScheduleFree` 1.4.1 computes it. The rectified rate rises by itself, so there is no warm-up to choose.
//!
//! ```text
//! R = 2 / (1 - b2) - 1,   q = R - 2 * t * b2^t / (1 - b2^t)
//! k = sqrt((q - 4) (q - 2) R / ((R - 4) (R - 2) q)) for q > 4, else 0; 1 without silent_sgd_phase
//! lr = lr * k
//! v = b2 * v + (1 - b2) * g^2
//! u = (g / (sqrt(v / (1 - b2^t)) + eps) for q > 4, else g) + decay * y
//! y, z, x from lr and u: schedule_free.rs
//! ```

use super::options::{Check, AT_LEAST_0, BETAS_OF_AVERAGE, FINITE, FLAG};
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
    /// Exponent of the step in the average's weights.
    pub r: f64,
    /// Exponent of the learning rate in the average's weights.
    pub weight_lr_power: f64,
    /// Whether the first steps, whose mean of g^2 says too little, do nothing; otherwise they are plain SGD.
    pub silent_sgd_phase: bool,
}

impl Default for Options {
    fn default() -> Self {
        let betas = (0.9, 0.999);
        Options { betas, eps: 1e-8, weight_decay: 0.0, r: 0.0, weight_lr_power: 2.0, silent_sgd_phase: true }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] = &[
    ("betas", BETAS_OF_AVERAGE),
    ("eps", AT_LEAST_0),
    ("weight_decay", AT_LEAST_0),
    ("r", FINITE),
    ("weight_lr_power", AT_LEAST_0),
    ("silent_sgd_phase", FLAG),
];

/// RAdamScheduleFree and its state.
pub struct RAdamScheduleFree {
    options: Options,
    average: Average,
    square: Tensor,
}

impl RAdamScheduleFree {
    /// Fresh state.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        let average = Average::new(options.betas.0, options.r, options.weight_lr_power, layout, master)?;
        Ok(RAdamScheduleFree { options, average, square: master.f_zeros_like()? })
    }
}

impl Optimizer for RAdamScheduleFree {
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        step: u64,
    ) -> Result<()> {
        let Options { betas: (_, b2), eps, weight_decay, silent_sgd_phase, .. } = self.options;
        let t = step as f64;
        let power = b2.powf(t);
        let correction = 1.0 - power;
        let longest = 2.0 / (1.0 - b2) - 1.0;
        let length = longest - 2.0 * t * power / correction;
        let rectified = length > 4.0;
        let rectification = if rectified {
            ((length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)).sqrt()
        } else {
            f64::from(!silent_sgd_phase)
        };
        let square = &self.square;
        self.average.step(
            (master, gradient),
            (learning_rate * rectification, weight_decay),
            step,
            |part, g| {
                let mut v = part.of(square)?;
                let _ = v.f_mul_scalar_(b2)?.f_addcmul_(&g.f_mul_scalar(1.0 - b2)?, g)?;
                if rectified {
                    let _ = g.f_div_(&v.f_div_scalar(correction)?.f_sqrt_()?.f_add_scalar_(eps)?)?;
                }
                Ok(())
            },
        )
    }

    fn rule(&self) -> Option<Rule<'_>> {
        let Options { betas, eps, weight_decay, r, weight_lr_power, silent_sgd_phase } = self.options;
        let silent = f64::from(silent_sgd_phase);
        let numbers = vec![betas.0, r, weight_lr_power, betas.1, eps, weight_decay, silent];
        Some(self.average.rule("radam_schedule_free", numbers, &self.square))
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
