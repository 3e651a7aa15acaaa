//! Small dense linear algebra in f64, for the preparation of factors and for the tools: a thin door to the `faer` crate.

use faer::linalg::solvers::Solve;
use faer::{Mat, MatRef};
use rayon::prelude::*;

/// The Cayley transforms `(I + Q)(I - Q)^-1` of square blocks of size `b`, row-major one behind the other. `None` when a value is not finite.
/// Q is skew-symmetric, so that `I - Q` always has an inverse.
pub fn cayley(q: &[f64], b: usize) -> Option<Vec<f64>> {
    if q.iter().any(|v| !v.is_finite()) {
        return None;
    }
    let mut out = vec![0f64; q.len()];
    crate::merge::gemm::on_pool(|| {
        out.par_chunks_exact_mut(b * b).zip(q.par_chunks_exact(b * b)).for_each(|(out, q)| {
            let one = |i, j| if i == j { 1.0 } else { 0.0 };
            let q = MatRef::from_row_major_slice(q, b, b);
            let minus = Mat::from_fn(b, b, |i, j| one(i, j) - q[(i, j)]);
            let plus = Mat::from_fn(b, b, |i, j| one(i, j) + q[(i, j)]);
            // Both are polynomials in Q, so the order of the two does not matter.
            let r = minus.partial_piv_lu().solve(&plus);
            out.iter_mut().enumerate().for_each(|(at, o)| *o = r[(at / b, at % b)]);
        });
    });
    Some(out)
}

/// a @ b of two square matrices of size `n`, row-major.
pub fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    let c = MatRef::from_row_major_slice(a, n, n) * MatRef::from_row_major_slice(b, n, n);
    (0..n * n).map(|at| c[(at / n, at % n)]).collect()
}

/// The nearest matrix of this rank to a row-major [rows, cols] one: its leading singular directions. `None` when a value is not finite.
pub fn nearest_of_rank(values: &[f32], rows: usize, cols: usize, rank: usize) -> Option<Vec<f32>> {
    if values.iter().any(|v| !v.is_finite()) {
        return None;
    }
    // The eigenvectors of the smaller Gram matrix are the singular vectors of the shorter side.
    let w = Mat::from_fn(rows, cols, |i, j| f64::from(values[i * cols + j]));
    let tall = rows >= cols;
    let gram = if tall { w.transpose() * &w } else { &w * w.transpose() };
    let eigen = gram.self_adjoint_eigen(faer::Side::Lower).ok()?;
    let n = rows.min(cols);
    // Eigenvalues come in rising order.
    let lead = eigen.U().subcols(n - rank.min(n), rank.min(n));
    let near = if tall { (&w * lead) * lead.transpose() } else { lead * (lead.transpose() * &w) };
    Some((0..rows * cols).map(|at| near[(at / cols, at % cols)] as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cayley_transform_is_the_rotation_of_the_formula() {
        // Q = [[0, t], [-t, 0]]: (I + Q)(I - Q)^-1 turns by 2 atan(t).
        let t = 0.3f64;
        let r = cayley(&[0.0, t, -t, 0.0, 0.0, 0.0, 0.0, 0.0], 2).unwrap();
        let (cos, sin) = ((1.0 - t * t) / (1.0 + t * t), 2.0 * t / (1.0 + t * t));
        for (got, want) in r.iter().zip([cos, sin, -sin, cos, 1.0, 0.0, 0.0, 1.0]) {
            assert!((got - want).abs() < 1e-15, "{got} {want}");
        }
        assert!(cayley(&[0.0, f64::NAN, 0.0, 0.0], 2).is_none());
    }

    #[test]
    fn the_nearest_matrix_of_the_own_rank_is_the_matrix() {
        for (rows, cols) in [(7, 5), (5, 7)] {
            let outer = |i: usize, r: usize| ((i * 3 + r * 5) as f64).sin();
            let value =
                |at: usize| (0..2).map(|r| outer(at / cols, r) * outer(at % cols, r + 9)).sum::<f64>();
            let values: Vec<f32> = (0..rows * cols).map(|at| value(at) as f32).collect();
            let near = nearest_of_rank(&values, rows, cols, 2).unwrap();
            assert!(near.iter().zip(&values).all(|(a, b)| (a - b).abs() < 1e-6));
            let first = nearest_of_rank(&values, rows, cols, 1).unwrap();
            assert!(first.iter().zip(&values).any(|(a, b)| (a - b).abs() > 1e-2));
        }
    }
}
