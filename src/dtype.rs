//! Element types: their sizes (by checked arithmetic, in this one place), conversion to f32, rounding from f32.

use crate::error::{Error, Result};
use half::{bf16, f16};
pub use safetensors::Dtype;

/// Bytes that `shape` elements of `dtype` take; `None` when 64 bits cannot count them or the last byte is not full.
pub fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let bits = element_count(shape)?.checked_mul(dtype.bitsize())?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// Number of elements of `shape`; `None` on overflow. A shape without axes holds one.
pub fn element_count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// The dtypes that weights and factors are computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    BF16,
    /// 8 bits, 3 of them mantissa, no infinity ("fn"); up to 448.
    E4M3,
    /// 8 bits, 2 of them mantissa, with infinity; up to 57344.
    E5M2,
}

/// How a value is rounded into a dtype of 8 bits; into wider ones it is always rounded to nearest.
///
/// # Stochastic rounding
/// The same on every device, bit for bit. Element `i` (row-major in its weight, 64 bits) gets 16 random bits [`random`]`(seed, i)`. Of the
/// value `v` in f32, let `m` be the magnitude, `M` the bits that f32 has more than the format's mantissa (20 for E4M3, 21 for E5M2), and
/// `2^-S` the distance of its subnormals (9, 16):
///
/// - `m` below the smallest normal (`2^-6`, `2^-14`): `code = (u32(m * 2^(S + 16)) + r) >> 16`, where the product is exact and `u32` cuts off;
/// - else: `code = ((bits(m) + (r << (M - 16))) >> M) - (120 << 3)` (E5M2: `- (112 << 2)`), at most the code of the largest finite value.
///
/// The sign is put before the code. A value that the format holds is never changed. NaN and infinity are as with `Nearest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    /// Up with the probability of how far it is on the way up.
    Stochastic {
        /// One per weight, so that equal weights are not rounded alike.
        seed: u32,
    },
}

/// The random bits of element `i`: two elements share a hash, so that a pair costs one.
pub fn random(seed: u32, i: u64) -> u32 {
    let pair = i / 2;
    let low = (pair as u32).wrapping_mul(0x9E37_79B1);
    let mut x = low.wrapping_add(seed).wrapping_add(((pair >> 32) as u32).wrapping_mul(0x85EB_CA77));
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^= x >> 16;
    if i % 2 == 0 {
        x & 0xffff
    } else {
        x >> 16
    }
}

/// A format of 8 bits with a sign, by its numbers of bits.
struct Eight {
    mantissa: u32,
    /// `2^-subnormal` is the distance of the values below the smallest normal one.
    subnormal: i32,
    /// f32's bias less this one's.
    bias: u32,
    /// Code of the largest finite value.
    max: u32,
    infinity: Option<u32>,
}

const E4M3: Eight = Eight { mantissa: 3, subnormal: 9, bias: 120, max: 0x7e, infinity: None };
const E5M2: Eight = Eight { mantissa: 2, subnormal: 16, bias: 112, max: 0x7b, infinity: Some(0x7c) };

impl Eight {
    /// The value of each code.
    const fn table(&self) -> [f32; 256] {
        let mut table = [0f32; 256];
        let mut code = 0;
        while code < 256 {
            let (sign, low) = ((code as u32 & 0x80) << 24, code as u32 & 0x7f);
            let shift = 23 - self.mantissa;
            let special = low > self.max;
            let bits = if special {
                // Infinity, where there is one, has an empty mantissa as in f32.
                let mantissa = low & ((1 << self.mantissa) - 1);
                0x7f80_0000 | (mantissa << shift)
            } else if low >> self.mantissa == 0 {
                // low * 2^-subnormal, exact.
                (low as f32 * f32::from_bits(((127 - self.subnormal) as u32) << 23)).to_bits()
            } else {
                (low << shift) + (self.bias << 23)
            };
            table[code] = f32::from_bits(sign | bits);
            code += 1;
        }
        table
    }

