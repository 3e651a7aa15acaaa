//! OFT and BOFT as PEFT has them: on the input side, `W' = W + s * (scale o (W R^T) - W)`, R block-diagonal over the columns of W [O, I * kernel].
//!
//! OFT (arXiv:2306.07280, arXiv:2506.19847): `oft_R.weight` [n, b (b - 1) / 2] holds the upper triangles of skew-symmetric Q, one for all blocks
//! with `block_share`. R is `(I - Q)(I + Q)^-1`, or with `use_cayley_neumann` the sum `I + 2 Q + 2 Q^2 + .. + Q^k` of so many terms (3 give 4);
//! the two turn in opposite directions, so the configuration beside the file decides. `coft` shrinks each Q to the norm `eps / sqrt(n)`.
//!
//! BOFT (arXiv:2311.06243): `boft_R` [m, n, b, b], `Q = (B - B^T) / 2`, `R = (I - Q)(I + Q)^-1` in m butterfly stages; `boft_s` one factor per
//! row. The strength acts in each stage, as in [`super::boft`].

use super::{malformed, required, Algorithm, Group, Recipe, ALPHA};
use crate::error::{Error, Result};
use crate::linalg;
use crate::merge::ops::{Op, Rotate, Stage};
use crate::view::Tensor;

const R: &str = "oft_R.weight";
const BLOCKS: &str = "boft_R";
const SCALE: &str = "boft_s";

pub(super) const RECIPE: Recipe = Recipe { name: "OFT (PEFT)", marks: &[R], knows: &[R, ALPHA], read };
pub(super) const BUTTERFLY: Recipe =
    Recipe { name: "BOFT (PEFT)", marks: &[BLOCKS], knows: &[BLOCKS, SCALE, ALPHA], read: read_butterfly };

/// One OFT module.
#[derive(Debug)]
struct Oft {
    tensor: Tensor,
    size: usize,
    /// How many terms of the series; `None`: the exact inverse.
    terms: Option<usize>,
    /// The largest norm of a block.
    limit: Option<f64>,
    shared: bool,
    configured: bool,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let tensor = required(module, group, R)?.clone();
    let &[n, elements] = tensor.shape() else {
        return Err(malformed(module, format!("`{R}` must have two axes, it is {:?}", tensor.shape())));
    };
    // b (b - 1) / 2 = elements
    let size = (1.0 + (1.0 + 8.0 * elements as f64).sqrt()) / 2.0;
    let size = size.round() as usize;
    if size.checked_mul(size - 1) != elements.checked_mul(2) {
        return Err(malformed(
            module,
            format!("`{R}` {:?}: {elements} is no triangle of a block", tensor.shape()),
        ));
    }
    let config = group.config.as_deref();
    let flag = |name: &str| config.and_then(|c| c.field(module, name)).and_then(serde_json::Value::as_bool);
    let number = |name: &str| config.and_then(|c| c.field(module, name)).and_then(serde_json::Value::as_f64);
    let neumann = flag("use_cayley_neumann").unwrap_or(true);
    let terms =
        neumann.then(|| number("num_cayley_neumann_terms").map_or(5, |n| n.clamp(1.0, 1000.0) as usize));
    let limit = flag("coft").unwrap_or(false).then(|| number("eps").unwrap_or(6e-5) / (n as f64).sqrt());
    let (shared, configured) = (flag("block_share").unwrap_or(false), config.is_some());
    Ok(Box::new(Oft { tensor, size, terms, limit, shared, configured }))
}

impl Algorithm for Oft {
    fn name(&self) -> &'static str {
        "OFT (PEFT)"
    }

    fn shape(&self) -> Option<Vec<usize>> {
        None
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let (n, b, cols) = (self.tensor.shape()[0], self.size, target.iter().skip(1).product::<usize>());
        let count = if self.shared && n == 1 { cols / b } else { n };
        fit_columns(module, count * b, cols, target)?;
        let values = self.tensor.to_f32(module)?;
        let mut skew = vec![0f64; n * b * b];
        for (q, triangle) in skew.chunks_exact_mut(b * b).zip(values.chunks_exact((b * (b - 1) / 2).max(1))) {
            let upper = (0..b).flat_map(|i| (i + 1..b).map(move |j| (i, j)));
            for ((i, j), &v) in upper.zip(triangle) {
                (q[i * b + j], q[j * b + i]) = (f64::from(v), -f64::from(v));
            }
            let norm = q.iter().map(|v| v * v).sum::<f64>().sqrt();
            if let Some(limit) = self.limit.filter(|&limit| norm > limit) {
                q.iter_mut().for_each(|v| *v *= limit / norm);
            }
        }
        if skew.iter().any(|v| !v.is_finite()) {
            return Err(not_finite(module, R));
        }
        let blocks = match self.terms {
            Some(terms) => skew.chunks_exact(b * b).flat_map(|q| series(q, b, terms)).collect(),
            // (I - Q)(I + Q)^-1 is the Cayley transform of -Q.
            None => {
                skew.iter_mut().for_each(|v| *v = -*v);
                linalg::cayley(&skew, b).ok_or_else(|| not_finite(module, R))?
            }
        };
        let one = blocks.into_iter().map(|v| v as f32);
        let blocks: Vec<f32> = match n == count {
            true => one.collect(),
            false => one.collect::<Vec<_>>().repeat(count),
        };
        let stages = vec![Stage { blocks: vec![Tensor::of_f32(blocks, &[count, b, b])], order: None }];
        Ok(vec![Op::Rotate(Rotate { stages, rescale: None, axis: 1, interpolate: false })])
    }

    fn note(&self) -> Option<String> {
        let note = "no adapter_config.json: read with PEFT's defaults, a series of 5 terms";
        (!self.configured).then(|| note.to_owned())
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![(R, &self.tensor)]
    }
}

