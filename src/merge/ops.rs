//! The few primitives that every algorithm comes down to, on a target seen as a matrix W [O, C], C = I * kernel.
//!
//! The executors (`cpu.rs`, `torch.rs`) know these and nothing of algorithms.

pub use crate::dtype::Rounding;
use crate::error::{Error, Result};
use crate::view::{Slice, Tensor};
use std::ops::Range;

/// What one module does to one weight. `s` is the user's strength, W the pristine weight.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Op {
    /// Adds a product of two thin matrices.
    LowRank(LowRank),
    /// Adds the elementwise product of two such products.
    Hadamard(Hadamard),
    /// Adds a Kronecker product.
    Kron(Kron),
    /// Adds a whole matrix.
    Dense(Dense),
    /// Multiplies rows or input channels.
    Scale(Scale),
    /// Adds the weight itself times a thin product.
    RightLowRank(RightLowRank),
    /// Turns rows or columns in blocks.
    Rotate(Rotate),
    /// Sets the norm of every row or input channel, after adding what is inside.
    Decompose(Decompose),
    /// Moves the weight towards another one.
    Replace(Replace),
    /// Adds the weight's own leading singular directions.
    Principal(Principal),
}

/// `W += s * scale * up @ down`
#[derive(Debug, Clone)]
pub struct LowRank {
    /// [O, r]
    pub up: Tensor,
    /// [r, C]
    pub down: Tensor,
    /// The file's own factor, alpha / rank.
    pub scale: f64,
}

/// `W += s * scale * (up1 @ down1) o (up2 @ down2)`
#[derive(Debug, Clone)]
pub struct Hadamard {
    /// Two pairs of [O, r] and [r, C].
    pub pairs: [(Tensor, Tensor); 2],
    /// The file's own factor, alpha / rank.
    pub scale: f64,
}

/// `W += s * scale * kron(w1, w2)`, O = a * c, C = b * d
#[derive(Debug, Clone)]
pub struct Kron {
    /// [a, b]
    pub w1: Tensor,
    /// [c, d]
    pub w2: Tensor,
    /// The file's own factor.
    pub scale: f64,
}

/// `W += s * scale * diff`
#[derive(Debug, Clone)]
pub struct Dense {
    /// [O, C]
    pub diff: Tensor,
    /// The file's own factor.
    pub scale: f64,
}

/// `W += s * W o v`, v along an axis of the weight
#[derive(Debug, Clone)]
pub struct Scale {
    /// [O] or [I]
    pub v: Tensor,
    /// 0: one value per row; 1: one per input channel.
    pub axis: usize,
}

/// `W += s * scale * W @ a1 @ a2` along the input channels, for each tap of a kernel alike
#[derive(Debug, Clone)]
pub struct RightLowRank {
    /// [I, r]
    pub a1: Tensor,
    /// [r, I]
    pub a2: Tensor,
    /// The file's own factor, alpha / rank.
    pub scale: f64,
}

/// `W += s * (rescale o T(W) - W)`, T the stages one after the other; or, with `interpolate`, every stage is `s * R + (1 - s) * I` and the
/// rescaling `1 + s * (rescale - 1)`.
#[derive(Debug, Clone)]
pub struct Rotate {
    /// In the order in which they are applied; all of one size.
    pub stages: Vec<Stage>,
    /// [O], one factor per row.
    pub rescale: Option<Tensor>,
    /// 0: rows are turned; 1: columns.
    pub axis: usize,
    /// Whether the strength acts in every stage.
    pub interpolate: bool,
}

/// One stage of a [`Rotate`]: rows (or columns) x become `block @ x` in consecutive groups.
#[derive(Debug, Clone)]
pub struct Stage {
    /// Each [n, b, b] turns the next n * b rows, in f32.
    pub blocks: Vec<Tensor>,
    /// Which row stands at each position of the groups; `None`: its own.
    pub order: Option<Vec<usize>>,
}

/// `W += s * (V o magnitude / |V| - W)`, `V = W + ` what is inside, at strength 1; |V| along the axis. Rows of norm 0 become 0.
#[derive(Debug, Clone)]
pub struct Decompose {
    /// Ops that do not read W.
    pub inside: Vec<Op>,
    /// [O] or [I]
    pub magnitude: Tensor,
    /// 0: one norm per row; 1: one per input channel.
    pub axis: usize,
}

/// `W += s * (value - W)`
#[derive(Debug, Clone)]
pub struct Replace {
    /// [O, C]
    pub value: Tensor,
}

/// `W += s * scale * W_r`, W_r the nearest matrix of this rank to W
#[derive(Debug, Clone)]
pub struct Principal {
    /// How many singular values.
    pub rank: usize,
    /// The file's own factor.
    pub scale: f64,
}

