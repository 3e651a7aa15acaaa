//! The executor for host memory: one pass over each weight, accumulation in f32 over all terms, one rounding.

use super::gemm::{add_product, pool, Mat};
use super::ops::{Op, Region, Term};
use crate::error::{Error, Result};
use crate::view::{Rows, View};
use rayon::prelude::*;
use std::ops::Range;

/// About as many f32 as fit beside their factors in a core's cache.
const TILE: usize = 64 * 1024;

/// A term with its factors in f32 and its place in the weight's matrix.
struct Ready {
    up: Vec<f32>,
    down: Vec<f32>,
    rank: usize,
    scale: f32,
    rows: Range<usize>,
    cols: Range<usize>,
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
        .map(|term| prepare(name, base.shape(), term))
        .collect::<Result<Vec<_>>>()?;
    let in_place = base.data() == out.data();
    if from.cols == 0 || (ready.is_empty() && in_place && from.float() == to.float()) {
        return Ok(());
    }
    let touched = union(ready.iter().map(|t| t.cols.clone()).collect());
    let tile = (TILE / from.cols).clamp(8, 256);
    pool().install(|| {
        (0..from.rows.div_ceil(tile)).into_par_iter().for_each_init(
            || (Vec::new(), vec![0f32; from.cols]),
            |(sum, row), index| {
                let rows = index * tile..from.rows.min((index + 1) * tile);
                accumulate(sum, &ready, &rows, from.cols);
                for r in rows.clone() {
                    if from.float() == to.float() && !ready.iter().any(|t| t.rows.contains(&r)) {
                        if !in_place {
                            // SAFETY: tiles are disjoint ranges of rows, and each is one task's.
                            unsafe { to.copy_row(&from, r) };
                        }
                        continue;
                    }
                    from.read(r, row);
                    if !sum.is_empty() {
                        let sum = &sum[(r - rows.start) * from.cols..][..from.cols];
                        for range in &touched {
                            row[range.clone()].iter_mut().zip(&sum[range.clone()]).for_each(|(w, s)| *w += s);
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

fn prepare(name: &str, shape: &[usize], term: &Term<'_>) -> Result<Ready> {
    let Op::LowRank(op) = term.op;
    let Region { rows, cols, .. } = Region::of(name, shape, term.slice)?;
    let rank = op.up.shape()[1];
    if [op.up.shape()[0], op.down.shape()[1]] != [rows.len(), cols.len()] {
        return Err(Error::Shape {
            tensor: name.to_owned(),
            what: "the factors do not fit".into(),
            expected: vec![rows.len(), cols.len()],
            got: vec![op.up.shape()[0], op.down.shape()[1]],
        });
    }
    let scale = (term.strength * op.scale) as f32;
    Ok(Ready { up: op.up.to_f32(name)?, down: op.down.to_f32(name)?, rank, scale, rows, cols })
}

/// The sum of the terms on these rows; left empty when none touches them.
fn accumulate(sum: &mut Vec<f32>, ready: &[Ready], rows: &Range<usize>, cols: usize) {
    sum.clear();
    for t in ready {
        let common = rows.start.max(t.rows.start)..rows.end.min(t.rows.end);
        if common.is_empty() {
            continue;
        }
        if sum.is_empty() {
            sum.resize(rows.len() * cols, 0.0);
        }
        let up = Mat::new(&t.up[(common.start - t.rows.start) * t.rank..], common.len(), t.rank);
        let down = Mat::new(&t.down, t.rank, t.cols.len());
        let out = &mut sum[(common.start - rows.start) * cols..];
        add_product(out, cols, t.cols.start, t.scale, up, down, false);
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
