//! A number for the bits of a weight, to prove that restore gave them back: the sum over the elements of `h(code ^ index * 0x9e3779b97f4a7c15)`,
//! modulo 2^64, `h(x) = y ^ y >> 32`, `y = (x ^ x >> 32) * 0xd6e8feb86659fd93`. `kernels/checksum.cu` computes the same.

use super::cuda;
use crate::cuda::Stream;
use crate::dtype::Float;
use crate::error::Result;
use crate::view::{Device, View};
use rayon::prelude::*;

/// The numbers of weights that are all on one device. On a GPU they are computed on `stream`, which is waited for.
pub fn of(weights: &[(&str, &View)], stream: Stream) -> Result<Vec<u64>> {
    match weights.first().map(|(_, view)| view.device()) {
        Some(Device::Cuda(index)) => super::fused(index)?.on(stream, |queue| cuda::checksums(queue, weights)),
        _ => weights.iter().map(|(name, view)| on_host(name, view)).collect(),
    }
}

fn on_host(name: &str, view: &View) -> Result<u64> {
    let size = Float::require(view.dtype(), name)?.size();
    let bytes = cuda::packed(name, view, view.dtype())?;
    let hash = |(index, code): (usize, &[u8])| {
        let code = code.iter().rev().fold(0u64, |code, &byte| code << 8 | u64::from(byte));
        let x = code ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let y = (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
        y ^ y >> 32
    };
    let elements = bytes.par_chunks_exact(size).enumerate();
    Ok(super::gemm::on_pool(|| elements.map(hash).reduce(|| 0, u64::wrapping_add)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Tensor;

    #[test]
    fn every_bit_and_place_counts() {
        let sum = |values: &[f32]| {
            let tensor = Tensor::of_f32(values.to_vec(), &[values.len()]);
            of(&[("w", tensor.view())], Stream::default()).unwrap()[0]
        };
        let base = sum(&[1.0, -2.0, 0.0, 4.0]);
        assert_eq!(base, sum(&[1.0, -2.0, 0.0, 4.0]));
        for other in [[1.0, -2.0, -0.0, 4.0], [-2.0, 1.0, 0.0, 4.0], [1.0, -2.0, 0.0, 4.000_000_5]] {
            assert_ne!(base, sum(&other), "{other:?}");
        }
    }
}