impl Op {
    /// The file's own factor.
    pub fn scale(&self) -> f64 {
        match self {
            Op::LowRank(op) => op.scale,
            Op::Hadamard(op) => op.scale,
            Op::Kron(op) => op.scale,
            Op::Dense(op) => op.scale,
            Op::RightLowRank(op) => op.scale,
            Op::Principal(op) => op.scale,
            Op::Scale(_) | Op::Rotate(_) | Op::Decompose(_) | Op::Replace(_) => 1.0,
        }
    }

    /// Multiplies the delta; `None` where a factor on the delta has no meaning.
    pub fn scaled(mut self, by: f64) -> Option<Self> {
        match &mut self {
            Op::LowRank(op) => op.scale *= by,
            Op::Hadamard(op) => op.scale *= by,
            Op::Kron(op) => op.scale *= by,
            Op::Dense(op) => op.scale *= by,
            Op::RightLowRank(op) => op.scale *= by,
            Op::Principal(op) => op.scale *= by,
            Op::Scale(_) | Op::Rotate(_) | Op::Decompose(_) | Op::Replace(_) => return None,
        }
        Some(self)
    }

    /// Whether the delta depends on the weight.
    pub fn reads_weight(&self) -> bool {
        !matches!(self, Op::LowRank(_) | Op::Hadamard(_) | Op::Kron(_) | Op::Dense(_))
    }

    /// What the op does to these rows of its weight, as an op on them alone: for a host that keeps apart what the module has in one.
    pub fn rows(&self, module: &str, rows: &Range<usize>) -> Result<Op> {
        let cut = |tensor: &Tensor| {
            tensor.rows(rows.clone()).ok_or_else(|| {
                let what =
                    format!("`{module}`: rows {rows:?} are outside a factor of shape {:?}", tensor.shape());
                Error::argument(what, "factors must be contiguous")
            })
        };
        let refuse = |what: &str| {
            Err(Error::Unsupported {
                what: format!("`{module}`: {what}, and the model keeps its parts in separate weights"),
                hint: "merge it into a model that has the weight in one piece".into(),
            })
        };
        Ok(match self {
            Op::LowRank(op) => Op::LowRank(LowRank { up: cut(&op.up)?, ..op.clone() }),
            Op::Hadamard(op) => {
                let [(up1, down1), (up2, down2)] = &op.pairs;
                let pairs = [(cut(up1)?, down1.clone()), (cut(up2)?, down2.clone())];
                Op::Hadamard(Hadamard { pairs, ..op.clone() })
            }
            Op::Kron(op) => op.rows(module, rows)?,
            Op::Dense(op) => Op::Dense(Dense { diff: cut(&op.diff)?, ..op.clone() }),
            Op::Replace(op) => Op::Replace(Replace { value: cut(&op.value)? }),
            Op::Scale(op) if op.axis == 0 => Op::Scale(Scale { v: cut(&op.v)?, axis: 0 }),
            Op::Scale(_) | Op::RightLowRank(_) => self.clone(),
            Op::Decompose(op) if op.axis == 0 => {
                let inside = op.inside.iter().map(|op| op.rows(module, rows)).collect::<Result<_>>()?;
                Op::Decompose(Decompose { inside, magnitude: cut(&op.magnitude)?, axis: 0 })
            }
            Op::Decompose(_) => return refuse("its norms run over all rows of the weight"),
            Op::Principal(_) => return refuse("it needs the singular values of the whole weight"),
            Op::Rotate(op) => {
                let rescale = op.rescale.as_ref().map(cut).transpose()?;
                let stages = match (op.axis, op.stages.as_slice()) {
                    (0, [stage]) => match stage.rows(rows) {
                        Some(stage) => vec![stage],
                        None => return refuse("it turns rows of several parts together"),
                    },
                    (0, _) => return refuse("it turns rows of several parts together"),
                    _ => op.stages.clone(),
                };
                Op::Rotate(Rotate { stages, rescale, ..op.clone() })
            }
        })
    }
}

impl Kron {
    /// Whole blocks of w2 stay a Kronecker product; other rows are written out.
    fn rows(&self, module: &str, rows: &Range<usize>) -> Result<Op> {
        let c = self.w2.shape()[0].max(1);
        if rows.start % c == 0 && rows.end % c == 0 {
            if let Some(w1) = self.w1.rows(rows.start / c..rows.end / c) {
                return Ok(Op::Kron(Kron { w1, ..self.clone() }));
            }
        }
        let (b, d) = (self.w1.shape()[1], self.w2.shape()[1]);
        let (w1, w2) = (self.w1.to_f32(module)?, self.w2.to_f32(module)?);
        let mut diff = Vec::with_capacity(rows.len() * b * d);
        for r in rows.clone() {
            for u in &w1[r / c * b..][..b] {
                diff.extend(w2[r % c * d..][..d].iter().map(|w| u * w));
            }
        }
        Ok(Op::Dense(Dense { diff: Tensor::of_f32(diff, &[rows.len(), b * d]), scale: self.scale }))
    }
}

