//! AdamW whose means are kept in 8 bits (Dettmers et al. 2021, arXiv:2110.02861), as `bitsandbytes.optim.AdamW8bit` 0.50 defines it:
//! every 256 values of a parameter share a scale, their largest magnitude, and are stored as the nearest of 256 values from -1 to 1
//! (the mean) or 0 to 1 (the mean of squares), which lie denser near 0. Parameters of less than min_8bit_size values keep 32 bits.
//!
//! ```text
//! m, v = code[stored] * scale
//! m = b1 * m + (1 - b1) * g
//! v = b2 * v + (1 - b2) * g^2
//! p = p * (1 - lr * decay)
//! p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//! scale = max |m| of the block,   stored = nearest code to m / scale;   v alike
//! ```
//!
//! Operation by operation as its CPU kernel.

use super::options::{Check, AT_LEAST_0, TWO_FRACTIONS, WHOLE};
use super::{add_scaled, Layout, Optimizer, Part, Rule, Way, BLOCK};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Values that share a scale. Parameters have to begin at multiples of it, so that no two share one.
pub const SCALED: usize = 256;

/// The numbers that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Decay rates of the running means of g and of g^2.
    pub betas: (f64, f64),
    /// Added to the root.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Smaller parameters keep their means in 32 bits.
    pub min_8bit_size: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01, min_8bit_size: 4096 }
    }
}

/// Which values the options may have.
pub const CHECKS: &[(&str, Check)] =
    &[("betas", TWO_FRACTIONS), ("eps", AT_LEAST_0), ("weight_decay", AT_LEAST_0), ("min_8bit_size", WHOLE)];

/// Parameters that lie side by side, with one learning rate and one way to keep the means.
struct Run {
    start: usize,
    length: usize,
    factor: f64,
    small: bool,
    /// Where its means lie, among those of 32 or of 8 bits.
    kept: usize,
}

/// AdamW8bit and its state.
pub struct AdamW8bit {
    options: Options,
    runs: Vec<Run>,
    mean: Means,
    square: Means,
}

/// The means of one kind.
struct Means {
    wide: Tensor,
    codes: Tensor,
    scales: Tensor,
    /// The 256 values, ascending, and what lies in the middle of two.
    values: Tensor,
    middles: Tensor,
}

impl AdamW8bit {
    /// Fresh state.
    pub fn new(options: Options, layout: &Layout, master: &Tensor) -> Result<Self> {
        let mut runs: Vec<Run> = Vec::new();
        let mut ends = [0usize; 2];
        for segment in &layout.segments {
            let (factor, small) = (layout.factor(segment), (segment.count() as u64) < options.min_8bit_size);
            // Padding is zero and so are its gradients: it changes no scale.
            let length = segment.count().next_multiple_of(if small { 1 } else { SCALED });
            let end = &mut ends[usize::from(small)];
            match runs.last_mut() {
                Some(last)
                    if (last.factor, last.small) == (factor, small)
                        && segment.offset + length - last.start <= BLOCK =>
                {
                    *end += segment.offset + length - last.start - last.length;
                    last.length = segment.offset + length - last.start;
                }
                _ => {
                    runs.push(Run { start: segment.offset, length, factor, small, kept: *end });
                    *end += length;
                }
            }
        }
        let means = |signed: bool| -> Result<Means> {
            let values = dynamic_map(signed);
            let middles: Vec<f32> = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
            let zeros = |length: usize, kind| Tensor::f_zeros([length as i64], (kind, master.device()));
            Ok(Means {
                wide: zeros(ends[1], Kind::Float)?,
                codes: zeros(ends[0], Kind::Uint8)?,
                scales: zeros(ends[0] / SCALED, Kind::Float)?,
                values: Tensor::f_from_slice(&values)?.f_to_device(master.device())?,
                middles: Tensor::f_from_slice(&middles)?.f_to_device(master.device())?,
            })
        };
        let (mean, square) = (means(true)?, means(false)?);
        Ok(AdamW8bit { options, runs, mean, square })
    }
}

impl Means {
    fn blocks(&self, run: &Run) -> Result<(Tensor, Tensor)> {
        let (kept, length) = (run.kept as i64, run.length as i64);
        let per = SCALED as i64;
        Ok((self.codes.f_narrow(0, kept, length)?, self.scales.f_narrow(0, kept / per, length / per)?))
    }

    /// In 32 bits; of a small run the memory itself.
    fn read(&self, run: &Run) -> Result<Tensor> {
        if run.small {
            return Ok(self.wide.f_narrow(0, run.kept as i64, run.length as i64)?);
        }
        let (codes, scales) = self.blocks(run)?;
        let values = self.values.f_index_select(0, &codes.f_to_kind(Kind::Int)?)?;
        Ok(values.f_view_([-1, SCALED as i64])?.f_mul_(&scales.f_unsqueeze(1)?)?.f_view_([-1i64])?)
    }

    fn write(&self, run: &Run, means: &Tensor) -> Result<()> {
        if run.small {
            return Ok(());
        }
        let (mut codes, mut scales) = self.blocks(run)?;
        let means = means.f_view_([-1, SCALED as i64])?;
        scales.f_copy_(&means.f_abs()?.f_amax([1i64].as_slice(), false)?)?;
        // A block of zeros has the scale 0; its values then are 0 / 1.
        let divisor = scales.f_masked_fill(&scales.f_eq(0.0)?, 1.0)?.f_unsqueeze(1)?;
        codes.f_copy_(&means.f_div(&divisor)?.f_bucketize(&self.middles, true, false)?.f_view_([-1i64])?)?;
        Ok(())
    }