/// `I + 2 Q + 2 Q^2 + .. + 2 Q^(k - 2) + Q^(k - 1)`
fn series(q: &[f64], b: usize, terms: usize) -> Vec<f64> {
    // PEFT adds the square before it looks whether it is the last, so that 3 terms are the 4 terms; and 2 keep the weight 2.
    let last = if terms == 3 { 3 } else { terms.saturating_sub(1) };
    let mut sum: Vec<f64> = (0..b * b).map(|i| if i / b == i % b { 1.0 } else { 0.0 }).collect();
    let mut power = q.to_vec();
    for k in 1..=last {
        if k > 1 {
            power = linalg::product(&power, q, b);
        }
        let weight = if k == last && k > 1 { 1.0 } else { 2.0 };
        sum.iter_mut().zip(&power).for_each(|(s, p)| *s += weight * p);
    }
    sum
}

fn not_finite(module: &str, name: &str) -> Error {
    malformed(module, format!("`{name}` has values that are not finite"))
}

fn fit_columns(module: &str, covered: usize, cols: usize, target: &[usize]) -> Result<()> {
    if covered == cols {
        return Ok(());
    }
    Err(Error::Shape {
        tensor: module.to_owned(),
        what: "the module turns input channels and does not fit the weight (module's count first)".into(),
        expected: vec![covered],
        got: target.to_vec(),
    })
}

/// One BOFT module.
#[derive(Debug)]
struct Boft {
    blocks: Tensor,
    scale: Option<Tensor>,
}

fn read_butterfly(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let blocks = required(module, group, BLOCKS)?.clone();
    let &[m, n, b, c] = blocks.shape() else {
        return Err(malformed(module, format!("`{BLOCKS}` must have four axes, it is {:?}", blocks.shape())));
    };
    let halving = u32::try_from(m - 1).ok().and_then(|m| 1usize.checked_shl(m));
    if b != c || halving.is_none_or(|h| n % h != 0) || (m > 1 && b % 2 != 0) {
        return Err(malformed(module, format!("`{BLOCKS}` {:?} is no butterfly", blocks.shape())));
    }
    let scale = group.get(SCALE).is_some().then(|| required(module, group, SCALE)).transpose()?.cloned();
    Ok(Box::new(Boft { blocks, scale }))
}

/// Position -> channel of a stage: in every stretch of `2^i` blocks, the even halves of blocks first, then the odd ones.
fn order(channels: usize, n: usize, b: usize, stage: usize) -> Vec<usize> {
    let (stretch, half) = (channels / (n >> stage), b / 2);
    let halves = stretch / half;
    let sorted: Vec<usize> = (0..halves).step_by(2).chain((1..halves).step_by(2)).collect();
    // Channel c stands at the position that the sorted halves name.
    let mut order = vec![0; channels];
    for c in 0..channels {
        let (start, inner) = (c / stretch * stretch, c % stretch);
        order[start + sorted[inner / half] * half + inner % half] = c;
    }
    order
}

impl Algorithm for Boft {
    fn name(&self) -> &'static str {
        "BOFT (PEFT)"
    }

    fn shape(&self) -> Option<Vec<usize>> {
        None
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let (m, n, b) = (self.blocks.shape()[0], self.blocks.shape()[1], self.blocks.shape()[2]);
        let cols: usize = target.iter().skip(1).product();
        fit_columns(module, n * b, cols, target)?;
        let values = self.blocks.to_f32(module)?;
        let skew: Vec<f64> = values
            .chunks_exact(b * b)
            // The Cayley transform of -Q, and Q is half the difference.
            .flat_map(|v| (0..b * b).map(|i| 0.5 * (f64::from(v[i % b * b + i / b]) - f64::from(v[i]))))
            .collect();
        let blocks = linalg::cayley(&skew, b).ok_or_else(|| not_finite(module, BLOCKS))?;
        let stages = blocks.chunks_exact(n * b * b).enumerate().map(|(i, blocks)| {
            let blocks = vec![Tensor::of_f32(blocks.iter().map(|&v| v as f32).collect(), &[n, b, b])];
            Stage { blocks, order: (m > 1).then(|| order(cols, n, b, i)) }
        });
        let stages = stages.collect();
        let rescale =
            super::oft::per_row(module, SCALE, self.scale.as_ref(), target.first().copied().unwrap_or(1))?;
        Ok(vec![Op::Rotate(Rotate { stages, rescale, axis: 1, interpolate: true })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        [(BLOCKS, &self.blocks)].into_iter().chain(self.scale.as_ref().map(|t| (SCALE, t))).collect()
    }
}
