//! Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2), operation by operation as `lion_pytorch.Lion` 0.2.5 computes it.
//!
//! ```text
//! p = p * (1 - lr * decay)
//! p = p - lr * sign(b1 * m + (1 - b1) * g)
//! m = b2 * m + (1 - b2) * g
//! ```

use super::options::{Check, AT_LEAST_0, FLAG, TWO_FRACTIONS};
use super::{add_scaled, Layout, Optimizer, Part, Rule, Way};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The numbers that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// What the sign is taken of: how much of the mean; and the decay rate of the mean.
    pub betas: (f64, f64),
    /// Weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// Divides the weight decay by the learning rate before the schedule.
    pub decoupled_weight_decay: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { betas: (0.9, 0.99), weight_decay: 0.0, decoupled_weight_decay: false }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] =
    &[("betas", TWO_FRACTIONS), ("weight_decay", AT_LEAST_0), ("decoupled_weight_decay", FLAG)];

/// Lion and its mean.
pub struct Lion {
    betas: (f64, f64),
    weight_decay: f64,
    parts: Vec<Part>,
    mean: Tensor,
}

impl Lion {
    /// A mean of zero.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        let scale = if options.decoupled_weight_decay { layout.learning_rate } else { 1.0 };
        let weight_decay = options.weight_decay / scale;
        Ok(Lion { betas: options.betas, weight_decay, parts: layout.parts(), mean: master.f_zeros_like()? })
    }
}

impl Optimizer for Lion {
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        _step: u64,
    ) -> Result<()> {
        let (b1, b2) = self.betas;
        for part in &self.parts {
            let (mut p, g, mut m) = (part.of(master)?, part.of(gradient)?, part.of(&self.mean)?);
            let rate = learning_rate * part.factor;
            let _ = p.f_mul_scalar_(1.0 - rate * self.weight_decay)?;
            let mut update = m.f_mul_scalar(b1)?;
            add_scaled(&mut update, &g, 1.0 - b1)?;
            let _ = update.f_sign_()?;
            add_scaled(&mut p, &update, -rate)?;
            let _ = m.f_mul_scalar_(b2)?;
            add_scaled(&mut m, &g, 1.0 - b2)?;
        }
        Ok(())
    }

    fn rule(&self) -> Option<Rule<'_>> {
        Some(Rule {
            kernel: "lion",
            numbers: vec![self.betas.0, self.betas.1, self.weight_decay],
            state: vec![&self.mean],
            carried: Vec::new(),
            way: Way::Once,
            ranges: self.parts.clone(),
            blocks: None,
        })
    }

    fn state(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("exp_avg", &self.mean)]
    }
}
