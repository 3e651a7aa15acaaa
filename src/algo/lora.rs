//! LoRA and LoCon: `dW = alpha / rank * up @ down`.
//!
//! LoRA: Hu et al. 2021, arXiv:2106.09685. LoCon is the same on convolutions: `down` has the layer's kernel, `up` is 1x1. With a Tucker
//! core `mid` (LyCORIS): `dW[o, i, k] = alpha / rank * sum_pq up[o, p] mid[p, q, k] down[q, i]`.
//!
//! | tensor | Linear | conv | conv with Tucker core |
//! |---|---|---|---|
//! | `lora_up.weight` | O, r | O, r, 1.. | O, r, 1.. |
//! | `lora_down.weight` | r, I | r, I, kernel | r, I, 1.. |
//! | `lora_mid.weight` | | | r, r, kernel |
//! | `lora_up.bias` | O: `b' = b + s * alpha / rank * bias` (PEFT's `lora_bias`) | O | O |
//! | `alpha` | one number; missing or 0: the rank | | |
//!
//! DyLoRA ([`super::dylora`]) writes the same tensors, trained so that every prefix of the ranks works: a prefix of b ranks has the scale
//! alpha / b. PEFT's LoRA on embeddings [words, width] has both factors transposed: `lora_embedding_A` [r, words],
//! `lora_embedding_B` [width, r].

