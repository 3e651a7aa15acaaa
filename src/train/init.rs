//! Start values that depend on (seed, module name, slot, index) and on nothing else: not on torch's generator, on the order in which a
//! host registers modules, on the device, or on the number of threads.

use crate::algo::training::Init;
use sha2::{Digest, Sha256};

/// Fills `values` with the start values of one parameter.
pub(super) fn fill(values: &mut [f32], init: &Init, seed: u64, module: &str, slot: &str) {
    let key = key(seed, module, slot);
    match init {
        Init::Constant(value) => values.fill(*value),
        Init::Values(given) => values.copy_from_slice(given),
        Init::Uniform { bound } => {
            for (i, v) in values.iter_mut().enumerate() {
                *v = ((2.0 * unit(key, i as u64) - 1.0) * bound) as f32;
            }
        }
        Init::Normal { deviation } => {
            // Box and Muller 1958: two uniform numbers make a normal one.
            for (i, v) in values.iter_mut().enumerate() {
                let (radius, angle) = (unit(key, 2 * i as u64), unit(key, 2 * i as u64 + 1));
                let normal = (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos();
                *v = (normal * deviation) as f32;
            }
        }
    }
}

/// In (0, 1) and symmetric about 1/2: the upper 53 bits, centred.
fn unit(key: u64, index: u64) -> f64 {
    ((mix(key, index) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// The stream of one parameter, or of one module's choices. The separators keep ("ab", "c") and ("a", "bc") apart.
pub(super) fn key(seed: u64, module: &str, slot: &str) -> u64 {
    let digest = Sha256::new()
        .chain_update(seed.to_le_bytes())
        .chain_update(module)
        .chain_update([0])
        .chain_update(slot)
        .finalize();
    digest.iter().take(8).fold(0, |key, &byte| (key << 8) | u64::from(byte))
}

/// SplitMix64 (Steele, Lea, Flood 2014), addressed by index.
fn mix(key: u64, index: u64) -> u64 {
    let mut z = key.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_gives_its_published_values() {
        let first = [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f];
        assert_eq!([0, 1, 2].map(|i| mix(0, i)), first);
    }

    #[test]
    fn uniform_has_the_moments_of_a_uniform_distribution() {
        let mut values = vec![0f32; 200_000];
        fill(&mut values, &Init::Uniform { bound: 0.25 }, 7, "module", "slot");
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / n;
        // Standard errors: 0.25 / sqrt(3 n) = 3.2e-4 of the mean, 0.0625 * sqrt(4 / 45 n) = 4.2e-5 of the variance; five of them.
        assert!(mean.abs() < 1.6e-3, "{mean}");
        assert!((variance - 0.0625 / 3.0).abs() < 2.1e-4, "{variance}");
        assert!(values.iter().all(|v| v.abs() <= 0.25));
    }

    #[test]
    fn normal_has_the_moments_of_a_normal_distribution() {
        let mut values = vec![0f32; 200_000];
        fill(&mut values, &Init::Normal { deviation: 0.5 }, 7, "module", "slot");
        let n = values.len() as f64;
        let moment = |k| values.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / n;
        // Five standard errors: 0.5 / sqrt(n), 0.25 * sqrt(2 / n), 0.0625 * sqrt(96 / n).
        assert!(moment(1).abs() < 5.6e-3, "{}", moment(1));
        assert!((moment(2) - 0.25).abs() < 4e-3, "{}", moment(2));
        assert!((moment(4) - 3.0 * 0.0625).abs() < 7e-3, "{}", moment(4));
    }

    #[test]
    fn seed_module_and_slot_each_choose_another_stream() {
        let first = |seed, module, slot| {
            let mut values = [0f32; 4];
            fill(&mut values, &Init::Uniform { bound: 1.0 }, seed, module, slot);
            values.map(f32::to_bits)
        };
        let base = first(1, "ab", "c");
        assert_eq!(base, first(1, "ab", "c"));
        for other in [first(2, "ab", "c"), first(1, "abc", "c"), first(1, "a", "bc"), first(1, "ab", "d")] {
            assert!(base.iter().zip(other).all(|(&a, b)| a != b));
        }
    }
}
