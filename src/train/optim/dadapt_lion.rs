//! D-Adaptation for Lion (the method of Defazio & Mishchenko 2023, arXiv:2301.07733, on Chen et al. 2023, arXiv:2302.06675), operation by
//! operation as `dadaptation.DAdaptLion` 3.2 computes it. There is no paper on the combination; the package calls it experimental.
//!
//! ```text
//! c = d * lr
//! p = p * (1 - c * decay)
//! u = sign(b1 * m + (1 - b1) * g)
//! p = p - c * u
//! m = b2 * m + (1 - b2) * c * g
//! n = c * <u, s>
//! s = q * s + (1 - q) * c * u,   q = sqrt(b2)
//! r = q * r + (1 - q) * n
//! d = max(d, r / ((1 - q) * |s|_1))
//! ```
//!
//! The factor of a group's rate multiplies its update of p. In units of the factor the update is c * u, so n and |s|_1 need none.

use super::options::{Check, ABOVE_0, AT_LEAST_0, TWO_FRACTIONS};
use super::{choose, lower_bound, scalar, sum, Layout, Optimizer, Part, Rule, Way};
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
    /// First d.
    pub d0: f64,
}

impl Default for Options {
    fn default() -> Self {
        Options { betas: (0.9, 0.99), weight_decay: 0.0, d0: 1e-6 }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] =
    &[("betas", TWO_FRACTIONS), ("weight_decay", AT_LEAST_0), ("d0", ABOVE_0)];

/// DAdaptLion and its state; everything that follows from d stays on the device.
pub struct DAdaptLion {
    options: Options,
    parts: Vec<Part>,
    mean: Tensor,
    sum: Tensor,
    d: Tensor,
    numerator: Tensor,
}

impl DAdaptLion {
    /// Fresh state.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        Ok(DAdaptLion {
            options,
            parts: layout.parts(),
            mean: master.f_zeros_like()?,
            sum: master.f_zeros_like()?,
            d: scalar(options.d0, master)?,
            numerator: scalar(0.0, master)?,
        })
    }
}

impl Optimizer for DAdaptLion {
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        _step: u64,
    ) -> Result<()> {
        let Options { betas: (b1, b2), weight_decay, .. } = self.options;
        let root = b2.sqrt();
        let rate = self.d.f_mul_scalar(learning_rate)?;
        let (mut inner, mut length) = (scalar(0.0, master)?, scalar(0.0, master)?);
        for part in &self.parts {
            let (mut p, g) = (part.of(master)?, part.of(gradient)?);
            let (mut m, mut s) = (part.of(&self.mean)?, part.of(&self.sum)?);
            let scaled = rate.f_mul_scalar(-part.factor)?;
            let _ = p.f_mul_(&scaled.f_mul_scalar(weight_decay)?.f_add_scalar(1.0)?)?;
            let mut update = m.f_mul_scalar(b1)?.f_add_(&g.f_mul_scalar(1.0 - b1)?)?;
            let _ = update.f_sign_()?;
            let _ = p.f_add_(&update.f_mul(&scaled)?)?;
            let _ = m.f_mul_scalar_(b2)?.f_add_(&g.f_mul(&rate.f_mul_scalar(1.0 - b2)?)?)?;
            let _ = inner.f_add_(&sum(&update.f_mul(&s)?)?)?;
            let _ = s.f_mul_scalar_(root)?.f_add_(&update.f_mul(&rate.f_mul_scalar(1.0 - root)?)?)?;
            let _ = length.f_add_(&sum(&s.f_abs()?)?)?;
        }
        let (numerator, estimate) = lower_bound(&self.numerator, root, &rate, &inner, &length)?;
        self.numerator.f_copy_(&numerator)?;
        if learning_rate > 0.0 {
            // While no gradient was other than 0, there is nothing to divide by.
            let next = choose(&length.f_gt(0.0)?, &self.d.f_maximum(&estimate)?, &self.d)?;
            self.d.f_copy_(&next)?;
        }
        Ok(())
    }

    fn rule(&self) -> Option<Rule<'_>> {
        let Options { betas, weight_decay, .. } = self.options;
        Some(Rule {
            kernel: "dadapt_lion",
            numbers: vec![betas.0, betas.1, weight_decay],
            state: vec![&self.mean, &self.sum],
            carried: vec![&self.d, &self.numerator],
            ranges: self.parts.clone(),
            way: Way::Measured,
            blocks: None,
        })
    }

    fn state(&self) -> Vec<(&'static str, &Tensor)> {
        vec![
            ("exp_avg", &self.mean),
            ("s", &self.sum),
            ("d", &self.d),
            ("numerator_weighted", &self.numerator),
        ]
    }
}
