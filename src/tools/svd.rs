//! Singular value decompositions of deltas, by whatever is cheapest: of thin factors through their triangles, of a Kronecker product through
//! its halves, of a whole matrix in full where it is small or all values are asked for, else by a random sketch.

use super::delta::{self, Pair};
use crate::dtype::Float;
use crate::error::Result;
use crate::linalg::{self, Matrix, ProductSvd};

/// A decomposition that can be cut to any rank up to the number of its values.
pub struct Decomposition {
    /// In falling order; all but zeros, or the leading ones.
    pub values: Vec<f64>,
    /// The square of the Frobenius norm of the whole.
    squares: f64,
    kind: Kind,
}

enum Kind {
    Product(ProductSvd, Pair),
    /// Both halves decomposed, and which pair of triples each value comes from.
    Kron([Pair; 2], Vec<(usize, usize)>),
    Whole(Pair),
}

/// What is computed beyond the wanted rank, and how often the range is refined.
const OVERSAMPLING: usize = 16;
const ITERATIONS: usize = 3;
/// A matrix with a side up to this is decomposed in full.
const SMALL: usize = 128;

impl Decomposition {
    /// Of up @ down.
    pub fn product(name: &str, pair: Pair) -> Result<Self> {
        let svd = ProductSvd::new(&pair.0, &pair.1).ok_or_else(|| delta::not_finite(name))?;
        let values = svd.values.clone();
        Ok(Decomposition {
            squares: values.iter().map(|s| s * s).sum(),
            values,
            kind: Kind::Product(svd, pair),
        })
    }

    /// Of kron(w1, w2): its triples are the Kronecker products of theirs.
    pub fn kron(name: &str, w1: &Matrix, w2: &Matrix) -> Result<Self> {
        let of = |w| linalg::svd(w).ok_or_else(|| delta::not_finite(name));
        let ((u1, d1, s1), (u2, d2, s2)) = (of(w1)?, of(w2)?);
        let pairs = (0..s1.len()).flat_map(|i| (0..s2.len()).map(move |j| (i, j)));
        let mut order: Vec<_> = pairs.map(|(i, j)| (s1[i] * s2[j], (i, j))).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        let values: Vec<f64> = order.iter().map(|(s, _)| *s).collect();
        let order = order.into_iter().map(|(_, pair)| pair).collect();
        let squares = values.iter().map(|s| s * s).sum();
        Ok(Decomposition { values, squares, kind: Kind::Kron([(u1, d1), (u2, d2)], order) })
    }

    /// Of a whole matrix: its leading `rank` values, or all of them with `all`.
    pub fn whole(name: &str, a: &Matrix, rank: usize, all: bool) -> Result<Self> {
        let (side, wanted) = (a.rows.min(a.cols), rank.saturating_add(OVERSAMPLING + rank / 4));
        let bad = || delta::not_finite(name);
        if all || side <= SMALL || wanted >= side / 2 {
            let (up, down, values) = linalg::svd(a).ok_or_else(bad)?;
            return Ok(Decomposition {
                squares: values.iter().map(|s| s * s).sum(),
                values,
                kind: Kind::Whole((up, down)),
            });
        }
        let (q, b) = linalg::sketch(a, wanted, ITERATIONS).ok_or_else(bad)?;
        let near = Self::product(name, (q, b))?;
        Ok(Decomposition { squares: a.squares(), ..near })
    }

    /// The factors of the nearest matrix of this rank: left vectors times singular values, right vectors.
    pub fn cut(&self, rank: usize) -> Pair {
        let rank = rank.min(self.values.len());
        match &self.kind {
            Kind::Product(svd, (up, down)) => svd.factors(up, down, rank),
            Kind::Whole((up, down)) => (delta::columns(up, rank), delta::rows(down, rank)),
            Kind::Kron([(u1, d1), (u2, d2)], order) => {
                let order = &order[..rank];
                let mut up = Vec::with_capacity(u1.rows * u2.rows * rank);
                for a in u1.values.chunks_exact(u1.cols) {
                    for b in u2.values.chunks_exact(u2.cols) {
                        up.extend(order.iter().map(|&(i, j)| a[i] * b[j]));
                    }
                }
                let mut down = Vec::with_capacity(d1.cols * d2.cols * rank);
                for &(i, j) in order {
                    let right = &d2.values[j * d2.cols..][..d2.cols];
                    d1.values[i * d1.cols..][..d1.cols]
                        .iter()
                        .for_each(|a| down.extend(right.iter().map(|b| a * b)));
                }
                (Matrix::new(up, u1.rows * u2.rows, rank), Matrix::new(down, rank, d1.cols * d2.cols))
            }
        }
    }

