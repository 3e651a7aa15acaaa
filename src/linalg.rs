//! Small dense linear algebra in f64, for the preparation of factors and for the tools: a thin door to the `faer` crate.

use crate::merge::gemm::add_product;
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

/// A row-major matrix of f32.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matrix {
    /// Row by row.
    pub values: Vec<f32>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

impl Matrix {
    /// From its values; as many as rows and columns say.
    pub fn new(values: Vec<f32>, rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols);
        Matrix { values, rows, cols }
    }

    /// All zero.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Matrix { values: vec![0f32; rows * cols], rows, cols }
    }

    fn view(&self) -> crate::merge::gemm::Mat<'_> {
        crate::merge::gemm::Mat::new(&self.values, self.rows, self.cols)
    }

    /// Adds `scale * a @ b`.
    pub fn add_product(&mut self, scale: f32, a: &Matrix, b: &Matrix) {
        add_product(&mut self.values, self.cols, 0, scale, a.view(), b.view(), false);
    }

    /// The sum of the squares, in f64.
    pub fn squares(&self) -> f64 {
        // Row sums first, so that no long sum loses its small terms.
        let row = |row: &[f32]| row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
        self.values.chunks(self.cols.max(1)).map(row).sum()
    }

    /// The values in f64, row-major.
    fn wide(&self) -> Vec<f64> {
        self.values.iter().map(|&v| f64::from(v)).collect()
    }

    fn narrow(m: MatRef<'_, f64>) -> Self {
        let mut values = vec![0f32; m.nrows() * m.ncols()];
        for (i, row) in values.chunks_exact_mut(m.ncols().max(1)).enumerate() {
            row.iter_mut().enumerate().for_each(|(j, v)| *v = m[(i, j)] as f32);
        }
        Matrix { values, rows: m.nrows(), cols: m.ncols() }
    }
}

/// The singular value decomposition of a product `up @ down`, without ever forming it.
///
/// With `up = Qu Ru` and `down' = Qd Rd` the core `Ru Rd'` is as small as the rank and has the product's singular values. With its
/// `U S V'`, the product's left vectors times S are `up Rd' V`, and its right ones `S^-1 U' Ru down`: neither Q is needed.
pub struct ProductSvd {
    /// Falling.
    pub values: Vec<f64>,
    /// `Rd' V`
    left: Mat<f64>,
    /// `Ru' U`
    right: Mat<f64>,
}

impl ProductSvd {
    /// Decomposes up [O, r] @ down [r, C]. `None` when a value is not finite.
    pub fn new(up: &Matrix, down: &Matrix) -> Option<Self> {
        let ru = r_factor(MatRef::from_row_major_slice(&up.wide(), up.rows, up.cols))?;
        let rd = r_factor(MatRef::from_row_major_slice(&down.wide(), down.rows, down.cols).transpose())?;
        let svd = (&ru * rd.transpose()).thin_svd().ok()?;
        let values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
        values.iter().all(|v| v.is_finite()).then(|| ProductSvd {
            values,
            left: rd.transpose() * svd.V(),
            right: ru.transpose() * svd.U(),
        })
    }

    /// The leading `rank` triples as factors of the nearest product of that rank: left vectors times their singular values, right vectors.
    /// `up` and `down` are those that were decomposed. Directions of singular value 0 have factors of 0.
    pub fn factors(&self, up: &Matrix, down: &Matrix, rank: usize) -> (Matrix, Matrix) {
        // Below this a direction is the rounding of the others.
        let least = self.values.first().map_or(0.0, |s| s * 1e-12);
        let rank = rank.min(self.values.len());
        let lives = |k: usize| self.values[k] > least;
        let left = Mat::from_fn(up.cols, rank, |i, k| if lives(k) { self.left[(i, k)] } else { 0.0 });
        let right = Mat::from_fn(rank, down.rows, |k, i| match lives(k) {
            true => self.right[(i, k)] / self.values[k],
            false => 0.0,
        });
        let (left, right) = (Matrix::narrow(left.as_ref()), Matrix::narrow(right.as_ref()));
        let (mut new_up, mut new_down) = (Matrix::zeros(up.rows, rank), Matrix::zeros(rank, down.cols));
        new_up.add_product(1.0, up, &left);
        new_down.add_product(1.0, &right, down);
        (new_up, new_down)
    }
}

