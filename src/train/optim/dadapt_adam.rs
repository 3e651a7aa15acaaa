//! D-Adaptation for Adam (Defazio & Mishchenko 2023, arXiv:2301.07733, algorithm 4), operation by operation as
//! `dadaptation.DAdaptAdam` 3.2 computes it: Adam whose rate is lr * d, with a lower bound d of the distance to the solution.
//!
//! ```text
//! c = d * lr * sqrt(1 - b2^t) / (1 - b1^t)                              the root and its divisor only with use_bias_correction
//! n = c * <g, s / (sqrt(v) + eps)>
//! m = b1 * m + (1 - b1) * c * g
//! v = b2 * v + (1 - b2) * g^2
//! s = q * s + (1 - q) * c * g,   q = sqrt(b2)
//! r = q * r + (1 - q) * n
//! d = max(d, min(r / ((1 - q) * |s|_1), d * growth_rate))
//! p = p - c * decay * p - m / (sqrt(v) + eps)
//! ```
//!
//! The factor of a group's rate is what dadaptation calls `layer_scale`: it multiplies the group's n, its part of m and of |s|_1.

use super::options::{Check, ABOVE_0, AT_LEAST_0, FLAG, TWO_FRACTIONS};
use super::{
    add_scaled, bias_correction, choose, lower_bound, scalar, sum, Layout, Optimizer, Part, Rule, Way,
};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// The numbers that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Decay rates of the running means of g and of g^2.
    pub betas: (f64, f64),
    /// Added to the root.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// AdamW's decay; otherwise it is added to the gradient.
    pub decouple: bool,
    /// Adam's bias correction.
    pub use_bias_correction: bool,
    /// First d.
    pub d0: f64,
    /// Largest growth of d per step; without limit unless given.
    pub growth_rate: Option<f64>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
            decouple: false,
            use_bias_correction: false,
            d0: 1e-6,
            growth_rate: None,
        }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] = &[
    ("betas", TWO_FRACTIONS),
    ("eps", ABOVE_0),
    ("weight_decay", AT_LEAST_0),
    ("decouple", FLAG),
    ("use_bias_correction", FLAG),
    ("d0", ABOVE_0),
    ("growth_rate", ABOVE_0),
];

/// DAdaptAdam and its state; everything that follows from d stays on the device.
pub struct DAdaptAdam {
    options: Options,
    parts: Vec<Part>,
    mean: Tensor,
    square: Tensor,
    sum: Tensor,
    d: Tensor,
    numerator: Tensor,
    /// Updates that changed anything, for the bias correction.
    updates: Tensor,
}

impl DAdaptAdam {
    /// Fresh state.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        Ok(DAdaptAdam {
            options,
            parts: layout.parts(),
            mean: master.f_zeros_like()?,
            square: master.f_zeros_like()?,
            sum: master.f_zeros_like()?,
            d: scalar(options.d0, master)?,
            numerator: scalar(0.0, master)?,
            updates: scalar(0.0, master)?,
        })
    }
}

impl Optimizer for DAdaptAdam {
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        _step: u64,
    ) -> Result<()> {
        let o = self.options;
        let ((b1, b2), root) = (o.betas, o.betas.1.sqrt());
        // dadaptation does nothing at all then, its bias correction does not count either.
        if learning_rate == 0.0 {
            return Ok(());
        }
        let d = self.d.f_detach_copy()?;
        let mut rate = d.f_mul_scalar(learning_rate)?;
        if o.use_bias_correction {
            rate = rate.f_mul(&bias_correction(&self.updates, o.betas)?)?;
        }
        let (mut inner, mut length) = (scalar(0.0, master)?, scalar(0.0, master)?);
        for part in &self.parts {
            let (p, mut g, mut s) = (part.of(master)?, part.of(gradient)?, part.of(&self.sum)?);
            let (mut m, mut v) = (part.of(&self.mean)?, part.of(&self.square)?);
            if o.weight_decay != 0.0 && !o.decouple {
                add_scaled(&mut g, &p, o.weight_decay)?;
            }
            let mut scaled = s.f_div(&v.f_sqrt()?.f_add_scalar_(o.eps)?)?;
            let _ = inner.f_add_(&sum(&scaled.f_mul_(&g)?)?.f_mul_scalar(part.factor)?)?;
            drop(scaled);
            let into_mean = rate.f_mul_scalar(part.factor * (1.0 - b1))?;
            let _ = m.f_mul_scalar_(b1)?.f_add_(&g.f_mul(&into_mean)?)?;
            let _ = v.f_mul_scalar_(b2)?.f_addcmul_(&g.f_mul_scalar(1.0 - b2)?, &g)?;
            let _ = s.f_mul_scalar_(root)?.f_add_(&g.f_mul(&rate.f_mul_scalar(1.0 - root)?)?)?;
            let _ = length.f_add_(&sum(&s.f_abs()?)?.f_mul_scalar(part.factor)?)?;
        }
        let (numerator, mut estimate) = lower_bound(&self.numerator, root, &rate, &inner, &length)?;
        if let Some(growth) = o.growth_rate {
            estimate = estimate.f_minimum(&d.f_mul_scalar(growth)?)?;
        }
        // While no gradient was other than 0, there is nothing to divide by and nothing happens.
        let moved = length.f_gt(0.0)?;
        for (to, value) in [(&mut self.d, d.f_maximum(&estimate)?), (&mut self.numerator, numerator)] {
            let value = choose(&moved, &value, to)?;
            to.f_copy_(&value)?;
        }
        let _ = self.updates.f_add_(&moved.f_to_kind(Kind::Double)?)?;
        for part in &self.parts {
            let (mut p, m, v) = (part.of(master)?, part.of(&self.mean)?, part.of(&self.square)?);
            if o.weight_decay != 0.0 && o.decouple {
                let decay = rate.f_mul(&moved)?.f_mul_scalar(-o.weight_decay * part.factor)?;
                let decay = p.f_mul(&decay)?;
                let _ = p.f_add_(&decay)?;
            }
            let _ = p.f_sub_(&m.f_div(&v.f_sqrt()?.f_add_scalar_(o.eps)?)?)?;
        }
        Ok(())
    }

    fn rule(&self) -> Option<Rule<'_>> {
        let o = self.options;
        let [decay, coupled] = if o.decouple { [o.weight_decay, 0.0] } else { [0.0, o.weight_decay] };
        let bias = f64::from(u8::from(o.use_bias_correction));
        Some(Rule {
            kernel: "dadapt_adam",
            numbers: vec![o.betas.0, o.betas.1, o.eps, decay, coupled, bias, o.growth_rate.unwrap_or(0.0)],
            state: vec![&self.mean, &self.square, &self.sum],
            carried: vec![&self.d, &self.numerator, &self.updates],
            ranges: self.parts.clone(),
            way: Way::Measured,
            blocks: None,
        })
    }

    fn state(&self) -> Vec<(&'static str, &Tensor)> {
        vec![
            ("exp_avg", &self.mean),
            ("exp_avg_sq", &self.square),
            ("s", &self.sum),
            ("d", &self.d),
            ("numerator_weighted", &self.numerator),
            ("k", &self.updates),
        ]
    }
}