    /// What a cut to this rank leaves out, as the square of a Frobenius norm.
    fn lost(&self, rank: usize) -> f64 {
        let square = |values: &[f64]| values.iter().map(|s| s * s).sum::<f64>();
        let rest = &self.values[rank.min(self.values.len())..];
        // The tail is exact where it is known; what a sketch did not see is the rest of the norm.
        let unseen = (self.squares - square(&self.values)).max(0.0);
        let unseen = if unseen > 1e-9 * self.squares { unseen } else { 0.0 };
        square(rest) + unseen
    }

    /// The relative Frobenius distance between the whole and these factors, which are a cut to their rank, once they are rounded into `float`.
    pub fn error(&self, (up, down): &Pair, float: Float) -> f64 {
        if self.squares <= 0.0 {
            return 0.0;
        }
        let rounding = if float == Float::F32 { 0.0 } else { rounding(up, down, float) };
        ((self.lost(up.cols) + rounding) / self.squares).sqrt()
    }

    /// The share of the Frobenius norm's square that a rank keeps.
    pub fn energy(&self, rank: usize) -> f64 {
        if self.squares > 0.0 {
            1.0 - self.lost(rank) / self.squares
        } else {
            1.0
        }
    }
}

/// The square of what the rounding of both factors changes in their product, to first order: the columns of one are orthogonal and so are the
/// rows of the other, so each rounding is seen through the other factor undistorted.
fn rounding(up: &Matrix, down: &Matrix, float: Float) -> f64 {
    // The square of a row's rounding and of the row, by column or in sum.
    let lost = |row: &[f32]| -> Vec<(f64, f64)> {
        let (mut bytes, mut back) = (vec![0u8; row.len() * float.size()], vec![0f32; row.len()]);
        float.write(row, &mut bytes);
        float.read(&bytes, &mut back);
        row.iter().zip(&back).map(|(a, b)| (f64::from(a - b).powi(2), f64::from(*a).powi(2))).collect()
    };
    let mut columns = vec![(0f64, 0f64); up.cols];
    for row in up.values.chunks_exact(up.cols.max(1)) {
        columns.iter_mut().zip(lost(row)).for_each(|(sum, of)| *sum = (sum.0 + of.0, sum.1 + of.1));
    }
    let rows = down.values.chunks_exact(down.cols.max(1));
    let rows = rows.map(|row| lost(row).into_iter().fold((0.0, 0.0), |sum, of| (sum.0 + of.0, sum.1 + of.1)));
    columns.into_iter().zip(rows).map(|(up, down)| up.0 * down.1 + up.1 * down.0).sum()
}

/// Moves powers of two between the factors, rank by rank, so that both have about the same largest value: the product stays the same to the
/// bit, and fp16, which has few exponents, loses nothing to its smallest numbers.
pub fn balance((up, down): &mut Pair) {
    let rank = up.cols;
    let mut largest = vec![0f32; rank];
    for row in up.values.chunks_exact(rank.max(1)) {
        largest.iter_mut().zip(row).for_each(|(m, v)| *m = m.max(v.abs()));
    }
    let mut factors = vec![1f32; rank];
    for ((factor, up), row) in
        factors.iter_mut().zip(&largest).zip(down.values.chunks_exact_mut(down.cols.max(1)))
    {
        let other = row.iter().fold(0f32, |m, v| m.max(v.abs()));
        if *up > 0.0 && other > 0.0 {
            let shift = ((other.log2() - up.log2()) / 2.0).round().clamp(-60.0, 60.0);
            *factor = 2f32.powi(shift as i32);
            row.iter_mut().for_each(|v| *v /= *factor);
        }
    }
    for row in up.values.chunks_exact_mut(rank.max(1)) {
        row.iter_mut().zip(&factors).for_each(|(v, f)| *v *= f);
    }
}
