//! What the schedule-free optimizers share (Defazio et al. 2024, arXiv:2405.15682): three sequences of which two are kept, operation by
//! operation as `schedulefree` 1.4.1 computes them.
//!
//! ```text
//! w = t^r * (largest lr so far)^power,   W = W + w,   c = w / W
//! y = y + c * (z - y)
//! y = y + lr * (b1 * (1 - c) - 1) * u           u: the direction, with weight decay at y
//! z = z - lr * u
//! x = y + (1 - 1 / b1) * (z - y)
//! ```
//!
//! Gradients are taken at y, which is therefore what the master holds; x, the average of the z, is what an adapter file gets.

use super::{add_scaled, scalar, Layout, Part, Rule, Way};
use crate::error::Result;
use tch::Tensor;

/// The sequences y and z, and the weights of the average.
pub struct Average {
    beta: f64,
    power: f64,
    exponent: f64,
    parts: Vec<Part>,
    z: Tensor,
    weight_sum: Tensor,
    largest_rate: Tensor,
}

impl Average {
    /// Fresh state; z starts where the parameters are in the first step.
    pub fn new(beta: f64, exponent: f64, power: f64, layout: &Layout, master: &Tensor) -> Result<Self> {
        let (z, parts) = (master.f_zeros_like()?, layout.parts());
        let (weight_sum, largest_rate) = (scalar(0.0, master)?, scalar(-1.0, master)?);
        Ok(Average { beta, power, exponent, parts, z, weight_sum, largest_rate })
    }

    /// The weight c of step `step` at this rate. Both sums depend on the schedule alone; on a GPU without kernels this waits for them.
    pub fn weigh(&mut self, rate: f64, step: u64) -> Result<f64> {
        let largest = self.largest_rate.f_double_value(&[])?.max(rate);
        let weight = (step as f64).powf(self.exponent) * largest.powf(self.power);
        let sum = self.weight_sum.f_double_value(&[])? + weight;
        let _ = self.largest_rate.f_fill_(largest)?;
        let _ = self.weight_sum.f_fill_(sum)?;
        Ok(if sum == 0.0 { 0.0 } else { weight / sum })
    }

    /// One step. `direction` makes the direction out of a part's gradient, in place.
    pub fn step(
        &mut self,
        (master, gradient): (&mut Tensor, &mut Tensor),
        (rate, weight_decay): (f64, f64),
        step: u64,
        direction: impl Fn(&Part, &mut Tensor) -> Result<()>,
    ) -> Result<()> {
        if step == 1 {
            self.z.f_copy_(master)?;
        }
        let c = self.weigh(rate, step)?;
        for part in &self.parts {
            let (mut y, mut g, mut z) = (part.of(master)?, part.of(gradient)?, part.of(&self.z)?);
            let rate = rate * part.factor;
            direction(part, &mut g)?;
            if weight_decay != 0.0 {
                add_scaled(&mut g, &y, weight_decay)?;
            }
            let _ = y.f_lerp_(&z, c)?;
            add_scaled(&mut y, &g, rate * (self.beta * (1.0 - c) - 1.0))?;
            add_scaled(&mut z, &g, -rate)?;
        }
        Ok(())
    }

    /// Both optimizers for a GPU, where the numbers begin with b1, r and power, and the state is z and the mean of squares.
    pub fn rule<'a>(&'a self, kernel: &'static str, numbers: Vec<f64>, square: &'a Tensor) -> Rule<'a> {
        Rule {
            kernel,
            numbers,
            state: vec![&self.z, square],
            carried: vec![&self.weight_sum, &self.largest_rate],
            way: Way::Once,
            ranges: self.parts.clone(),
            blocks: None,
        }
    }

    /// x.
    pub fn averaged(&self, master: &Tensor) -> Result<Tensor> {
        Ok(master.f_lerp(&self.z, 1.0 - 1.0 / self.beta)?)
    }

    /// The parameters were set from outside: the average begins anew there.
    pub fn restart(&mut self, master: &Tensor) -> Result<()> {
        self.z.f_copy_(master)?;
        let _ = self.weight_sum.f_zero_()?;
        Ok(())
    }

    /// For a resume file.
    pub fn state(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("z", &self.z), ("weight_sum", &self.weight_sum), ("lr_max", &self.largest_rate)]
    }
}