use super::{malformed, required, Algorithm, Changes, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::{LowRank, Op};
use crate::view::Tensor;

const UP: &str = "lora_up.weight";
const DOWN: &str = "lora_down.weight";
const MID: &str = "lora_mid.weight";

const UP_BIAS: &str = "lora_up.bias";
const EMBEDDING_A: &str = "lora_embedding_A";
const EMBEDDING_B: &str = "lora_embedding_B";

pub(super) const RECIPE: Recipe =
    Recipe { name: "LoRA / LoCon", marks: &[UP, DOWN], knows: &[UP, DOWN, MID, UP_BIAS, ALPHA], read };
pub(super) const EMBEDDING: Recipe = Recipe {
    name: "LoRA (embedding)",
    marks: &[EMBEDDING_A, EMBEDDING_B],
    knows: &[EMBEDDING_A, EMBEDDING_B, ALPHA],
    read: read_embedding,
};

/// One LoRA / LoCon module.
#[derive(Debug, Clone)]
pub struct Lora {
    up: Tensor,
    down: Tensor,
    mid: Option<Tensor>,
    up_bias: Option<Tensor>,
    alpha_tensor: Option<Tensor>,
    alpha: Option<f32>,
    rank: usize,
}

impl Lora {
    /// A module from its factors; shapes as in the table above.
    pub fn new(
        module: &str,
        up: Tensor,
        down: Tensor,
        mid: Option<Tensor>,
        alpha: Option<f32>,
    ) -> Result<Self> {
        let shapes = || format!("up {:?}, down {:?}", up.shape(), down.shape());
        let (Some(&rank), true) = (down.shape().first(), down.shape().len() >= 2 && up.shape().len() >= 2)
        else {
            return Err(malformed(module, format!("factors must have at least two axes: {}", shapes())));
        };
        if up.shape()[1] != rank || up.shape()[2..].iter().any(|&d| d != 1) {
            return Err(malformed(
                module,
                format!("up must be [out, {rank}, 1..] as down has rank {rank}: {}", shapes()),
            ));
        }
        if rank == 0 || up.count() == 0 || down.count() == 0 {
            return Err(malformed(module, format!("empty factors: {}", shapes())));
        }
        if let Some(mid) = &mid {
            let fits = mid.shape().len() > 2
                && mid.shape()[..2] == [rank, rank]
                && down.shape()[2..].iter().all(|&d| d == 1)
                && mid.count() > 0;
            if !fits {
                let what = format!(
                    "mid {:?} must be [{rank}, {rank}, kernel] beside a 1x1 down: {}",
                    mid.shape(),
                    shapes()
                );
                return Err(malformed(module, what));
            }
        }
        for tensor in [Some(&up), Some(&down), mid.as_ref()].into_iter().flatten() {
            crate::dtype::Float::require(tensor.dtype(), module)?;
        }
        Ok(Lora { up, down, mid, up_bias: None, alpha_tensor: None, alpha, rank })
    }

    /// `down` with the Tucker core folded in, as [r, I * kernel].
    fn folded_down(&self, module: &str) -> Result<Tensor> {
        match &self.mid {
            Some(mid) => super::fold(module, mid, &self.down),
            None => super::matrix(module, &self.down, self.rank),
        }
    }
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let (Some(up), Some(down)) = (group.get(UP), group.get(DOWN)) else {
        let missing = if group.get(UP).is_some() { DOWN } else { UP };
        return Err(malformed(module, format!("`{missing}` is missing")));
    };
    let (alpha_tensor, alpha) = super::alpha(module, group)?;
    let mut lora = Lora::new(module, up.clone(), down.clone(), group.get(MID).cloned(), alpha)?;
    lora.alpha_tensor = alpha_tensor;
    lora.up_bias =
        group.get(UP_BIAS).is_some().then(|| required(module, group, UP_BIAS)).transpose()?.cloned();
    Ok(Box::new(lora))
}

impl Algorithm for Lora {
    fn name(&self) -> &'static str {
        if self.down.shape().len() > 2 || self.mid.is_some() {
            "LoCon"
        } else {
            "LoRA"
        }
    }

    fn rank(&self) -> Option<usize> {
        Some(self.rank)
    }

    fn alpha(&self) -> Option<f32> {
        self.alpha
    }

    fn shape(&self) -> Option<Vec<usize>> {
        let kernel = self.mid.as_ref().unwrap_or(&self.down).shape().get(2..).unwrap_or(&[]);
        Some([&[self.up.shape()[0], self.down.shape()[1]], kernel].concat())
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        super::fit(module, &self.shape().unwrap_or_default(), target)?;
        let up = super::matrix(module, &self.up, self.up.shape()[0])?;
        let scale = super::scale(self.alpha, self.rank);
        Ok(vec![Op::LowRank(LowRank { up, down: self.folded_down(module)?, scale })])
    }

    fn lower_bias(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let scale = super::scale(self.alpha, self.rank);
        self.up_bias.iter().map(|t| super::dense(module, t, target, scale)).collect()
    }

    fn changes(&self) -> Changes {
        Changes { weight: true, bias: self.up_bias.is_some() }
    }

    fn prefix(&self, module: &str, rank: usize) -> Option<Result<Box<dyn Algorithm>>> {
        // A Tucker core mixes the ranks.
        let rank = rank.clamp(1, self.rank);
        self.mid.is_none().then(|| {
            let down =
                self.down.rows(0..rank).ok_or_else(|| malformed(module, "a factor is not contiguous"))?;
            let up = super::columns(module, &self.up, rank)?;
            // A missing alpha means the rank of the whole, and stays it.
            let alpha = self.alpha.filter(|&a| a != 0.0).unwrap_or(self.rank as f32);
            let alpha_tensor = self.alpha_tensor.clone().filter(|_| self.alpha == Some(alpha));
            let alpha_tensor = Some(alpha_tensor.unwrap_or_else(|| Tensor::of_f32(vec![alpha], &[])));
            let cut = Lora { up, down, rank, alpha: Some(alpha), alpha_tensor, ..self.clone() };
            Ok(Box::new(cut) as Box<dyn Algorithm>)
        })
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors = vec![(DOWN, &self.down), (UP, &self.up)];
        tensors.extend(self.mid.as_ref().map(|t| (MID, t)));
        tensors.extend(self.up_bias.as_ref().map(|t| (UP_BIAS, t)));
        tensors.extend(self.alpha_tensor.as_ref().map(|t| (ALPHA, t)));
        tensors
    }
}

