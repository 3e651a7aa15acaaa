//! Merging methods on whole matrices, as PEFT names them.
//!
//! | method | formula |
//! |---|---|
//! | magnitude prune | sum of `w_i * top(d_i)` |
//! | DARE (Yu et al., arXiv:2311.03099) | sum of `w_i * drop(d_i) / density` |
//! | TIES (Yadav et al., arXiv:2306.01708) | per element the sign of `sum of s_i * top(d_i)`; then the sum of those `w_i * top(d_i)` that have it, divided by their number |
//!
//! `top` keeps the `density` share of a module's elements that are largest in magnitude, `drop` keeps each with the probability `density`.
//! s_i is the sign of w_i: a negative weight takes part as its module negated, where PEFT elects as if it were positive.

use crate::linalg::{splitmix, Matrix};

/// One of the methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sparse {
    /// Magnitude prune.
    Prune,
    /// DARE.
    Dare,
    /// TIES.
    Ties,
}

/// Merges matrices of one size, each with its weight. `seed` is for DARE.
pub fn merge(method: Sparse, parts: Vec<(Matrix, f64)>, density: f64, seed: u64) -> Matrix {
    let mut parts: Vec<(Matrix, f32)> = parts.into_iter().map(|(m, w)| (m, w as f32)).collect();
    for (i, (matrix, _)) in parts.iter_mut().enumerate() {
        match method {
            Sparse::Dare => drop_some(&mut matrix.values, density, seed.wrapping_add(i as u64)),
            Sparse::Prune | Sparse::Ties => keep_largest(&mut matrix.values, density),
        }
    }
    let (rows, cols) = parts.first().map_or((0, 0), |(m, _)| (m.rows, m.cols));
    let mut out = Matrix::zeros(rows, cols);
    for (at, out) in out.values.iter_mut().enumerate() {
        let terms = || parts.iter().map(|(m, w)| (m.values[at], *w));
        if method != Sparse::Ties {
            *out = terms().map(|(v, w)| v * w).sum();
            continue;
        }
        let elected = terms().map(|(v, w)| v * w.signum()).sum::<f32>() >= 0.0;
        let agreeing =
            || terms().map(|(v, w)| (v * w, v)).filter(|(v, _)| *v != 0.0 && (*v > 0.0) == elected);
        let count = agreeing().count().max(1);
        *out = agreeing().map(|(v, _)| v).sum::<f32>() / count as f32;
    }
    out
}

/// Sets all but the largest `density` share to 0.
fn keep_largest(values: &mut [f32], density: f64) {
    let keep = (density * values.len() as f64) as usize;
    if keep >= values.len() {
        return;
    }
    let mut sizes: Vec<f32> = values.iter().map(|v| v.abs()).collect();
    // Of equal ones on the border the first are kept.
    let (larger, border) = match keep {
        0 => (0, f32::INFINITY),
        _ => {
            let (before, border, _) = sizes.select_nth_unstable_by(keep - 1, |a, b| b.total_cmp(a));
            (before.iter().filter(|v| **v > *border).count(), *border)
        }
    };
    let mut left = keep - larger;
    for v in values {
        let size = v.abs();
        let stays = size > border || (size == border && left > 0);
        left -= usize::from(stays && size == border);
        if !stays {
            *v = 0.0;
        }
    }
}

/// Keeps each with the probability `density`, enlarged so that the expected sum stays.
fn drop_some(values: &mut [f32], density: f64, seed: u64) {
    let (mut state, least) = (seed, density * (1u64 << 53) as f64);
    for v in values {
        let kept = ((splitmix(&mut state) >> 11) as f64) < least;
        *v = if kept { (f64::from(*v) / density) as f32 } else { 0.0 };
    }
}

/// A seed of its own for every module.
pub fn seed_of(seed: u64, module: &str) -> u64 {
    // FNV-1a.
    let hash = module
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let mut state = seed ^ hash;
    splitmix(&mut state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn m(values: &[f32]) -> Matrix {
        Matrix::new(values.to_vec(), 1, values.len())
    }

    #[test]
    fn the_largest_stay() {
        let keep = |values: &[f32], density| {
            let mut values = values.to_vec();
            keep_largest(&mut values, density);
            values
        };
        assert_eq!(keep(&[1.0, -3.0, 2.0, 0.5], 0.5), [0.0, -3.0, 2.0, 0.0]);
        assert_eq!(keep(&[1.0, -1.0, 1.0, 2.0], 0.5), [1.0, 0.0, 0.0, 2.0]);
        assert_eq!(keep(&[1.0, 2.0], 0.1), [0.0, 0.0]);
        assert_eq!(keep(&[1.0, 2.0], 1.0), [1.0, 2.0]);
        assert_eq!(keep(&[0.0, 0.0, 1.0, 0.0], 0.75), [0.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn ties_elects_a_sign_and_means_what_agrees() {
        let parts =
            vec![(m(&[4.0, -1.0, 3.0]), 1.0), (m(&[2.0, 3.0, -1.0]), 0.5), (m(&[-1.0, 1.0, 0.0]), 2.0)];
        // Signs of 5, 3, 2: positive. Means of {4, 1}, {1.5, 2}, {3}.
        assert_eq!(merge(Sparse::Ties, parts, 1.0, 0).values, [2.5, 1.75, 3.0]);
        let one = merge(Sparse::Ties, vec![(m(&[1.0, -2.0]), -1.0)], 1.0, 0);
        assert_eq!(one.values, [-1.0, 2.0], "a negative weight negates");
    }

    #[test]
    fn pruning_sums_what_is_left() {
        let parts = vec![(m(&[4.0, 1.0]), 0.5), (m(&[1.0, -3.0]), -1.0)];
        assert_eq!(merge(Sparse::Prune, parts, 0.5, 0).values, [2.0, 3.0]);
    }

    #[test]
    fn dare_keeps_the_mean_and_its_seed() {
        let ones = || vec![(m(&vec![1.0; 40_000]), 1.0)];
        let merged = merge(Sparse::Dare, ones(), 0.25, 7);
        assert!(merged.values.iter().all(|v| *v == 0.0 || *v == 4.0));
        // 40000 draws of variance 3: five standard deviations of the mean.
        let mean = merged.values.iter().sum::<f32>() / 40_000.0;
        assert!((mean - 1.0).abs() < 5.0 * (3.0f32 / 40_000.0).sqrt(), "{mean}");
        assert_eq!(merge(Sparse::Dare, ones(), 0.25, 7), merged);
        assert_ne!(merge(Sparse::Dare, ones(), 0.25, 8), merged);
        assert_eq!(merge(Sparse::Dare, ones(), 1.0, 8).values, vec![1.0; 40_000]);
        assert_ne!(seed_of(1, "a"), seed_of(1, "b"));
    }
}
