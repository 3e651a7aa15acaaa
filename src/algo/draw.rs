//! Random masks in training. They depend on (seed, module, step, index) alone, so that backward and a checkpointed forward compute the same
//! ones again, a resumed run goes on with the same ones, and every device has the same ones.
//!
//! The step is a tensor on the device: a captured CUDA graph draws anew at every replay.

use crate::error::Result;
use tch::{Device, Kind, Tensor};

/// The shares of what training leaves out, each in [0, 1).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropout {
    /// Of the values behind `down` (LoRA), or of the module's output.
    pub values: f64,
    /// Of the ranks, for each sample of the batch (LoRA), or of the rows of dW.
    pub ranks: f64,
    /// Of the modules.
    pub modules: f64,
}

impl Dropout {
    /// Whether anything is left out.
    pub fn any(&self) -> bool {
        self.values > 0.0 || self.ranks > 0.0 || self.modules > 0.0
    }
}

/// One module's source of randomness in one micro-step.
#[derive(Debug)]
pub struct Draw {
    /// The number of the micro-step, i64, on the device.
    step: Tensor,
    /// Made of the seed and the module's name.
    key: u64,
    dropout: Dropout,
}

/// What a number is drawn for; each has a stream of its own.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// [`Dropout::values`].
    Values,
    /// [`Dropout::ranks`].
    Ranks,
    /// [`Dropout::modules`].
    Modules,
    /// A choice that the algorithm itself makes.
    Own,
}

impl Draw {
    /// For the module whose stream is `key`.
    pub fn new(step: &Tensor, key: u64, dropout: Dropout) -> Self {
        Draw { step: step.shallow_clone(), key, dropout }
    }

    /// Whether anything may be left out.
    pub fn leaves_out(&self) -> bool {
        self.dropout.any()
    }

    /// Numbers in [0, 1), f32.
    pub fn uniform(&self, purpose: Purpose, shape: &[i64]) -> Result<Tensor> {
        let stream = self.key.wrapping_add((purpose as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03)) as i64;
        let count = shape.iter().product::<i64>();
        let key = mix(&self.step.f_add_scalar(stream)?)?;
        let index = Tensor::f_arange(count, (Kind::Int64, self.device()))?;
        let bits = mix(&index.f_add(&key)?)?;
        // 24 bits are what an f32 in [0, 1) holds.
        let upper = shifted(&bits, 40)?.f_to_kind(Kind::Float)?;
        Ok(upper.f_mul_scalar(1.0 / (1u64 << 24) as f64)?.f_reshape(shape)?)
    }

    /// 1 / (1 - share) where something stays, 0 where it is left out.
    fn mask(&self, purpose: Purpose, share: f64, shape: &[i64], kind: Kind) -> Result<Tensor> {
        let kept = self.uniform(purpose, shape)?.f_ge(share)?;
        Ok(kept.f_to_kind(kind)?.f_mul_scalar(1.0 / (1.0 - share))?)
    }

    /// `values` with some of them left out.
    pub fn values(&self, values: Tensor) -> Result<Tensor> {
        match self.dropout.values {
            0.0 => Ok(values),
            share => {
                let mask = self.mask(Purpose::Values, share, &values.size(), values.f_kind()?)?;
                Ok(values.f_mul(&mask)?)
            }
        }
    }

    /// A mask of ranks or rows, of this shape; `None` leaves out none.
    pub fn ranks(&self, shape: &[i64], kind: Kind) -> Result<Option<Tensor>> {
        match self.dropout.ranks {
            0.0 => Ok(None),
            share => self.mask(Purpose::Ranks, share, shape, kind).map(Some),
        }
    }

    /// The module's whole output, or nothing; as in sd-scripts it is not made larger for the times that it is left out.
    pub fn module(&self, output: Tensor) -> Result<Tensor> {
        match self.dropout.modules {
            0.0 => Ok(output),
            share => {
                let kept = self.uniform(Purpose::Modules, &[])?.f_ge(share)?.f_to_kind(output.f_kind()?)?;
                Ok(output.f_mul(&kept)?)
            }
        }
    }

    fn device(&self) -> Device {
        self.step.device()
    }
}

/// The bits above the lowest `by`, as of an unsigned number.
fn shifted(x: &Tensor, by: i64) -> Result<Tensor> {
    Ok(x.f_bitwise_right_shift_tensor_scalar(by)?.f_bitwise_and(((1u64 << (64 - by)) - 1) as i64)?)
}

/// SplitMix64's finaliser (Steele, Lea, Flood 2014) of every element, behind one step of its counter.
fn mix(x: &Tensor) -> Result<Tensor> {
    const GOLDEN: i64 = 0x9e37_79b9_7f4a_7c15_u64 as i64;
    const A: i64 = 0xbf58_476d_1ce4_e5b9_u64 as i64;
    const B: i64 = 0x94d0_49bb_1331_11eb_u64 as i64;
    let z = x.f_add_scalar(1)?.f_mul_scalar(GOLDEN)?;
    let z = z.f_bitwise_xor_tensor(&shifted(&z, 30)?)?.f_mul_scalar(A)?;
    let z = z.f_bitwise_xor_tensor(&shifted(&z, 27)?)?.f_mul_scalar(B)?;
    Ok(z.f_bitwise_xor_tensor(&shifted(&z, 31)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mix_is_splitmix() {
        let got = Vec::<i64>::try_from(mix(&Tensor::from_slice(&[0i64, 1, 2])).unwrap());
        // Of the counters 0, 1, 2 with the seed 0: as published.
        let first = [0xe220_a839_7b1d_cdaf_u64, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f];
        assert_eq!(got.unwrap(), first.map(|v| v as i64));
    }

    #[test]
    fn numbers_are_uniform_and_streams_differ() {
        let step = |n: i64| Tensor::from(n);
        let draw = |n, key| Draw::new(&step(n), key, Dropout::default());
        let numbers = |d: Draw, purpose| {
            Vec::<f32>::try_from(d.uniform(purpose, &[300, 300]).unwrap().reshape([-1])).unwrap()
        };
        let base = numbers(draw(1, 7), Purpose::Values);
        let mean = base.iter().map(|&v| f64::from(v)).sum::<f64>() / base.len() as f64;
        // Five standard errors of 1 / sqrt(12 * 90000).
        assert!((mean - 0.5).abs() < 0.0049, "{mean}");
        assert!(base.iter().all(|v| (0.0..1.0).contains(v)));
        assert_eq!(base, numbers(draw(1, 7), Purpose::Values));
        for other in [
            numbers(draw(2, 7), Purpose::Values),
            numbers(draw(1, 8), Purpose::Values),
            numbers(draw(1, 7), Purpose::Ranks),
        ] {
            let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 10, "{same} of {}", base.len());
        }
    }

    #[test]
    fn a_mask_keeps_the_mean() {
        let draw = Draw::new(&Tensor::from(3i64), 5, Dropout { values: 0.25, ..Dropout::default() });
        let got = draw.values(Tensor::ones([40_000], (Kind::Float, Device::Cpu))).unwrap();
        let zeros = got.eq(0.0).sum(Kind::Double).double_value(&[]);
        // Five standard deviations of a binomial distribution: 5 * sqrt(40000 * 3 / 16) = 433.
        assert!((zeros - 10_000.0).abs() < 433.0, "{zeros}");
        assert!((got.max().double_value(&[]) - 4.0 / 3.0).abs() < 1e-6);
    }
}