impl Stage {
    /// The stage on these rows alone, when blocks end at both ends of them.
    fn rows(&self, rows: &Range<usize>) -> Option<Stage> {
        if self.order.is_some() {
            return None;
        }
        let (mut at, mut blocks) = (0, Vec::new());
        for group in &self.blocks {
            let (n, b) = (group.shape()[0], group.shape()[1]);
            let (start, end) = (rows.start.clamp(at, at + n * b) - at, rows.end.clamp(at, at + n * b) - at);
            if start % b != 0 || end % b != 0 {
                return None;
            }
            if start < end {
                blocks.push(group.rows(start / b..end / b)?);
            }
            at += n * b;
        }
        Some(Stage { blocks, order: None })
    }

    /// How many rows (or columns) it turns.
    pub fn size(&self) -> usize {
        self.blocks.iter().map(|group| group.shape()[0] * group.shape()[1]).sum()
    }
}

/// How a weight lies in memory: its real value is `scale` times the stored number; how a result is rounded into it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Storage {
    /// What the stored numbers are multiplied with; neither 0 nor infinite.
    pub scale: f32,
    /// Matters for dtypes of 8 bits; others are rounded to nearest.
    pub rounding: Rounding,
}

impl Default for Storage {
    fn default() -> Self {
        Storage { scale: 1.0, rounding: Rounding::Nearest }
    }
}

/// The seed of a weight's stochastic rounding: the CRC-32 of its name, as ComfyUI takes it, with the user's seed on top. So each weight has
/// noise of its own, the same wherever it stands among the others.
pub fn seed_of(name: &str, seed: u32) -> u32 {
    let step = |crc: u32, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
    let crc = name.bytes().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(byte), step));
    !crc ^ seed
}

/// One op at one strength on all of a target or on a slice of it.
#[derive(Debug, Clone, Copy)]
pub struct Term<'a> {
    /// What to do.
    pub op: &'a Op,
    /// The user's number.
    pub strength: f64,
    /// Where, if not everywhere.
    pub slice: Option<Slice>,
}

/// The part of a weight that a slice names, as a shape and in the weight's matrix.
#[derive(Clone, Debug)]
pub struct Region {
    /// Shape of the part.
    pub shape: Vec<usize>,
    /// Its rows.
    pub rows: Range<usize>,
    /// Its columns.
    pub cols: Range<usize>,
}

impl Region {
    /// Checks `slice` against the weight's shape; `None` is all of it.
    pub fn of(name: &str, weight: &[usize], slice: Option<Slice>) -> Result<Self> {
        let mut shape = weight.to_vec();
        let (mut rows, mut cols) =
            (0..weight.first().copied().unwrap_or(1), 0..weight.iter().skip(1).product());
        if let Some(Slice { axis, start, len }) = slice {
            let size = weight.get(axis).copied().unwrap_or(0);
            let end = start.checked_add(len).filter(|&end| axis < 2 && axis < weight.len() && end <= size);
            let Some(end) = end else {
                return Err(Error::argument(
                    format!("`{name}`: a slice of {len} from {start} along axis {axis} is outside a weight of shape {weight:?}"),
                    "slices are ranges of axis 0 (rows) or 1 (input channels)",
                ));
            };
            shape[axis] = len;
            let kernel: usize = weight.iter().skip(2).product();
            match axis {
                0 => rows = start..end,
                _ => cols = start * kernel..end * kernel,
            }
        }
        Ok(Region { shape, rows, cols })
    }
}

/// The user's number times a factor of the file, in fp32, which both must leave it in.
pub(super) fn coefficient(name: &str, strength: f64, scale: f64) -> Result<f32> {
    let product = (strength * scale) as f32;
    match product.is_finite() {
        true => Ok(product),
        false => Err(Error::argument(
            format!("`{name}`: strength {strength} times the file's scale {scale} is beyond fp32"),
            "1 is the usual strength",
        )),
    }
}

impl Term<'_> {
    /// The user's number times the file's own factor, as the executors compute with it.
    pub fn coefficient(&self, name: &str) -> Result<f32> {
        coefficient(name, self.strength, self.op.scale())
    }
}
