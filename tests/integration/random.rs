//! Random numbers that are the same in every run, and values in the dtypes of weights.

use lycore::dtype::Float;
use lycore::view::{Device, View};

/// xorshift64*: the same cases in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

pub fn view(bytes: &mut [u8], float: Float, shape: &[usize]) -> View {
    // SAFETY: the tests keep the bytes alive and use them from one place at a time.
    unsafe { View::from_raw(bytes.as_mut_ptr(), Device::Cpu, float.dtype(), shape, None) }
        .expect("a good view")
}

pub fn packed(float: Float, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * float.size()];
    float.write(values, &mut bytes);
    bytes
}

pub fn unpacked(float: Float, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / float.size()];
    float.read(bytes, &mut values);
    values
}

/// Distance to the next value of this dtype at the size of `value`.
pub fn ulp(float: Float, value: f64) -> f64 {
    let digits = match float {
        Float::F32 => 23,
        Float::F16 => 10,
        Float::BF16 => 7,
        Float::E4M3 => 3,
        Float::E5M2 => 2,
    };
    let exponent = value.abs().max(2f64.powi(-14)).log2().floor();
    2f64.powf(exponent - f64::from(digits))
}