/// A LoRA of an embedding, as PEFT writes it.
#[derive(Debug)]
struct Embedding {
    a: Tensor,
    b: Tensor,
    alpha_tensor: Option<Tensor>,
    alpha: Option<f32>,
}

fn read_embedding(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let (a, b) = (required(module, group, EMBEDDING_A)?, required(module, group, EMBEDDING_B)?);
    if a.shape().len() != 2 || b.shape().len() != 2 || a.shape()[0] != b.shape()[1] {
        let what = format!("A {:?} and B {:?} do not fit together", a.shape(), b.shape());
        return Err(malformed(module, what));
    }
    let (alpha_tensor, alpha) = super::alpha(module, group)?;
    Ok(Box::new(Embedding { a: a.clone(), b: b.clone(), alpha_tensor, alpha }))
}

impl Algorithm for Embedding {
    fn name(&self) -> &'static str {
        "LoRA (embedding)"
    }

    fn rank(&self) -> Option<usize> {
        self.a.shape().first().copied()
    }

    fn alpha(&self) -> Option<f32> {
        self.alpha
    }

    fn shape(&self) -> Option<Vec<usize>> {
        Some(vec![self.a.shape()[1], self.b.shape()[0]])
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        super::fit(module, &self.shape().unwrap_or_default(), target)?;
        let (up, down) = (super::transposed(module, &self.a)?, super::transposed(module, &self.b)?);
        Ok(vec![Op::LowRank(LowRank { up, down, scale: super::scale(self.alpha, self.a.shape()[0]) })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let pair = [(EMBEDDING_A, &self.a), (EMBEDDING_B, &self.b)];
        pair.into_iter().chain(self.alpha_tensor.as_ref().map(|t| (ALPHA, t))).collect()
    }
}

#[cfg(feature = "torch")]
pub(super) use training::{BEGIN, FROZEN_DOWN};

/// The same formula in training, and the gradient of the Linear case by hand.
#[cfg(feature = "torch")]
pub(super) mod training {
    use super::{ALPHA, DOWN, MID, UP};
    use crate::algo::training::{
        add_gradients, add_output, differentiate, norm_of_delta, scaled, Begin, Init, Layer, Parameter, Pass,
        Rule, Trainable,
    };
    use crate::error::Result;
    use crate::torch_ext::{multiply, product, Factor};
    use tch::{Kind, Tensor};

    pub(in crate::algo) const BEGIN: Begin =
        Begin { names: &["lora", "locon"], new: |layer, rule, _| Ok(Box::new(Training::new(layer, rule))) };

    /// LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): the file is a plain LoRA.
    pub(in crate::algo) const FROZEN_DOWN: Begin = Begin {
        names: &["lora-fa"],
        new: |layer, rule, _| {
            Ok(Box::new(Training { frozen_down: true, tucker: false, ..Training::new(layer, rule) }))
        },
    };

    /// A LoRA or LoCon module in training.
    #[derive(Debug)]
    pub(in crate::algo) struct Training {
        weight: Vec<usize>,
        rank: usize,
        alpha: f64,
        tucker: bool,
        /// LoRA-FA: `down` stays as it starts.
        frozen_down: bool,
    }

    impl Training {
        pub(in crate::algo) fn new(layer: &Layer, rule: &Rule) -> Self {
            let (weight, tucker) = (layer.weight.clone(), rule.tucker && layer.large_kernel());
            Training { weight, rank: rule.dim, alpha: rule.alpha, tucker, frozen_down: false }
        }

        /// [`Trainable::accumulate`] where the factors, down and up, follow from a pass's parameters by `factors`.
        pub(in crate::algo) fn accumulate_through(
            &self,
            factors: &dyn Fn() -> Result<[Tensor; 2]>,
            pass: &Pass,
            (x, grad_y): (&Tensor, &Tensor),
            want_input: bool,
            into: &[Tensor],
        ) -> Result<Option<Tensor>> {
            let leaf = |t: &Tensor| Ok(t.f_detach()?.f_set_requires_grad(true)?);
            let leaves = tch::no_grad(factors)?.iter().map(leaf).collect::<Result<Vec<_>>>()?;
            let kind = into[0].f_kind()?;
            let zero = |t: &Tensor| Ok(Tensor::f_zeros(t.size(), (kind, t.device()))?);
            let gradients = leaves.iter().map(zero).collect::<Result<Vec<_>>>()?;
            let inner = Pass { parameters: &leaves, ..*pass };
            let input = self.accumulate(&inner, x, grad_y, want_input, &gradients)?;
            let side_by_side = |pair: &[Tensor]| -> Result<Tensor> {
                Ok(Tensor::f_cat(&[pair[0].f_flatten(0, -1)?, pair[1].f_flatten(0, -1)?], 0)?)
            };
            let gradients = side_by_side(&gradients)?;
            let found = differentiate(&|_| side_by_side(&factors()?), pass.parameters, x, &gradients, false)?;
            add_gradients(found, into)?;
            Ok(input)
        }

        /// alpha / rank.
        pub(in crate::algo) fn scale(&self) -> f64 {
            self.alpha / self.rank as f64
        }
    }

    impl Trainable for Training {
        fn name(&self) -> &'static str {
            if self.weight.len() > 2 {
                "LoCon"
            } else {
                "LoRA"
            }
        }

        fn rank(&self) -> Option<usize> {
            Some(self.rank)
        }

        fn constants(&self) -> Vec<(&'static str, f64)> {
            vec![(ALPHA, self.alpha)]
        }

        fn parameters(&self) -> Vec<Parameter> {
            let point = vec![1; self.weight.len() - 2];
            let kernel = if self.tucker { &point[..] } else { &self.weight[2..] };
            let down = [&[self.rank, self.weight[1]], kernel].concat();
            let up = [&[self.weight[0], self.rank], &point[..]].concat();
            let init = match self.frozen_down {
                false => Init::kaiming(&down),
                // As in sd-scripts: what stays as it begins decides about the learning rate.
                true => Init::Normal { deviation: (2.0 / (self.weight[1] + self.rank) as f64).sqrt() },
            };
            let mut parameters = vec![
                Parameter { frozen: self.frozen_down, ..Parameter::new(DOWN, &down, init).ranked(0) },
                Parameter::new(UP, &up, Init::ZEROS).ranked(1).plus(),
            ];
            if self.tucker {
                let mid = [&[self.rank, self.rank], &self.weight[2..]].concat();
                parameters.push(Parameter::new(MID, &mid, Init::kaiming(&mid)).ranked(0).ranked(1));
            }
            parameters
        }

        fn delta(&self, pass: &Pass) -> Result<Tensor> {
            let (down, up) = (&pass.parameters[0], &pass.parameters[1]);
            let rank = down.size()[0];
            let mut down = down.f_reshape([rank, -1])?;
            if self.tucker {
                let mid = pass.parameters[2].f_reshape([rank, rank, -1])?;
                down = Tensor::f_einsum("pqk,qi->pik", &[mid, down], None::<i64>)?.f_reshape([rank, -1])?;
            }
            scaled(&up.f_reshape([-1, rank])?.f_matmul(&down)?.f_reshape(pass.shape())?, self.scale())
        }

        fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor> {
            let (layer, down, up) = (pass.layer, &pass.parameters[0], &pass.parameters[1]);
            if layer.groups() > 1 {
                // `up` mixes ranks into outputs of one group each, while `down` belongs to all: only dW itself has the groups' shape.
                let output = layer.apply(x, &self.delta(pass)?)?;
                return pass.draw.map_or(Ok(output.shallow_clone()), |draw| draw.values(output));
            }
            let t = match pass.parameters.get(2) {
                Some(mid) => layer.apply(&layer.pointwise(x, down)?, mid)?,
                None => layer.apply(x, down)?,
            };
            let mut t = scaled(&t, self.scale())?;
            if let Some(draw) = pass.draw {
                t = draw.values(t)?;
                // One mask per sample, as in sd-scripts. Convolutions have the ranks behind the batch, Linear layers at the end.
                let size = t.size();
                let mut shape = vec![1i64; size.len()];
                let axis = if self.weight.len() > 2 { 1 } else { size.len() - 1 };
                if size.len() > 1 {
                    shape[0] = size[0];
                }
                shape[axis] = size[axis];
                if let Some(mask) = draw.ranks(&shape, pass.compute)? {
                    t = t.f_mul(&mask)?;
                }
            }
            layer.pointwise(&t, up)
        }

        fn add_forward(&self, pass: &Pass, x: &Tensor, y: &Tensor) -> Result<()> {
            if !pass.linear_into(y) {
                return add_output(self, pass, x, y);
            }
            let (down, up) = (&pass.parameters[0], &pass.parameters[1]);
            let t = multiply(Factor(x, false), Factor(down, true))?;
            product(y, Factor(&t, false), Factor(up, true), 1.0, self.scale())
        }

        fn accumulate(
            &self,
            pass: &Pass,
            x: &Tensor,
            grad_y: &Tensor,
            want_input: bool,
            into: &[Tensor],
        ) -> Result<Option<Tensor>> {
            if !pass.linear() {
                return add_gradients(self.backward(pass, x, grad_y, want_input)?, into);
            }
            let (down, up) = (&pass.parameters[0], &pass.parameters[1]);
            // Five products, the sums of two of them in the gradient's fp32.
            let t = multiply(Factor(x, false), Factor(down, true))?;
            let grad_t = multiply(Factor(grad_y, false), Factor(up, false))?;
            product(&into[1], Factor(grad_y, true), Factor(&t, false), 1.0, self.scale())?;
            if !self.frozen_down {
                product(&into[0], Factor(&grad_t, true), Factor(x, false), 1.0, self.scale())?;
            }
            if !want_input {
                return Ok(None);
            }
            let grad_x = x.f_empty_like()?;
            product(&grad_x, Factor(&grad_t, false), Factor(down, false), 0.0, self.scale())?;
            Ok(Some(grad_x))
        }

        /// |U D|^2 is the sum of (U^T U) o (D D^T), so dW need not exist.
        fn norm(&self, pass: &Pass) -> Result<Tensor> {
            let (down, up) = (&pass.parameters[0], &pass.parameters[1]);
            if self.tucker {
                return norm_of_delta(self, pass);
            }
            let rank = down.size()[0];
            let wide = |t: &Tensor| -> Result<Tensor> { Ok(t.f_to_kind(Kind::Double)?) };
            let (down, up) = (wide(&down.f_reshape([rank, -1])?)?, wide(&up.f_reshape([-1, rank])?)?);
            let (rows, columns) =
                (up.f_transpose(0, 1)?.f_matmul(&up)?, down.f_matmul(&down.f_transpose(0, 1)?)?);
            scaled(&rows.f_mul(&columns)?.f_sum(Kind::Double)?.f_clamp_min(0.0)?.f_sqrt()?, self.scale())
        }

        fn shrunk(&self, ratio: &Tensor) -> Result<Option<Vec<Tensor>>> {
            let parameters = self.parameters();
            let trained = parameters.iter().filter(|p| !p.frozen).count();
            let each = ratio.f_pow_tensor_scalar(1.0 / trained as f64)?;
            let one = ratio.f_ones_like()?;
            let factor = |p: &Parameter| if p.frozen { one.shallow_clone() } else { each.shallow_clone() };
            Ok(Some(parameters.iter().map(factor).collect()))
        }
    }
}
