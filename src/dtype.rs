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
}

impl Float {
    /// The computable dtype behind a file's or a host's dtype.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Float::F32),
            Dtype::F16 => Some(Float::F16),
            Dtype::BF16 => Some(Float::BF16),
            _ => None,
        }
    }

    /// Like [`Float::of`], with an error that names the tensor.
    pub fn require(dtype: Dtype, tensor: &str) -> Result<Self> {
        Float::of(dtype).ok_or_else(|| Error::Dtype {
            tensor: tensor.to_owned(),
            got: dtype.to_string(),
            supported: "F32, F16, BF16",
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
        }
    }

    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::BF16 => 2,
        }
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
        }
    }

    /// Writes `values` as little-endian elements, rounded to nearest even.
    pub fn write(self, values: &[f32], bytes: &mut [u8]) {
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
}