/// The triangle of a QR decomposition, up to signs. `None` when a value is not finite.
fn r_factor(a: MatRef<'_, f64>) -> Option<Mat<f64>> {
    let columns = a.ncols();
    if a.nrows() >= columns {
        // Three times as fast as the decomposition, and as good where the square of the condition leaves digits enough.
        let gram = a.transpose() * a;
        let diagonal = (0..columns).map(|i| gram[(i, i)]);
        if !diagonal.sum::<f64>().is_finite() {
            return None;
        }
        if let Ok(llt) = gram.llt(faer::Side::Lower) {
            let diagonal = || (0..columns).map(|i| llt.L()[(i, i)]);
            let (least, most) = (diagonal().fold(f64::INFINITY, f64::min), diagonal().fold(0.0, f64::max));
            if least > 1e-5 * most {
                return Some(llt.L().transpose().to_owned());
            }
        }
    }
    let r = a.qr().thin_R().to_owned();
    // A bad value spreads to the diagonal of its column.
    (0..r.nrows().min(r.ncols())).all(|i| r[(i, i)].is_finite()).then_some(r)
}

/// All singular values and vectors of a matrix: (left times singular values, right, values). `None` when a value is not finite.
pub fn svd(a: &Matrix) -> Option<(Matrix, Matrix, Vec<f64>)> {
    if a.values.iter().any(|v| !v.is_finite()) {
        return None;
    }
    let svd = MatRef::from_row_major_slice(&a.wide(), a.rows, a.cols).thin_svd().ok()?;
    let values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let up = Mat::from_fn(a.rows, values.len(), |i, k| svd.U()[(i, k)] * values[k]);
    Some((Matrix::narrow(up.as_ref()), Matrix::narrow(svd.V().transpose()), values))
}

/// A product `q @ b` of rank `rank` near to `a`, whose range is that of a random sketch (Halko, Martinsson and Tropp, arXiv:0909.4061,
/// algorithms 4.4 and 5.1 with orthonormal power iterations). q has orthonormal columns and b is q' a, so that
/// `|a|^2 - |b|^2` is exactly the square of what is lost. Deterministic. `None` when a value is not finite.
pub fn sketch(a: &Matrix, rank: usize, iterations: usize) -> Option<(Matrix, Matrix)> {
    let rank = rank.min(a.rows).min(a.cols);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bits = || splitmix(&mut state);
    // Random signs sketch as well as a normal distribution does.
    let mut next = || if bits() >> 63 == 0 { 1f32 } else { -1f32 };
    let omega = Matrix::new((0..a.cols * rank).map(|_| next()).collect(), a.cols, rank);
    let range = |x: &Matrix| {
        let mut y = Matrix::zeros(a.rows, x.cols);
        y.add_product(1.0, a, x);
        orthonormal(&y)
    };
    let mut q = range(&omega)?;
    for _ in 0..iterations {
        q = range(&orthonormal(&transposed_product(a, &q))?)?;
    }
    let mut b = Matrix::zeros(q.cols, a.cols);
    add_product(&mut b.values, a.cols, 0, 1.0, q.view().t(), a.view(), false);
    Some((q, b))
}

/// a' @ q
fn transposed_product(a: &Matrix, q: &Matrix) -> Matrix {
    let mut z = Matrix::zeros(a.cols, q.cols);
    add_product(&mut z.values, q.cols, 0, 1.0, a.view().t(), q.view(), false);
    z
}

/// An orthonormal basis of the columns.
fn orthonormal(a: &Matrix) -> Option<Matrix> {
    if a.values.iter().any(|v| !v.is_finite()) {
        return None;
    }
    let qr = MatRef::from_row_major_slice(&a.wide(), a.rows, a.cols).qr();
    Some(Matrix::narrow(qr.compute_thin_Q().as_ref()))
}

