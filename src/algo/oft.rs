//! OFT: `W' = W + s * (rescale o (R^T W) - W)`, R block-diagonal over the output channels, `R = (I + Q)(I - Q)^-1`, `Q = B - B^T`.
//!
//! Qiu et al. 2023, arXiv:2306.07280; sd-scripts and LyCORIS (diag-OFT). `alpha` is no rank's alpha but the constraint: where it is above 0,
//! Q (all blocks together) is shrunk to the Frobenius norm `alpha * O` when it is longer.
//!
//! | tensor | shape |
//! |---|---|
//! | `oft_blocks` | n, b, b: B; O = n * b |
//! | `oft_blocks.0`, `.1`, .. | n, b_i, b_i: sd-scripts on fused weights (Flux), each for its own rows and with its own constraint |
//! | `oft_diag` | n, b, b: R itself |
//! | `rescale` | O, 1.. |
//!
//! With a first axis more (m, n, b, b) the same names hold the stages of [`super::boft`].

use super::{malformed, required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::linalg;
use crate::merge::ops::{Op, Rotate, Stage};
use crate::view::Tensor;

pub(super) const BLOCKS: &str = "oft_blocks";
pub(super) const DIAG: &str = "oft_diag";
pub(super) const RESCALE: &str = "rescale";
/// sd-scripts' parts: q, k, v and the MLP of a fused layer at most.
pub(super) const PARTS: [&str; 4] = ["oft_blocks.0", "oft_blocks.1", "oft_blocks.2", "oft_blocks.3"];

pub(super) const RECIPE: Recipe = Recipe {
    name: "OFT / BOFT",
    marks: &[BLOCKS, DIAG, PARTS[0], PARTS[1], PARTS[2], PARTS[3], RESCALE],
    knows: &[BLOCKS, DIAG, PARTS[0], PARTS[1], PARTS[2], PARTS[3], RESCALE, ALPHA],
    read,
};

/// One OFT module.
#[derive(Debug)]
struct Oft {
    /// As the file has them.
    tensors: Vec<(&'static str, Tensor)>,
    blocks: Vec<Tensor>,
    /// Whether the blocks are R themselves.
    direct: bool,
    rescale: Option<Tensor>,
    constraint: Option<f32>,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let has = |name: &str| group.get(name).is_some();
    let direct = has(DIAG);
    let names: Vec<&str> = match (direct, has(BLOCKS)) {
        (true, true) => return Err(malformed(module, format!("both `{DIAG}` and `{BLOCKS}` are there"))),
        (true, false) => vec![DIAG],
        (false, true) => vec![BLOCKS],
        (false, false) => {
            let last = PARTS.iter().rposition(|name| has(name));
            let count = last.ok_or_else(|| malformed(module, format!("`{BLOCKS}` is missing")))? + 1;
            PARTS[..count].to_vec()
        }
    };
    let all = [DIAG, BLOCKS].into_iter().chain(PARTS);
    if let Some(extra) = all.filter(|name| !names.contains(name)).find(|name| has(name)) {
        return Err(malformed(module, format!("both `{}` and `{extra}` are there", names[0])));
    }
    let blocks =
        names.iter().map(|name| required(module, group, name).cloned()).collect::<Result<Vec<_>>>()?;
    let (alpha_tensor, constraint) = super::alpha(module, group)?;
    let rescale =
        group.get(RESCALE).is_some().then(|| required(module, group, RESCALE)).transpose()?.cloned();
    let own = group.tensors.iter().filter(|(name, _)| *name != ALPHA).cloned();
    let tensors: Vec<_> = own.chain(alpha_tensor.map(|t| (ALPHA, t))).collect();
    if let [stages] = &blocks[..] {
        if stages.shape().len() == 4 {
            return super::boft::new(module, tensors, stages, direct, rescale, constraint);
        }
    }
    for (name, blocks) in names.iter().zip(&blocks) {
        if !matches!(*blocks.shape(), [_, b, c] if b == c) {
            return Err(malformed(module, format!("`{name}` must be [n, b, b], it is {:?}", blocks.shape())));
        }
    }
    Ok(Box::new(Oft { tensors, blocks, direct, rescale, constraint }))
}

/// R of every block, [n, b, b]; the constraint holds over all of them together.
pub(super) fn rotations(
    module: &str,
    blocks: &Tensor,
    constraint: Option<f32>,
    rows: usize,
) -> Result<Vec<f64>> {
    let b = blocks.shape().last().copied().unwrap_or(1);
    let values: Vec<f64> = blocks.to_f32(module)?.into_iter().map(f64::from).collect();
    let mut skew = Vec::with_capacity(values.len());
    for block in values.chunks_exact(b * b) {
        skew.extend((0..b * b).map(|i| block[i] - block[i % b * b + i / b]));
    }
    if let Some(limit) = constraint.filter(|&c| c > 0.0).map(|c| f64::from(c) * rows as f64) {
        let norm = skew.iter().map(|v| v * v).sum::<f64>().sqrt();
        if norm > limit {
            skew.iter_mut().for_each(|v| *v *= limit / norm);
        }
    }
    linalg::cayley(&skew, b)
        .ok_or_else(|| malformed(module, format!("`{BLOCKS}` has values that are not finite")))
}

/// Every [b, b] block transposed, in f32.
pub(super) fn transposed_blocks(values: &[f64], n: usize, b: usize) -> Tensor {
    let turned = values.chunks_exact(b * b).flat_map(|m| (0..b * b).map(|i| m[i % b * b + i / b] as f32));
    Tensor::of_f32(turned.collect(), &[n, b, b])
}

/// The rescaling as one value per row.
pub(super) fn per_row(
    module: &str,
    name: &str,
    rescale: Option<&Tensor>,
    rows: usize,
) -> Result<Option<Tensor>> {
    let Some(tensor) = rescale else { return Ok(None) };
    match tensor.reshape(&[rows]) {
        Some(flat) => Ok(Some(flat)),
        None => Err(malformed(
            module,
            format!("`{name}` {:?} must have one value per output channel, {rows}", tensor.shape()),
        )),
    }
}

/// Checks that a module that turns `rows` rows fits the weight.
pub(super) fn fit_rows(module: &str, rows: usize, target: &[usize]) -> Result<()> {
    match target.first() {
        Some(&out) if out == rows => Ok(()),
        _ => Err(crate::error::Error::Shape {
            tensor: module.to_owned(),
            what: "the module turns output channels and does not fit the weight (module's count first)"
                .into(),
            expected: vec![rows],
            got: target.to_vec(),
        }),
    }
}

impl Algorithm for Oft {
    fn name(&self) -> &'static str {
        "OFT"
    }

    /// The constraint stands in its place.
    fn alpha(&self) -> Option<f32> {
        self.constraint
    }

    fn shape(&self) -> Option<Vec<usize>> {
        None
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let rows = self.blocks.iter().map(|t| t.shape()[0] * t.shape()[1]).sum();
        fit_rows(module, rows, target)?;
        let blocks = self.blocks.iter().map(|tensor| {
            let (n, b) = (tensor.shape()[0], tensor.shape()[1]);
            let values = match self.direct {
                true => tensor.to_f32(module)?.into_iter().map(f64::from).collect(),
                false => rotations(module, tensor, self.constraint, n * b)?,
            };
            Ok(transposed_blocks(&values, n, b))
        });
        let stages = vec![Stage { blocks: blocks.collect::<Result<_>>()?, order: None }];
        let rescale = per_row(module, RESCALE, self.rescale.as_ref(), rows)?;
        Ok(vec![Op::Rotate(Rotate { stages, rescale, axis: 0, interpolate: false })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (*name, tensor)).collect()
    }
}

#[cfg(feature = "torch")]
pub(super) use training::BEGIN;

/// The same formula in training: `dW = rescale o (R^T W) - W`, as a sum of what is small.
#[cfg(feature = "torch")]
pub(super) mod training {
    use super::{ALPHA, BLOCKS, RESCALE};
    use crate::algo::factorization::factorization;
    use crate::algo::training::{
        through_delta, Begin, Gradients, Init, Layer, Parameter, Pass, Rule, Trainable,
    };
    use crate::error::Result;
    use tch::Tensor;

    pub(in crate::algo) const BEGIN: Begin = Begin {
        names: &["diag-oft", "oft"],
        new: |layer, rule, _| {
            // LyCORIS's choice: its reader finds the size of a file's blocks by it.
            let (size, count) = factorization(layer.weight[0], rule.dim as i64);
            Ok(Box::new(Training::new("OFT", layer, rule, &[count, size, size], turned)))
        },
    };

    /// `(R - I)^T W` of every block.
    fn turned(turns: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let (count, size) = (turns.size()[0], turns.size()[1]);
        let rows = weight.f_reshape([count, size, -1])?;
        Ok(turns.f_transpose(1, 2)?.f_bmm(&rows)?.f_reshape(weight.size())?)
    }

    /// What blocks of R - I add to a weight, a matrix.
    type Turn = fn(turns: &Tensor, weight: &Tensor) -> Result<Tensor>;

    /// A diag-OFT or BOFT module in training.
    #[derive(Debug)]
    pub(in crate::algo) struct Training {
        name: &'static str,
        /// Of `oft_blocks`.
        blocks: Vec<usize>,
        /// Of `rescale`, if it has one.
        rescale: Option<Vec<usize>>,
        constraint: f64,
        /// Largest norm of Q; 0: any.
        limit: f64,
        turn: Turn,
    }

    impl Training {
        pub(in crate::algo) fn new(
            name: &'static str,
            layer: &Layer,
            rule: &Rule,
            blocks: &[usize],
            turn: Turn,
        ) -> Self {
            let mut rescale = vec![1; layer.weight.len()];
            rescale[0] = layer.weight[0];
            Training {
                name,
                blocks: blocks.to_vec(),
                rescale: rule.rescaled.then_some(rescale),
                constraint: rule.constraint,
                limit: rule.constraint * layer.weight[0] as f64,
                turn,
            }
        }

        /// R - I of every block: `2 Q (I - Q)^-1` keeps the digits of a small Q, as the difference would not.
        fn turns(&self, blocks: &Tensor) -> Result<Tensor> {
            let mut q = blocks.f_sub(&blocks.f_transpose(-1, -2)?)?;
            if self.limit > 0.0 {
                let norm = q.f_norm()?.f_clamp_min(self.limit)?;
                q = q.f_mul(&norm.f_reciprocal()?.f_mul_scalar(self.limit)?)?;
            }
            let size = self.blocks[self.blocks.len() - 1] as i64;
            let one = Tensor::f_eye(size, (q.f_kind()?, q.device()))?;
            // Q is skew-symmetric, so I - Q has an inverse: nobody needs to wait for the device to say so. The two commute.
            Ok(Tensor::f_linalg_solve_ex(&one.f_sub(&q)?, &q.f_mul_scalar(2.0)?, true, false)?.0)
        }
    }

    impl Trainable for Training {
        fn name(&self) -> &'static str {
            self.name
        }

        fn constants(&self) -> Vec<(&'static str, f64)> {
            vec![(ALPHA, self.constraint)]
        }

        fn parameters(&self) -> Vec<Parameter> {
            let rescale = self.rescale.iter().map(|s| Parameter::new(RESCALE, s, Init::Constant(1.0)));
            let blocks = Parameter::new(BLOCKS, &self.blocks, Init::ZEROS);
            std::iter::once(blocks).chain(rescale).map(Parameter::precise).collect()
        }

        fn needs_weight(&self) -> bool {
            true
        }

        fn delta(&self, pass: &Pass) -> Result<Tensor> {
            let blocks = &pass.parameters[0];
            let weight = pass.base()?.f_to_kind(blocks.f_kind()?)?.f_flatten(1, -1)?;
            let mut delta = (self.turn)(&self.turns(blocks)?, &weight)?;
            if let Some(rescale) = pass.parameters.get(1) {
                let stretch = rescale.f_reshape([-1, 1])?.f_sub_scalar(1.0)?;
                delta = weight.f_add(&delta)?.f_mul(&stretch)?.f_add(&delta)?;
            }
            Ok(delta.f_reshape(pass.shape())?.f_to_kind(pass.compute)?)
        }

        fn backward(&self, pass: &Pass, x: &Tensor, grad_y: &Tensor, want_input: bool) -> Result<Gradients> {
            through_delta(self, pass, x, grad_y, want_input)
        }
    }
}