    /// The code of a value. `random` is given for stochastic rounding, 16 bits.
    fn code(&self, value: f32, random: Option<u32>) -> u8 {
        let (sign, bits) = ((value.to_bits() >> 24) & 0x80, value.to_bits() & 0x7fff_ffff);
        let shift = 23 - self.mantissa;
        let code = if bits > 0x7f80_0000 {
            // Of several NaN codes the one with the same mantissa; an empty one would be infinity.
            let mantissa = (bits >> shift) & ((1 << self.mantissa) - 1);
            match self.infinity {
                Some(infinity) if mantissa != 0 => infinity | mantissa,
                _ => 0x7f,
            }
        } else if bits == 0x7f80_0000 {
            self.infinity.unwrap_or(self.max)
        } else if bits < (self.bias + 1) << 23 {
            // 2^n, exact.
            let power = |n: i32| f32::from_bits(((127 + n) as u32) << 23);
            let m = f32::from_bits(bits);
            match random {
                Some(r) => ((m * power(self.subnormal + 16)) as u32 + r) >> 16,
                None => {
                    // So large that its last bit is worth the distance of subnormals: the sum is rounded just there.
                    let large = power(23 - self.subnormal);
                    (m + large).to_bits() - large.to_bits()
                }
            }
        } else {
            let up = match random {
                Some(r) => r << (shift - 16),
                None => (1 << (shift - 1)) - 1 + ((bits >> shift) & 1),
            };
            (((bits + up) >> shift) - (self.bias << self.mantissa)).min(self.max)
        };
        (sign | code) as u8
    }

    fn write(&self, values: &[f32], bytes: &mut [u8], rounding: Rounding, first: u64) {
        let both = bytes.iter_mut().zip(values);
        match rounding {
            Rounding::Nearest => both.for_each(|(b, v)| *b = self.code(*v, None)),
            Rounding::Stochastic { seed } => {
                both.zip(first..).for_each(|((b, v), i)| *b = self.code(*v, Some(random(seed, i))));
            }
        }
    }
}

