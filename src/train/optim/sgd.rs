//! SGD with Nesterov's momentum (Sutskever et al. 2013, ICML), operation by operation as `torch.optim.SGD(nesterov=True)` computes it.
//!
//! ```text
//! g = g + decay * p
//! m = momentum * m + g
//! p = p - lr * (g + momentum * m)
//! ```

use super::options::{Check, AT_LEAST_0, OPEN_FRACTION};
use super::{add_scaled, Layout, Optimizer, Part, Rule, Way};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The numbers that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Share of the velocity that is kept.
    pub momentum: f64,
    /// Added to the gradient, so not decoupled.
    pub weight_decay: f64,
}

impl Default for Options {
    // torch has no default momentum for Nesterov's form; sd-scripts takes 0.9.
    fn default() -> Self {
        Options { momentum: 0.9, weight_decay: 0.0 }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] = &[("momentum", OPEN_FRACTION), ("weight_decay", AT_LEAST_0)];

/// SGD and its velocity.
pub struct SGDNesterov {
    options: Options,
    parts: Vec<Part>,
    velocity: Tensor,
}

impl SGDNesterov {
    /// At rest.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        Ok(SGDNesterov { options, parts: layout.parts(), velocity: master.f_zeros_like()? })
    }
}

impl Optimizer for SGDNesterov {
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        _step: u64,
    ) -> Result<()> {
        let Options { momentum, weight_decay } = self.options;
        for part in &self.parts {
            let (mut p, mut g, mut m) = (part.of(master)?, part.of(gradient)?, part.of(&self.velocity)?);
            if weight_decay != 0.0 {
                add_scaled(&mut g, &p, weight_decay)?;
            }
            // torch starts with m = g, which is the same as starting from 0.
            let _ = m.f_mul_scalar_(momentum)?.f_add_(&g)?;
            add_scaled(&mut g, &m, momentum)?;
            add_scaled(&mut p, &g, -(learning_rate * part.factor))?;
        }
        Ok(())
    }

    fn rule(&self) -> Option<Rule<'_>> {
        Some(Rule {
            kernel: "sgd",
            numbers: vec![self.options.momentum, self.options.weight_decay],
            state: vec![&self.velocity],
            carried: Vec::new(),
            way: Way::Once,
            ranges: self.parts.clone(),
            blocks: None,
        })
    }

    fn state(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("momentum_buffer", &self.velocity)]
    }
}
