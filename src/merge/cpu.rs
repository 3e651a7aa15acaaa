//! The executor for host memory: one pass over each weight, accumulation in f32 over all terms, one rounding.

use super::gemm::{add_product, on_pool, Mat};
use super::ops::{Op, Region, Term};
use super::whole;
use crate::error::{Error, Result};
use crate::view::{Rows, Tensor, View};
use rayon::prelude::*;
use std::ops::Range;

/// About as many f32 as fit beside their factors in a core's cache.
const TILE: usize = 64 * 1024;

/// A term with its factors in f32 and its place in the weight's matrix.
pub(super) struct Ready {
    parts: Parts,
    scale: f32,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
}

/// The factors of an op, row-major.
enum Parts {
    LowRank(Pair),
    Hadamard([Pair; 2]),
    Kron {
        w1: Vec<f32>,
        w2: Vec<f32>,
        w2_rows: usize,
        w1_cols: usize,
    },
    Dense(Vec<f32>),
    /// One value per row of the region.
    Rows(Vec<f32>),
    /// One value per column of the region.
    Cols(Vec<f32>),
    /// W @ a1 @ a2 over the input channels, each tap of the kernel alike.
    Right {
        a1: Vec<f32>,
        a2: Vec<f32>,
        rank: usize,
        taps: usize,
    },
    /// What W becomes.
    Towards(Vec<f32>),
}

struct Pair {
    up: Vec<f32>,
    down: Vec<f32>,
    rank: usize,
}