impl Float {
    /// The computable dtype behind a file's or a host's dtype.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Float::F32),
            Dtype::F16 => Some(Float::F16),
            Dtype::BF16 => Some(Float::BF16),
            Dtype::F8_E4M3 => Some(Float::E4M3),
            Dtype::F8_E5M2 => Some(Float::E5M2),
            _ => None,
        }
    }

    /// Like [`Float::of`], of 16 or 32 bits: what results may be written in without a thought.
    pub fn wide(dtype: Dtype) -> Option<Self> {
        Float::of(dtype).filter(|float| !float.is_eight_bits())
    }

    /// Like [`Float::of`], with an error that names the tensor.
    pub fn require(dtype: Dtype, tensor: &str) -> Result<Self> {
        Float::of(dtype).ok_or_else(|| Error::Dtype {
            tensor: tensor.to_owned(),
            got: dtype.to_string(),
            supported: "F32, F16, BF16, F8_E4M3, F8_E5M2",
        })
    }

    /// Parses a user's word: `fp32`, `fp16`, `bf16` and their usual spellings.
    pub fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "fp32" | "f32" | "float32" | "float" => Some(Float::F32),
            "fp16" | "f16" | "float16" | "half" => Some(Float::F16),
            "bf16" | "bfloat16" => Some(Float::BF16),
            _ => None,
        }
    }

    /// The file's name for it.
    pub fn dtype(self) -> Dtype {
        match self {
            Float::F32 => Dtype::F32,
            Float::F16 => Dtype::F16,
            Float::BF16 => Dtype::BF16,
            Float::E4M3 => Dtype::F8_E4M3,
            Float::E5M2 => Dtype::F8_E5M2,
        }
    }

    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::BF16 => 2,
            Float::E4M3 | Float::E5M2 => 1,
        }
    }

    /// Whether it has 8 bits: weights are stored so, usually with a scale, and nobody computes in it.
    pub fn is_eight_bits(self) -> bool {
        self.size() == 1
    }

    /// Reads little-endian elements into `out`. `bytes` may be unaligned and holds `out.len()` elements.
    pub fn read(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.size());
        match self {
            Float::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Float::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            Float::BF16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            Float::E4M3 | Float::E5M2 => {
                static TABLES: [[f32; 256]; 2] = [E4M3.table(), E5M2.table()];
                let table = &TABLES[usize::from(self == Float::E5M2)];
                out.iter_mut().zip(bytes).for_each(|(o, b)| *o = table[usize::from(*b)]);
            }
        }
    }

    /// Writes `values` as little-endian elements, rounded to nearest even. What is beyond the finite values of a dtype of 8 bits becomes the
    /// largest of them.
    pub fn write(self, values: &[f32], bytes: &mut [u8]) {
        self.write_rounded(values, bytes, Rounding::Nearest, 0);
    }

    /// As [`Float::write`], rounded as `rounding` says; `first` is the row-major index of the first value in its weight.
    pub fn write_rounded(self, values: &[f32], bytes: &mut [u8], rounding: Rounding, first: u64) {
        assert_eq!(bytes.len(), values.len() * self.size());
        match self {
            Float::F32 => {
                for (b, v) in bytes.chunks_exact_mut(4).zip(values) {
                    b.copy_from_slice(&v.to_le_bytes());
                }
            }
            Float::F16 => {
                for (b, v) in bytes.chunks_exact_mut(2).zip(values) {
                    b.copy_from_slice(&f16::from_f32(*v).to_le_bytes());
                }
            }
            Float::BF16 => {
                for (b, v) in bytes.chunks_exact_mut(2).zip(values) {
                    b.copy_from_slice(&bf16::from_f32(*v).to_le_bytes());
                }
            }
            Float::E4M3 => E4M3.write(values, bytes, rounding, first),
            Float::E5M2 => E5M2.write(values, bytes, rounding, first),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked() {
        assert_eq!(byte_len(Dtype::F16, &[3, 5]), Some(30));
        assert_eq!(byte_len(Dtype::F32, &[]), Some(4));
        assert_eq!(byte_len(Dtype::F32, &[usize::MAX, 2]), None);
        assert_eq!(byte_len(Dtype::F4, &[3]), None, "three half bytes are no whole number of bytes");
    }

    #[test]
    fn every_16_bit_value_survives_the_trip_through_f32() {
        for float in [Float::F16, Float::BF16] {
            for bits in 0..=u16::MAX {
                let (mut value, mut back) = ([0f32], [0u8; 2]);
                float.read(&bits.to_le_bytes(), &mut value);
                float.write(&value, &mut back);
                if value[0].is_nan() {
                    continue;
                }
                assert_eq!(u16::from_le_bytes(back), bits, "{float:?}");
            }
        }
    }

    #[test]
    fn ties_round_to_even() {
        let mut out = [0u8; 2];
        // 1 + 2^-8 lies halfway between two bf16 values; the even one is 1.
        Float::BF16.write(&[1.0 + 1.0 / 256.0], &mut out);
        assert_eq!(u16::from_le_bytes(out), 0x3f80);
        Float::BF16.write(&[1.0 + 3.0 / 256.0], &mut out);
        assert_eq!(u16::from_le_bytes(out), 0x3f82);
    }

    const EIGHT: [(Float, f32, u32); 2] = [(Float::E4M3, 448.0, 9), (Float::E5M2, 57344.0, 16)];

    fn code(float: Float, value: f32, rounding: Rounding, index: u64) -> u8 {
        let mut out = [0u8];
        float.write_rounded(&[value], &mut out, rounding, index);
        out[0]
    }

    fn value(float: Float, code: u8) -> f32 {
        let mut out = [0f32];
        float.read(&[code], &mut out);
        out[0]
    }

    #[test]
    fn every_8_bit_value_survives_every_rounding() {
        for (float, max, _) in EIGHT {
            for bits in 0..=u8::MAX {
                let v = value(float, bits);
                assert_eq!(code(float, v, Rounding::Nearest, 0), bits, "{float:?} {v}");
                for i in 0..64 {
                    let stochastic = Rounding::Stochastic { seed: 7 };
                    assert_eq!(code(float, v, stochastic, i), bits, "{float:?} {v}");
                }
            }
            let all = || (0..=u8::MAX).map(|c| value(float, c));
            assert_eq!(all().filter(|v| v.is_finite()).fold(0.0, f32::max), max);
            assert_eq!(all().filter(|v| v.is_nan()).count(), if float == Float::E4M3 { 2 } else { 6 });
        }
        assert_eq!(value(Float::E4M3, 0x01), 2f32.powi(-9));
        assert_eq!(value(Float::E4M3, 0x38), 1.0);
        assert_eq!(value(Float::E5M2, 0x83), -3.0 * 2f32.powi(-16));
        assert_eq!(value(Float::E5M2, 0x3e), 1.5);
    }

    #[test]
    fn ties_of_8_bits_round_to_even_and_neighbours_to_the_nearest() {
        for (float, ..) in EIGHT {
            let max = if float == Float::E4M3 { 0x7e } else { 0x7b };
            for low in 0..max {
                let (a, b) = (value(float, low), value(float, low + 1));
                let (middle, even) = ((a + b) / 2.0, if low % 2 == 0 { low } else { low + 1 });
                let nearest = |v: f32| code(float, v, Rounding::Nearest, 0);
                assert_eq!(nearest(middle), even, "{float:?} between {a} and {b}");
                assert_eq!(nearest(-middle), even | 0x80);
                assert_eq!(nearest(f32::from_bits(middle.to_bits() - 1)), low);
                assert_eq!(nearest(f32::from_bits(middle.to_bits() + 1)), low + 1);
            }
        }
    }

    #[test]
    fn what_is_too_large_for_8_bits_saturates_and_nan_stays() {
        for (float, max, _) in EIGHT {
            for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 1 }] {
                for i in 0..100 {
                    for large in [max, max * 1.01, max * 2.0, f32::MAX] {
                        assert_eq!(value(float, code(float, large, rounding, i)), max);
                        assert_eq!(value(float, code(float, -large, rounding, i)), -max);
                    }
                    assert!(value(float, code(float, f32::NAN, rounding, i)).is_nan());
                }
                let infinite = value(float, code(float, f32::NEG_INFINITY, rounding, 0));
                assert_eq!(infinite, if float == Float::E4M3 { -448.0 } else { f32::NEG_INFINITY });
                assert_eq!(code(float, f32::from_bits(1), Rounding::Nearest, 0), 0);
            }
        }
    }

    #[test]
    fn the_mean_of_stochastic_roundings_is_the_value() {
        const COUNT: u64 = 1 << 16;
        let mut values = vec![1e-4f32, 0.0017, 0.0019, 0.007, 0.013, 0.0171, 0.3, 1.03, 17.9, 333.3];
        values.extend(values.clone().iter().map(|v| -v));
        for (float, _, _) in EIGHT {
            for &v in &values {
                let rounded = |i| value(float, code(float, v, Rounding::Stochastic { seed: 42 }, i));
                let mean = (0..COUNT).map(|i| f64::from(rounded(i))).sum::<f64>() / COUNT as f64;
                let all: std::collections::BTreeSet<u32> =
                    (0..256).map(|i| rounded(i).abs().to_bits()).collect();
                // Two neighbours; their distance d bounds the deviation of one by d / 2, so that of the mean by d / 512: four of them here.
                let d = match (all.first(), all.last()) {
                    (Some(a), Some(b)) => f64::from(f32::from_bits(*b) - f32::from_bits(*a)),
                    _ => 0.0,
                };
                assert!(
                    all.len() <= 2 && (mean - f64::from(v)).abs() <= d / 128.0,
                    "{float:?} {v}: {mean}, {all:?}"
                );
            }
        }
    }

    #[test]
    fn stochastic_rounding_is_the_documented_one() {
        // Whoever computes these bits elsewhere compares with these numbers.
        let bits: Vec<u32> = [0, 1, 2, 3, 1 << 33, (1 << 33) + 1].map(|i| random(123, i)).to_vec();
        assert_eq!(bits, [35192, 50918, 11942, 33914, 56421, 41938]);
        let r = random(5, 10);
        let normal = 1.03f32;
        let want = ((normal.to_bits() + (r << 4)) >> 20) - (120 << 3);
        assert_eq!(u32::from(code(Float::E4M3, normal, Rounding::Stochastic { seed: 5 }, 10)), want);
        let small = 0.0071f32;
        let want = ((small * 2f32.powi(25)) as u32 + r) >> 16;
        assert_eq!(u32::from(code(Float::E4M3, -small, Rounding::Stochastic { seed: 5 }, 10)), want | 0x80);
    }
}
