//! Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101, algorithm 4), operation by operation as `prodigyopt.Prodigy` 1.1.2 computes it:
//! AdamW whose rate is lr * d, with an estimate d of the distance between the start p0 and the solution.
//!
//! ```text
//! c = d * lr * sqrt(1 - b2^t) / (1 - b1^t)                              the root and its divisor only with use_bias_correction
//! r = b3 * r + d / d0 * c * <g, p0 - p>
//! m = b1 * m + (1 - b1) * d * g
//! v = b2 * v + (1 - b2) * d^2 * g^2
//! s = b3 * s + d / d0 * c * g                                           d instead of c with safeguard_warmup
//! e = d_coef * r / |s|_1
//! d = min(max of all e and d, d * growth_rate)
//! p = p - c * decay * p - c * m / (sqrt(v) + d * eps)
//! ```
//!
//! A group whose rate has the factor f is, in units of f, a group like the others: its share of |s|_1 and its update are multiplied by f,
//! and one d serves all. (prodigyopt refuses unequal rates.)

use super::options::{Check, ABOVE_0, AT_LEAST_0, COUNT, FLAG, FRACTION, TWO_FRACTIONS};
use super::{add_scaled, bias_correction, choose, scalar, sum, Layout, Optimizer, Part, Rule, Way};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// The numbers that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Decay rates of the running means of g and of g^2.
    pub betas: (f64, f64),
    /// Decay rate of the sums that d comes from; the root of the second beta unless given.
    pub beta3: Option<f64>,
    /// Added to the root, multiplied by d.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// AdamW's decay; otherwise it is added to the gradient.
    pub decouple: bool,
    /// Adam's bias correction.
    pub use_bias_correction: bool,
    /// Keeps the learning rate out of the denominator of d.
    pub safeguard_warmup: bool,
    /// First d.
    pub d0: f64,
    /// Factor of the estimate.
    pub d_coef: f64,
    /// Largest growth of d per step; without limit unless given.
    pub growth_rate: Option<f64>,
    /// d is estimated from every so many-th element. Counted through the flat buffer, where prodigyopt counts through each tensor.
    pub slice_p: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            betas: (0.9, 0.999),
            beta3: None,
            eps: 1e-8,
            weight_decay: 0.0,
            decouple: true,
            use_bias_correction: false,
            safeguard_warmup: false,
            d0: 1e-6,
            d_coef: 1.0,
            growth_rate: None,
            slice_p: 1,
        }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] = &[
    ("betas", TWO_FRACTIONS),
    ("beta3", FRACTION),
    ("eps", ABOVE_0),
    ("weight_decay", AT_LEAST_0),
    ("decouple", FLAG),
    ("use_bias_correction", FLAG),
    ("safeguard_warmup", FLAG),
    ("d0", ABOVE_0),
    ("d_coef", ABOVE_0),
    ("growth_rate", ABOVE_0),
    ("slice_p", COUNT),
];

/// Prodigy and its state; everything that follows from d stays on the device.
pub struct Prodigy {
    options: Options,
    parts: Vec<Part>,
    mean: Tensor,
    square: Tensor,
    sum: Tensor,
    start: Tensor,
    d: Tensor,
    d_max: Tensor,
    numerator: Tensor,
    /// Updates that changed anything, for the bias correction.
    updates: Tensor,
}

impl Prodigy {
    /// Fresh state; the start is where the parameters are in the first step.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        let sampled = master.f_slice(0, None, None, options.slice_p as i64)?;
        Ok(Prodigy {
            options,
            parts: layout.parts(),
            mean: master.f_zeros_like()?,
            square: master.f_zeros_like()?,
            sum: sampled.f_zeros_like()?,
            start: sampled.f_zeros_like()?,
            d: scalar(options.d0, master)?,
            d_max: scalar(options.d0, master)?,
            numerator: scalar(0.0, master)?,
            updates: scalar(0.0, master)?,
        })
    }

    fn beta3(&self) -> f64 {
        self.options.beta3.unwrap_or(self.options.betas.1.sqrt())
    }

    /// A part's sampled elements of a flat tensor, and their range in a sampled one.
    fn sampled(&self, part: &Part, flat: &Tensor, from: &Tensor) -> Result<(Tensor, Tensor)> {
        let every = self.options.slice_p as usize;
        let (first, end) = (part.start.div_ceil(every), part.end.div_ceil(every));
        let narrow = from.f_narrow(0, first as i64, (end - first) as i64)?;
        if first == end {
            return Ok((flat.f_narrow(0, 0, 0)?, narrow));
        }
        Ok((flat.f_slice(0, Some((first * every) as i64), Some(part.end as i64), every as i64)?, narrow))
    }
}