/// `out = base + sum of terms`. Both views have the same shape; their dtypes may differ; they may be the same memory, not overlap otherwise.
pub fn merge(name: &str, base: &View, out: &View, terms: &[Term<'_>]) -> Result<()> {
    if base.shape() != out.shape() {
        return Err(Error::Shape {
            tensor: name.to_owned(),
            what: "base and result differ".into(),
            expected: base.shape().to_vec(),
            got: out.shape().to_vec(),
        });
    }
    let (from, to) = (Rows::of(base, name)?, Rows::of(out, name)?);
    let ready = terms
        .iter()
        .filter(|term| term.strength != 0.0)
        .map(|term| prepare(name, &from, base.shape(), term))
        .collect::<Result<Vec<_>>>()?;
    let (towards, ready): (Vec<_>, Vec<_>) =
        ready.into_iter().partition(|t| matches!(t.parts, Parts::Towards(_)));
    let in_place = base.data() == out.data();
    let idle = ready.is_empty() && towards.is_empty();
    if from.rows == 0 || from.cols == 0 || (idle && in_place && from.float() == to.float()) {
        return Ok(());
    }
    let touched = union(ready.iter().map(|t| t.cols.clone()).collect());
    let tile = (TILE / from.cols).clamp(8, 256);
    on_pool(|| {
        (0..from.rows.div_ceil(tile)).into_par_iter().for_each_init(
            || (Vec::new(), vec![0f32; from.cols], Vec::new()),
            |(sum, row, pristine), index| {
                let rows = index * tile..from.rows.min((index + 1) * tile);
                accumulate(sum, &ready, &rows, &from);
                for r in rows.clone() {
                    let touched_row = ready.iter().chain(&towards).any(|t| t.rows.contains(&r));
                    if from.float() == to.float() && !touched_row {
                        if !in_place {
                            // SAFETY: tiles are disjoint ranges of rows, and each is one task's.
                            unsafe { to.copy_row(&from, r) };
                        }
                        continue;
                    }
                    from.read(r, row);
                    pristine.clone_from(row);
                    towards.iter().for_each(|t| t.replace(r, row, pristine));
                    if !sum.is_empty() {
                        let sum = &sum[(r - rows.start) * from.cols..][..from.cols];
                        for range in &touched {
                            // Where nothing is added, -0 stays -0.
                            let both = row[range.clone()].iter_mut().zip(&sum[range.clone()]);
                            both.for_each(|(w, s)| *w = if *s == 0.0 { *w } else { *w + s });
                        }
                    }
                    // SAFETY: as above.
                    unsafe { to.write(r, row) };
                }
            },
        );
    });
    Ok(())
}

/// Reads a term's factors and checks that they fill its region. `base` is the pristine weight, of this shape; what needs more of it than
/// one row at a time is computed here.
pub(super) fn prepare(name: &str, base: &Rows, shape: &[usize], term: &Term<'_>) -> Result<Ready> {
    prepare_in(name, base, &Region::of(name, shape, term.slice)?, term)
}

/// As [`prepare`], in the region that the term's slice names.
pub(super) fn prepare_in(name: &str, base: &Rows, region: &Region, term: &Term<'_>) -> Result<Ready> {
    let (parts, scale) = match whole::delta(name, term, base, region)? {
        Some(delta) => (Parts::Dense(delta), 1.0),
        None => (factors(name, term.op, region)?, term.coefficient(name)?),
    };
    Ok(Ready { parts, scale, rows: region.rows.clone(), cols: region.cols.clone() })
}

/// Reads the factors of an op that works row by row.
fn factors(name: &str, op: &Op, region: &Region) -> Result<Parts> {
    let Region { rows, cols, shape } = region;
    let fits = |size: [usize; 2]| match size == [rows.len(), cols.len()] {
        true => Ok(()),
        false => Err(Error::Shape {
            tensor: name.to_owned(),
            what: "the factors do not fit".into(),
            expected: vec![rows.len(), cols.len()],
            got: size.to_vec(),
        }),
    };
    let pair = |up: &Tensor, down: &Tensor| -> Result<Pair> {
        fits([up.shape()[0], down.shape()[1]])?;
        Ok(Pair { rank: up.shape()[1], up: up.to_f32(name)?, down: down.to_f32(name)? })
    };
    Ok(match op {
        Op::LowRank(op) => Parts::LowRank(pair(&op.up, &op.down)?),
        Op::Hadamard(op) => {
            let [(up1, down1), (up2, down2)] = &op.pairs;
            Parts::Hadamard([pair(up1, down1)?, pair(up2, down2)?])
        }
        Op::Kron(op) => {
            let ((a, b), (c, d)) =
                ((op.w1.shape()[0], op.w1.shape()[1]), (op.w2.shape()[0], op.w2.shape()[1]));
            fits([a * c, b * d])?;
            let (w1, w2) = (op.w1.to_f32(name)?, op.w2.to_f32(name)?);
            Parts::Kron { w1, w2, w2_rows: c, w1_cols: b }
        }
        Op::Dense(op) => {
            fits([op.diff.shape()[0], op.diff.shape()[1]])?;
            Parts::Dense(op.diff.to_f32(name)?)
        }
        Op::Scale(op) if op.axis == 0 => {
            fits([op.v.count(), cols.len()])?;
            Parts::Rows(op.v.to_f32(name)?)
        }
        Op::Scale(op) => {
            let kernel: usize = shape.iter().skip(2).product();
            fits([rows.len(), op.v.count() * kernel])?;
            let v = op.v.to_f32(name)?;
            Parts::Cols(v.iter().flat_map(|&v| std::iter::repeat_n(v, kernel)).collect())
        }
        Op::RightLowRank(op) => {
            let taps = shape.iter().skip(2).product();
            fits([rows.len(), op.a1.shape()[0] * taps])?;
            fits([rows.len(), op.a2.shape()[1] * taps])?;
            let (a1, a2) = (op.a1.to_f32(name)?, op.a2.to_f32(name)?);
            Parts::Right { a1, a2, rank: op.a1.shape()[1], taps }
        }
        Op::Replace(op) => {
            fits([op.value.shape()[0], op.value.shape()[1]])?;
            Parts::Towards(op.value.to_f32(name)?)
        }
        Op::Rotate(_) | Op::Decompose(_) | Op::Principal(_) => {
            return Err(Error::Backend(format!("`{name}`: {op:?} does not work row by row")))
        }
    })
}

impl Ready {
    /// The term as a layer applies it: `scale * up @ down` where it is such a product, else its whole delta in the place of `down`.
    pub(super) fn into_factors(self, base: &Rows) -> (Option<Vec<f32>>, Vec<f32>, f32) {
        if let Parts::LowRank(pair) = self.parts {
            return (Some(pair.up), pair.down, self.scale);
        }
        let (rows, cols) = (self.rows.len(), self.cols.len());
        let mut sum = vec![0f32; rows * cols];
        // A region of its own size: the columns begin at 0.
        self.add(&mut sum, cols, 0, self.rows.clone(), base);
        (None, sum, 1.0)
    }

    /// Moves row `r` of the weight towards the term's value. Taking W out first gives, at strength 1, the value itself; adding the difference
    /// to W would round it at W's size.
    fn replace(&self, r: usize, row: &mut [f32], pristine: &[f32]) {
        let (Parts::Towards(value), true) = (&self.parts, self.rows.contains(&r)) else { return };
        let value = &value[(r - self.rows.start) * self.cols.len()..][..self.cols.len()];
        let both = row[self.cols.clone()].iter_mut().zip(&pristine[self.cols.clone()]);
        both.zip(value).for_each(|((o, w), v)| {
            // An infinite W is taken out as well.
            *o = if self.scale == 1.0 && *o == *w { *v } else { (*o - self.scale * w) + self.scale * v };
        });
    }

    /// Adds the delta of `rows` (of the weight, all inside the region) to `sum`, whose rows are `stride` long; the region's columns begin
    /// at `at`. Only a term that multiplies W reads `base`.
    pub(super) fn add(&self, sum: &mut [f32], stride: usize, at: usize, rows: Range<usize>, base: &Rows) {
        let first = rows.start - self.rows.start;
        let width = self.cols.len();
        let product = |out: &mut [f32], stride, at, scale, pair: &Pair| {
            let up = Mat::new(&pair.up[first * pair.rank..], rows.len(), pair.rank);
            add_product(out, stride, at, scale, up, Mat::new(&pair.down, pair.rank, width), false);
        };
        if let Parts::LowRank(pair) = &self.parts {
            return product(sum, stride, at, self.scale, pair);
        }
        if let Parts::Hadamard([one, two]) = &self.parts {
            let (mut left, mut right) = (vec![0f32; rows.len() * width], vec![0f32; rows.len() * width]);
            product(&mut left, width, 0, self.scale, one);
            product(&mut right, width, 0, 1.0, two);
            for (i, (left, right)) in left.chunks_exact(width).zip(right.chunks_exact(width)).enumerate() {
                let out = &mut sum[i * stride + at..][..width];
                out.iter_mut().zip(left).zip(right).for_each(|((o, l), r)| *o += l * r);
            }
            return;
        }
        let mut row = vec![0f32; base.cols];
        if let Parts::Right { a1, a2, rank, taps } = &self.parts {
            // A row of W is [I, taps]; seen as [taps, I] each tap is a row of the product.
            let (channels, count) = (width / taps, rows.len() * taps);
            let mut left = vec![0f32; count * channels];
            for (i, r) in rows.clone().enumerate() {
                base.read(r, &mut row);
                for (c, values) in row[self.cols.clone()].chunks_exact(*taps).enumerate() {
                    for (t, value) in values.iter().enumerate() {
                        left[(i * taps + t) * channels + c] = *value;
                    }
                }
            }
            let (mut thin, mut delta) = (vec![0f32; count * rank], vec![0f32; count * channels]);
            let (left, a1) = (Mat::new(&left, count, channels), Mat::new(a1, channels, *rank));
            add_product(&mut thin, *rank, 0, 1.0, left, a1, false);
            let (thin, a2) = (Mat::new(&thin, count, *rank), Mat::new(a2, *rank, channels));
            add_product(&mut delta, channels, 0, self.scale, thin, a2, false);
            for (i, delta) in delta.chunks_exact(taps * channels).enumerate() {
                let out = &mut sum[i * stride + at..][..width];
                for (k, out) in out.iter_mut().enumerate() {
                    *out += delta[k % taps * channels + k / taps];
                }
            }
            return;
        }
        for (i, r) in rows.enumerate() {
            let (out, own) = (&mut sum[i * stride + at..][..width], first + i);
            match &self.parts {
                Parts::Kron { w1, w2, w2_rows, w1_cols } => {
                    let d = width / w1_cols;
                    let (w1, w2) =
                        (&w1[own / w2_rows * w1_cols..][..*w1_cols], &w2[own % w2_rows * d..][..d]);
                    for (out, factor) in out.chunks_exact_mut(d).zip(w1) {
                        let factor = self.scale * factor;
                        out.iter_mut().zip(w2).for_each(|(o, w)| *o += factor * w);
                    }
                }
                Parts::Dense(diff) => {
                    out.iter_mut().zip(&diff[own * width..]).for_each(|(o, d)| *o += self.scale * d);
                }
                Parts::Rows(v) => {
                    base.read(r, &mut row);
                    let factor = self.scale * v[own];
                    out.iter_mut().zip(&row[self.cols.clone()]).for_each(|(o, w)| *o += factor * w);
                }
                Parts::Cols(v) => {
                    base.read(r, &mut row);
                    let base = &row[self.cols.clone()];
                    out.iter_mut().zip(base).zip(v).for_each(|((o, w), v)| *o += self.scale * v * w);
                }
                Parts::Towards(value) => {
                    base.read(r, &mut row);
                    let (value, base) = (&value[own * width..][..width], &row[self.cols.clone()]);
                    out.iter_mut().zip(value).zip(base).for_each(|((o, v), w)| *o += self.scale * (v - w));
                }
                Parts::LowRank(_) | Parts::Hadamard(_) | Parts::Right { .. } => {}
            }
        }
    }
}

/// The sum of the terms on these rows; left empty when none touches them.
fn accumulate(sum: &mut Vec<f32>, ready: &[Ready], rows: &Range<usize>, base: &Rows) {
    sum.clear();
    let cols = base.cols;
    for t in ready {
        let common = rows.start.max(t.rows.start)..rows.end.min(t.rows.end);
        if common.is_empty() {
            continue;
        }
        if sum.is_empty() {
            sum.resize(rows.len() * cols, 0.0);
        }
        let out = &mut sum[(common.start - rows.start) * cols..];
        t.add(out, cols, t.cols.start, common, base);
    }
}

/// Overlapping or touching ranges joined, in order: what lies outside keeps its bits (also the sign of a zero).
fn union(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_by_key(|r| r.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}
