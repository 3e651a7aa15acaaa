//! The CPU executor's part for the primitives that need more of a weight than one row at a time: norms over rows, turned blocks, singular
//! directions. Each becomes one whole delta, computed from the pristine weight before anything is written.

use super::cpu;
use super::gemm::{add_product, on_pool, Mat};
use super::ops::{Decompose, Op, Region, Rotate, Stage, Term};
use crate::error::{Error, Result};
use crate::linalg;
use crate::view::Rows;

/// `strength * delta` on the term's region, [rows, cols] in f32; `None` for the primitives that work row by row.
pub(super) fn delta(name: &str, term: &Term<'_>, base: &Rows, region: &Region) -> Result<Option<Vec<f32>>> {
    let strength = term.coefficient(name)?;
    let mut new = match term.op {
        Op::Rotate(op) => rotated(name, op, term.strength, read(base, region), region)?,
        Op::Decompose(op) => decomposed(name, op, base, region)?,
        Op::Principal(op) => {
            let (rows, cols) = (region.rows.len(), region.cols.len());
            let near = linalg::nearest_of_rank(&read(base, region), rows, cols, op.rank);
            let mut near =
                near.ok_or_else(|| Error::Backend(format!("`{name}` holds values that are not finite")))?;
            near.iter_mut().for_each(|v| *v *= strength);
            return Ok(Some(near));
        }
        _ => return Ok(None),
    };
    // An interpolating rotation has the strength in its stages already.
    let factor = if matches!(term.op, Op::Rotate(op) if op.interpolate) { 1.0 } else { strength };
    let old = read(base, region);
    on_pool(|| new.iter_mut().zip(&old).for_each(|(n, o)| *n = factor * (*n - o)));
    Ok(Some(new))
}

/// The region of the weight, as f32.
fn read(base: &Rows, region: &Region) -> Vec<f32> {
    let width = region.cols.len();
    let (mut row, mut out) = (vec![0f32; base.cols], Vec::with_capacity(region.rows.len() * width));
    for r in region.rows.clone() {
        base.read(r, &mut row);
        out.extend_from_slice(&row[region.cols.clone()]);
    }
    out
}

fn misfit(name: &str, what: &str, expected: usize, got: usize) -> Error {
    Error::Shape { tensor: name.to_owned(), what: what.into(), expected: vec![expected], got: vec![got] }
}

/// What a rotation makes of `w`; at strength 1, or at the given one when it interpolates.
fn rotated(name: &str, op: &Rotate, strength: f64, mut w: Vec<f32>, region: &Region) -> Result<Vec<f32>> {
    let (rows, cols) = (region.rows.len(), region.cols.len());
    let along = [rows, cols][op.axis.min(1)];
    let s = if op.interpolate { strength } else { 1.0 };
    for stage in &op.stages {
        if stage.size() != along || stage.order.as_ref().is_some_and(|order| order.len() != along) {
            return Err(misfit(name, "a rotation does not fit", along, stage.size()));
        }
        w = turn(name, stage, op.axis, s, &w, cols)?;
    }
    if let Some(rescale) = &op.rescale {
        if rescale.count() != rows {
            return Err(misfit(name, "a rescaling does not fit", rows, rescale.count()));
        }
        for (row, factor) in w.chunks_exact_mut(cols.max(1)).zip(rescale.to_f32(name)?) {
            let factor = (1.0 + s * (f64::from(factor) - 1.0)) as f32;
            row.iter_mut().for_each(|v| *v *= factor);
        }
    }
    Ok(w)
}

/// One stage: every group of rows (axis 0) or columns (axis 1) times its block, gathered and put back by the stage's order.
fn turn(name: &str, stage: &Stage, axis: usize, s: f64, w: &[f32], cols: usize) -> Result<Vec<f32>> {
    let rows = w.len() / cols.max(1);
    let place = |position: usize| stage.order.as_ref().map_or(position, |order| order[position]);
    let mut out = vec![0f32; w.len()];
    let mut first = 0;
    for group in &stage.blocks {
        let b = group.shape()[1];
        let blocks = group.to_f32(name)?;
        for block in blocks.chunks_exact(b * b) {
            let block: Vec<f32> = block
                .iter()
                .enumerate()
                .map(|(i, &v)| (s * f64::from(v) + if i / b == i % b { 1.0 - s } else { 0.0 }) as f32)
                .collect();
            let places: Vec<usize> = (first..first + b).map(place).collect();
            let block = Mat::new(&block, b, b);
            if axis == 0 {
                let gathered: Vec<f32> =
                    places.iter().flat_map(|&p| &w[p * cols..][..cols]).copied().collect();
                let mut turned = vec![0f32; b * cols];
                on_pool(|| add_product(&mut turned, cols, 0, 1.0, block, Mat::new(&gathered, b, cols), true));
                for (&p, row) in places.iter().zip(turned.chunks_exact(cols.max(1))) {
                    out[p * cols..][..cols].copy_from_slice(row);
                }
            } else {
                let gathered: Vec<f32> =
                    w.chunks_exact(cols.max(1)).flat_map(|row| places.iter().map(|&p| row[p])).collect();
                let mut turned = vec![0f32; rows * b];
                on_pool(|| {
                    add_product(&mut turned, b, 0, 1.0, Mat::new(&gathered, rows, b), block.t(), true)
                });
                for (row, turned) in out.chunks_exact_mut(cols.max(1)).zip(turned.chunks_exact(b)) {
                    places.iter().zip(turned).for_each(|(&p, &v)| row[p] = v);
                }
            }
            first += b;
        }
    }
    Ok(out)
}

/// `V o magnitude / |V|`, V the weight with what is inside added. Norms are summed in f64.
fn decomposed(name: &str, op: &Decompose, base: &Rows, region: &Region) -> Result<Vec<f32>> {
    let (rows, cols) = (region.rows.len(), region.cols.len());
    let mut v = vec![0f32; rows * cols];
    for inner in &op.inside {
        if inner.reads_weight() {
            return Err(Error::Backend(format!("`{name}`: {inner:?} cannot stand inside a decomposition")));
        }
        let ready = cpu::prepare_in(name, base, region, &Term { op: inner, strength: 1.0, slice: None })?;
        on_pool(|| ready.add(&mut v, cols, 0, region.rows.clone(), base));
    }
    let w = read(base, region);
    v.iter_mut().zip(&w).for_each(|(v, w)| *v += w);
    let taps: usize = region.shape.iter().skip(2).product();
    let count = if op.axis == 0 { rows } else { cols / taps.max(1) };
    if op.magnitude.count() != count {
        return Err(misfit(name, "a magnitude does not fit", count, op.magnitude.count()));
    }
    let of = |i: usize| if op.axis == 0 { i / cols } else { i % cols / taps };
    let mut squares = vec![0f64; count];
    v.iter().enumerate().for_each(|(i, &x)| squares[of(i)] += f64::from(x) * f64::from(x));
    let factors: Vec<f32> = op
        .magnitude
        .to_f32(name)?
        .into_iter()
        .zip(squares)
        .map(|(m, sum)| if sum > 0.0 { (f64::from(m) / sum.sqrt()) as f32 } else { 0.0 })
        .collect();
    v.iter_mut().enumerate().for_each(|(i, x)| *x *= factors[of(i)]);
    Ok(v)
}