impl Optimizer for Prodigy {
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        step: u64,
    ) -> Result<()> {
        let o = self.options;
        let (b1, b2) = o.betas;
        if step == 1 {
            self.start.f_copy_(&master.f_slice(0, None, None, o.slice_p as i64)?)?;
        }
        // prodigyopt does nothing at all then, its bias correction does not count either.
        if learning_rate == 0.0 {
            return Ok(());
        }
        let b3 = self.beta3();
        let d = self.d.f_detach_copy()?;
        let mut rate = d.f_mul_scalar(learning_rate)?;
        if o.use_bias_correction {
            rate = rate.f_mul(&bias_correction(&self.updates, o.betas)?)?;
        }
        // d / d0 and not d, to stay far from values that fp32 cannot hold.
        let weight = d.f_div_scalar(o.d0)?;
        let into_sum = weight.f_mul(if o.safeguard_warmup { &d } else { &rate })?;
        let into_square = d.f_mul(&d)?.f_mul_scalar(1.0 - b2)?;
        let (mut inner, mut length) = (scalar(0.0, master)?, scalar(0.0, master)?);
        for part in &self.parts {
            let (p, mut g) = (part.of(master)?, part.of(gradient)?);
            let (mut m, mut v) = (part.of(&self.mean)?, part.of(&self.square)?);
            if o.weight_decay != 0.0 && !o.decouple {
                add_scaled(&mut g, &p, o.weight_decay)?;
            }
            let (p_sampled, start) = self.sampled(part, master, &self.start)?;
            let (g_sampled, mut s) = self.sampled(part, gradient, &self.sum)?;
            let _ = inner.f_add_(&sum(&start.f_sub(&p_sampled)?.f_mul_(&g_sampled)?)?)?;
            if b1 > 0.0 {
                let _ = m.f_mul_scalar_(b1)?.f_add_(&g.f_mul(&d.f_mul_scalar(1.0 - b1)?)?)?;
            }
            let _ = v.f_mul_scalar_(b2)?.f_addcmul_(&g.f_mul(&into_square)?, &g)?;
            let _ = s.f_mul_scalar_(b3)?.f_add_(&g_sampled.f_mul(&into_sum)?)?;
            let _ = length.f_add_(&sum(&s.f_abs()?)?.f_mul_scalar(part.factor)?)?;
        }
        let numerator = self.numerator.f_mul_scalar(b3)?.f_add(&weight.f_mul(&rate)?.f_mul(&inner)?)?;
        let estimate = numerator.f_mul_scalar(o.d_coef)?.f_div(&length)?;
        let raised = choose(&d.f_eq(o.d0)?, &d.f_maximum(&estimate)?, &d)?;
        let d_max = self.d_max.f_maximum(&estimate)?;
        let next = match o.growth_rate {
            Some(growth) => d_max.f_minimum(&raised.f_mul_scalar(growth)?)?,
            None => d_max.shallow_clone(),
        };
        // While no gradient was other than 0, there is nothing to divide by and nothing happens.
        let moved = length.f_gt(0.0)?;
        for (to, value) in [(&mut self.d, next), (&mut self.d_max, d_max), (&mut self.numerator, numerator)] {
            let value = choose(&moved, &value, to)?;
            to.f_copy_(&value)?;
        }
        let _ = self.updates.f_add_(&moved.f_to_kind(Kind::Double)?)?;
        let rate = rate.f_mul(&moved)?;
        for part in &self.parts {
            let (mut p, g) = (part.of(master)?, part.of(gradient)?);
            let (m, v) = (part.of(&self.mean)?, part.of(&self.square)?);
            let rate = rate.f_mul_scalar(-part.factor)?;
            let denominator = v.f_sqrt()?.f_add_(&self.d.f_mul_scalar(o.eps)?)?;
            if o.weight_decay != 0.0 && o.decouple {
                let decay = p.f_mul(&rate.f_mul_scalar(o.weight_decay)?)?;
                let _ = p.f_add_(&decay)?;
            }
            let direction = if b1 > 0.0 { m.f_mul(&rate)? } else { g.f_mul(&rate.f_mul(&self.d)?)? };
            let _ = p.f_addcdiv_(&direction, &denominator)?;
        }
        Ok(())
    }

    fn rule(&self) -> Option<Rule<'_>> {
        let o = self.options;
        let [decay, coupled] = if o.decouple { [o.weight_decay, 0.0] } else { [0.0, o.weight_decay] };
        let flags = [o.use_bias_correction, o.safeguard_warmup].map(|flag| f64::from(u8::from(flag)));
        // Without a mean the direction is g times the new d, which no state holds.
        (o.betas.0 > 0.0).then(|| Rule {
            kernel: "prodigy",
            numbers: vec![
                o.betas.0,
                o.betas.1,
                self.beta3(),
                o.eps,
                decay,
                coupled,
                flags[0],
                flags[1],
                o.d0,
                o.d_coef,
                o.growth_rate.unwrap_or(0.0),
                o.slice_p as f64,
            ],
            state: vec![&self.mean, &self.square, &self.sum, &self.start],
            carried: vec![&self.d, &self.numerator, &self.d_max, &self.updates],
            ranges: self.parts.clone(),
            way: Way::Measured,
            blocks: None,
        })
    }

    fn restart(&mut self, master: &Tensor) -> Result<()> {
        self.start.f_copy_(&master.f_slice(0, None, None, self.options.slice_p as i64)?)?;
        Ok(())
    }

    fn state(&self) -> Vec<(&'static str, &Tensor)> {
        let mut state = vec![
            ("exp_avg_sq", &self.square),
            ("s", &self.sum),
            ("p0", &self.start),
            ("d", &self.d),
            ("d_max", &self.d_max),
            ("d_numerator", &self.numerator),
            ("k", &self.updates),
        ];
        if self.options.betas.0 > 0.0 {
            state.push(("exp_avg", &self.mean));
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn without_gradients_nothing_happens() {
        let mut master = Tensor::from_slice(&[1f32, 2.0, 3.0, 0.0]);
        let o = Options { weight_decay: 0.5, ..Options::default() };
        let mut prodigy = Prodigy::new(o, &Layout::of(&[&[4]], 4), &master).unwrap();
        for t in 1..4 {
            let mut gradient = Tensor::zeros([4], (Kind::Float, Device::Cpu));
            prodigy.step(&mut master, &mut gradient, 1.0, t).unwrap();
        }
        assert_eq!(Vec::<f32>::try_from(&master).unwrap(), [1.0, 2.0, 3.0, 0.0]);
        let kept = [&prodigy.d, &prodigy.numerator, &prodigy.updates].map(|t| t.double_value(&[]));
        assert_eq!(kept, [1e-6, 0.0, 0.0]);
    }

    #[test]
    fn samples_of_parts_are_those_of_the_whole() {
        let layout = Layout { groups: vec![(0..5, 1.0), (5..6, 1.0), (6..20, 1.0)], ..Layout::of(&[], 20) };
        let master = Tensor::arange(20, (Kind::Float, Device::Cpu));
        let prodigy = Prodigy::new(Options { slice_p: 3, ..Options::default() }, &layout, &master).unwrap();
        let of_parts: Vec<f32> = prodigy
            .parts
            .iter()
            .flat_map(|part| {
                let (flat, narrow) = prodigy.sampled(part, &master, &prodigy.start).unwrap();
                assert_eq!(flat.size(), narrow.size());
                Vec::<f32>::try_from(flat).unwrap()
            })
            .collect();
        assert_eq!(of_parts, [0.0, 3.0, 6.0, 9.0, 12.0, 15.0, 18.0]);
    }
}