    /// As the kernel has them.
    fn tensors(&self) -> [&Tensor; 5] {
        [&self.wide, &self.codes, &self.scales, &self.values, &self.middles]
    }

    fn state(&self, names: [&'static str; 3]) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let tensors = [&self.wide, &self.codes, &self.scales];
        names.into_iter().zip(tensors).filter(|(_, tensor)| tensor.numel() > 0)
    }
}

impl Optimizer for AdamW8bit {
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        step: u64,
    ) -> Result<()> {
        let Options { betas: (b1, b2), eps, weight_decay, .. } = self.options;
        let (c1, c2) = (1.0 - b1.powf(step as f64), (1.0 - b2.powf(step as f64)).sqrt());
        for run in &self.runs {
            let part = |flat: &Tensor| flat.f_narrow(0, run.start as i64, run.length as i64);
            let (mut p, g) = (part(master)?, part(gradient)?);
            let (mut m, mut v) = (self.mean.read(run)?, self.square.read(run)?);
            let rate = learning_rate * run.factor;
            let _ = m.f_mul_scalar_(b1)?;
            add_scaled(&mut m, &g, 1.0 - b1)?;
            let _ = v.f_mul_scalar_(b2)?.f_addcmul_(&g.f_mul_scalar(1.0 - b2)?, &g)?;
            let _ = p.f_mul_scalar_(1.0 - rate * weight_decay)?;
            let denominator = v.f_sqrt()?.f_div_scalar_(c2)?.f_add_scalar_(eps)?;
            let _ = p.f_addcdiv_(&m.f_mul_scalar(-(rate / c1))?, &denominator)?;
            self.mean.write(run, &m)?;
            self.square.write(run, &v)?;
        }
        Ok(())
    }

    fn rule(&self) -> Option<Rule<'_>> {
        let Options { betas: (b1, b2), eps, weight_decay, .. } = self.options;
        let range = |run: &Run| Part { start: run.start, end: run.start + run.length, factor: run.factor };
        Some(Rule {
            kernel: "adamw8bit",
            numbers: vec![b1, b2, eps, weight_decay],
            state: [&self.mean, &self.square].into_iter().flat_map(Means::tensors).collect(),
            carried: Vec::new(),
            way: Way::Once,
            ranges: self.runs.iter().map(range).collect(),
            blocks: Some(self.runs.iter().map(|run| (run.kept, run.small)).collect()),
        })
    }

    fn state(&self) -> Vec<(&'static str, &Tensor)> {
        let mean = self.mean.state(["exp_avg", "state1", "absmax1"]);
        mean.chain(self.square.state(["exp_avg_sq", "state2", "absmax2"])).collect()
    }
}

/// `bitsandbytes.functional.create_dynamic_map`: for every power of ten from 1e-6 to 1 the middles of 2^i equal parts (2^(i+1) without
/// sign) of [0.1, 1], i from 0 to 6; and 0 and 1.
fn dynamic_map(signed: bool) -> Vec<f32> {
    let mut values = vec![0.0, 1.0];
    for i in 0..7 {
        let count = 1usize << if signed { i } else { i + 1 };
        // torch.linspace in fp32, from both ends to the middle.
        let step = (1.0f32 - 0.1) / count as f32;
        let bound = |k: usize| {
            if k < count.div_ceil(2) {
                0.1 + step * k as f32
            } else {
                1.0 - step * (count - k) as f32
            }
        };
        let power = 10f64.powi(i - 6) as f32;
        for k in 0..count {
            let value = power * ((bound(k) + bound(k + 1)) / 2.0);
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_that_of_bitsandbytes() {
        let (signed, unsigned) = (dynamic_map(true), dynamic_map(false));
        assert_eq!((signed.len(), unsigned.len()), (256, 256));
        // create_dynamic_map(True)[[0, 1, 127, 128, 255]], create_dynamic_map(False)[[0, 1, 2, 254, 255]]
        assert_eq!(
            [0, 1, 127, 128, 255].map(|i| signed[i]),
            [-0.992_968_74, -0.978_906_3, 0.0, 5.500_000_4e-7, 1.0]
        );
        assert_eq!(
            [0, 1, 2, 254, 255].map(|i| unsigned[i]),
            [0.0, 3.250_000_3e-7, 7.75e-7, 0.996_484_4, 1.0]
        );
    }

    #[test]
    fn stored_means_are_the_nearest_codes_times_the_scale_of_their_block() {
        let layout = Layout::of(&[&[2 * SCALED]], 2 * SCALED);
        let master = Tensor::zeros([2 * SCALED as i64], (Kind::Float, tch::Device::Cpu));
        let options = Options { min_8bit_size: 0, ..Options::default() };
        let optimizer = AdamW8bit::new(options, &layout, &master).unwrap();
        let (means, run) = (&optimizer.mean, &optimizer.runs[0]);
        let values: Vec<f32> =
            (0..2 * SCALED).map(|i| if i < SCALED { (i as f32).sin() * 3.0 } else { 0.0 }).collect();
        means.write(run, &Tensor::from_slice(&values)).unwrap();
        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert_eq!(Vec::<f32>::try_from(&means.scales).unwrap(), [largest, 0.0]);
        let map = dynamic_map(true);
        let got = Vec::<f32>::try_from(&means.read(run).unwrap()).unwrap();
        for (value, got) in values.iter().zip(got) {
            let distance = |code: &f32| (code * largest - value).abs();
            let nearest = map.iter().map(distance).fold(f32::MAX, f32::min);
            assert!((got - value).abs() <= nearest + 1e-6, "{value}: {got}, the nearest is {nearest} away");
        }
    }
}
