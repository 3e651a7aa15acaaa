//! AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), operation by operation as `torch.optim.AdamW` computes it, so that a run here follows a
//! run there.
//!
//! ```text
//! p = p * (1 - lr * decay)
//! m = m + (1 - b1) * (g - m)
//! v = v * b2 + (1 - b2) * g * g
//! p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//! ```

use super::options::{Check, AT_LEAST_0, TWO_FRACTIONS};
use super::{Layout, Optimizer, Part, Rule, Way};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The numbers that AdamW takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Decay rates of the running means of g and of g^2.
    pub betas: (f64, f64),
    /// Added to the root, which it keeps from 0.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for Options {
    fn default() -> Self {
        Options { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01 }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] =
    &[("betas", TWO_FRACTIONS), ("eps", AT_LEAST_0), ("weight_decay", AT_LEAST_0)];

/// AdamW and its state.
pub struct AdamW {
    options: Options,
    parts: Vec<Part>,
    mean: Tensor,
    square: Tensor,
}

impl AdamW {
    /// Fresh state.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        let (mean, square) = (master.f_zeros_like()?, master.f_zeros_like()?);
        Ok(AdamW { options, parts: layout.parts(), mean, square })
    }
}

impl Optimizer for AdamW {
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        step: u64,
    ) -> Result<()> {
        let Options { betas: (b1, b2), eps, weight_decay } = self.options;
        let (c1, c2) = (1.0 - b1.powf(step as f64), 1.0 - b2.powf(step as f64));
        for part in &self.parts {
            let (mut p, mut g) = (part.of(master)?, part.of(gradient)?);
            let (mut m, mut v) = (part.of(&self.mean)?, part.of(&self.square)?);
            let rate = learning_rate * part.factor;
            let _ = p.f_mul_scalar_(1.0 - rate * weight_decay)?;
            let _ = m.f_lerp_(&g, 1.0 - b1)?;
            // tch has no `value=` for addcmul and addcdiv; both multiply it into the first factor, so this is the same to the bit.
            let weighted = g.f_mul_scalar(1.0 - b2)?;
            let _ = v.f_mul_scalar_(b2)?.f_addcmul_(&weighted, &g)?;
            drop(weighted);
            let denominator = v.f_sqrt()?.f_div_scalar_(c2.sqrt())?.f_add_scalar_(eps)?;
            g.f_copy_(&m)?;
            let _ = g.f_mul_scalar_(-(rate / c1))?;
            let _ = p.f_addcdiv_(&g, &denominator)?;
        }
        Ok(())
    }

    fn rule(&self) -> Option<Rule<'_>> {
        let Options { betas: (b1, b2), eps, weight_decay } = self.options;
        Some(Rule {
            kernel: "adamw",
            numbers: vec![b1, b2, eps, weight_decay],
            state: vec![&self.mean, &self.square],
            carried: Vec::new(),
            way: Way::Once,
            ranges: self.parts.clone(),
            blocks: None,
        })
    }

    fn state(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("exp_avg", &self.mean), ("exp_avg_sq", &self.square)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_a_plain_loop_in_f64() {
        let n = 1000;
        let wave =
            |i: usize, t: u64| ((i as f64 * 0.7 + t as f64 * 1.3).sin() + 0.3) * 10f64.powi(i as i32 % 7 - 5);
        let start: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).cos()).collect();
        let mut p: Vec<f64> = start.iter().map(|&v| f64::from(v)).collect();
        let (mut m, mut v) = (vec![0f64; n], vec![0f64; n]);
        let options = Options { betas: (0.8, 0.95), eps: 1e-6, weight_decay: 0.1 };
        let mut master = Tensor::from_slice(&start);
        let mut adamw = AdamW::new(options, &Layout::of(&[], n), &master).unwrap();
        for t in 1..=50 {
            let lr = 1e-2 / t as f64;
            let g: Vec<f32> = (0..n).map(|i| wave(i, t) as f32).collect();
            adamw.step(&mut master, &mut Tensor::from_slice(&g), lr, t).unwrap();
            for i in 0..n {
                let g = f64::from(g[i]);
                p[i] -= lr * 0.1 * p[i];
                m[i] = 0.8 * m[i] + 0.2 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let (mean, square) =
                    (m[i] / (1.0 - 0.8f64.powi(t as i32)), v[i] / (1.0 - 0.95f64.powi(t as i32)));
                p[i] -= lr * mean / (square.sqrt() + 1e-6);
            }
        }
        let got = Vec::<f32>::try_from(&master).unwrap();
        for (i, (got, want)) in got.iter().zip(&p).enumerate() {
            // 50 updates of fp32, each rounded a few times.
            assert!((f64::from(*got) - want).abs() < 2e-6, "{i}: {got} instead of {want}");
        }
    }
}