/// The next number of a SplitMix64 generator (Steele et al. 2014).
pub fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
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

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut state = seed;
        let mut next = || (splitmix(&mut state) >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        Matrix::new((0..rows * cols).map(|_| next()).collect(), rows, cols)
    }

    fn product_of(a: &Matrix, b: &Matrix) -> Matrix {
        let mut out = Matrix::zeros(a.rows, b.cols);
        out.add_product(1.0, a, b);
        out
    }

    fn distance(a: &Matrix, b: &Matrix) -> f64 {
        let d = a.values.iter().zip(&b.values).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>();
        d.sqrt()
    }

    #[test]
    fn a_product_has_the_singular_values_of_what_it_makes() {
        for (o, r, c) in [(40, 6, 30), (4, 9, 50), (50, 9, 4), (7, 7, 7), (5, 1, 3)] {
            let (up, down) = (random(o, r, 1), random(r, c, 2));
            let whole = product_of(&up, &down);
            let (_, _, want) = svd(&whole).unwrap();
            let got = ProductSvd::new(&up, &down).unwrap();
            assert_eq!(got.values.len(), r.min(o).min(c));
            for (g, w) in got.values.iter().zip(&want) {
                assert!((g - w).abs() < 1e-6 * want[0], "{g} {w}");
            }
            for rank in 1..=got.values.len() {
                let (new_up, new_down) = got.factors(&up, &down, rank);
                let lost = distance(&whole, &product_of(&new_up, &new_down));
                let optimum = want[rank..].iter().map(|s| s * s).sum::<f64>().sqrt();
                assert!((lost - optimum).abs() < 1e-6 * want[0], "{o} {r} {c} at {rank}: {lost} {optimum}");
                let norm: f64 = new_down.values[..c].iter().map(|&v| f64::from(v).powi(2)).sum();
                assert!((norm - 1.0).abs() < 1e-5, "right vectors are unit vectors");
            }
        }
    }

    #[test]
    fn a_product_of_low_rank_gives_zeros_not_noise() {
        let (mut up, down) = (random(20, 4, 1), random(4, 20, 2));
        // Twice the same column: rank 3.
        for row in up.values.chunks_exact_mut(4) {
            row[3] = row[2];
        }
        let svd = ProductSvd::new(&up, &down).unwrap();
        assert!(svd.values[3] < 1e-12 * svd.values[0]);
        let (new_up, new_down) = svd.factors(&up, &down, 4);
        assert!(new_down.values[60..].iter().all(|v| *v == 0.0));
        assert!(distance(&product_of(&new_up, &new_down), &product_of(&up, &down)) < 1e-5);
        up.values[0] = f32::NAN;
        assert!(ProductSvd::new(&up, &down).is_none() && super::svd(&up).is_none());
        assert!(sketch(&up, 2, 1).is_none());
    }

    #[test]
    fn an_ill_conditioned_product_keeps_its_digits() {
        // Columns of 1, 1e-2, .. 1e-8: the Gram matrix alone would lose the last ones.
        let (mut up, down) = (random(60, 5, 1), random(5, 50, 2));
        for row in up.values.chunks_exact_mut(5) {
            row.iter_mut().enumerate().for_each(|(k, v)| *v *= 0.01f32.powi(k as i32));
        }
        let wide = |m: &Matrix| Mat::from_fn(m.rows, m.cols, |i, j| f64::from(m.values[i * m.cols + j]));
        let want = (wide(&up) * wide(&down)).thin_svd().unwrap();
        let got = ProductSvd::new(&up, &down).unwrap();
        for (k, got) in got.values.iter().enumerate() {
            let want = want.S().column_vector()[k];
            assert!((got - want).abs() < 1e-6 * want, "{k}: {got} {want}");
        }
    }

    #[test]
    fn a_sketch_finds_the_leading_directions() {
        // Falling singular values over a floor of noise.
        let (mut up, down) = (random(90, 12, 3), random(12, 70, 4));
        for row in up.values.chunks_exact_mut(12) {
            row.iter_mut().enumerate().for_each(|(k, v)| *v *= 0.6f32.powi(k as i32));
        }
        let mut a = product_of(&up, &down);
        let noise = random(90, 70, 5);
        a.values.iter_mut().zip(&noise.values).for_each(|(v, n)| *v += 1e-3 * n);
        let (_, _, want) = svd(&a).unwrap();
        let (q, b) = sketch(&a, 18, 3).unwrap();
        let near = ProductSvd::new(&q, &b).unwrap();
        let (new_up, new_down) = near.factors(&q, &b, 8);
        let optimum = want[8..].iter().map(|s| s * s).sum::<f64>().sqrt();
        let lost = distance(&a, &product_of(&new_up, &new_down));
        assert!(lost < optimum * (1.0 + 1e-5), "{lost} {optimum}");
        assert_eq!(sketch(&a, 18, 3).unwrap(), (q, b), "the same every time");
    }
}
