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
//! DyLoRA (Valipour et al. 2022, arXiv:2210.07558) writes the same tensors, trained so that every prefix of the ranks works: a prefix of b
//! ranks has the scale alpha / b. PEFT's LoRA on embeddings [words, width] has both factors transposed: `lora_embedding_A` [r, words],
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
pub use training::Training;

/// The same formula in training: start values, differentiable forward, and the gradient of the Linear case by hand.
#[cfg(feature = "torch")]
mod training {
    use super::{malformed, DOWN, UP};
    use crate::algo::{differentiate, Gradients, Init, Parameter, Trainable};
    use crate::error::{Error, Result};
    use crate::merge::bypass::Geometry;
    use tch::Tensor;

    /// A LoRA or LoCon module in training.
    #[derive(Debug)]
    pub struct Training {
        weight: Vec<usize>,
        stride: Vec<i64>,
        padding: Vec<i64>,
        dilation: Vec<i64>,
        groups: usize,
        rank: usize,
        alpha: f64,
    }

    impl Training {
        /// A module for a Linear or convolution weight of this shape. `alpha` 0 means the rank, as it does in a file.
        pub fn new(
            module: &str,
            weight: &[usize],
            geometry: &Geometry,
            rank: usize,
            alpha: f64,
        ) -> Result<Self> {
            let refuse = |what: String, hint: &str| Err(Error::argument(format!("`{module}`: {what}"), hint));
            if !(2..=5).contains(&weight.len()) || weight.contains(&0) {
                return refuse(
                    format!("a weight of shape {weight:?} is neither Linear [out, in] nor a convolution [out, in, kernel..]"),
                    "register only Linear, Conv1d, Conv2d and Conv3d weights",
                );
            }
            let (axes, groups) = (weight.len() - 2, geometry.groups);
            if groups == 0 || weight[0] % groups != 0 || (axes == 0 && groups != 1) {
                return refuse(
                    format!("{groups} groups do not fit a weight of shape {weight:?}"),
                    "groups divide the output channels; a Linear layer has one",
                );
            }
            if rank == 0 || !alpha.is_finite() {
                return refuse(
                    format!("rank {rank} with alpha {alpha}"),
                    "the rank is at least 1, alpha a finite number",
                );
            }
            let spread = |values: &[usize], least: usize, what: &str| {
                let values = if values.len() == 1 { vec![values[0]; axes] } else { values.to_vec() };
                if values.len() != axes || values.iter().any(|&v| v < least || i64::try_from(v).is_err()) {
                    return Err(bad_geometry(module, what, &values, axes, least));
                }
                Ok(values.into_iter().map(|v| v as i64).collect())
            };
            Ok(Training {
                weight: weight.to_vec(),
                stride: spread(&geometry.stride, 1, "stride")?,
                padding: spread(&geometry.padding, 0, "padding")?,
                dilation: spread(&geometry.dilation, 1, "dilation")?,
                groups,
                rank,
                alpha: if alpha == 0.0 { rank as f64 } else { alpha },
            })
        }

        fn scale(&self) -> f64 {
            self.alpha / self.rank as f64
        }

        fn scaled(&self, t: Tensor) -> Result<Tensor> {
            Ok(if self.scale() == 1.0 { t } else { t.f_mul_scalar(self.scale())? })
        }

        /// dW in the weight's own shape.
        fn delta(&self, up: &Tensor, down: &Tensor) -> Result<Tensor> {
            let (out, rank) = (self.weight[0] as i64, self.rank as i64);
            let delta = up.f_reshape([out, rank])?.f_matmul(&down.f_reshape([rank, -1])?)?;
            let shape: Vec<i64> = self.weight.iter().map(|&d| d as i64).collect();
            self.scaled(delta.f_reshape(shape)?)
        }

        fn convolve(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
            let none = vec![0i64; self.stride.len()];
            let (stride, padding, dilation) = (&self.stride[..], &self.padding[..], &self.dilation[..]);
            let groups = self.groups as i64;
            Ok(x.f_convolution(weight, None::<Tensor>, stride, padding, dilation, false, &none[..], groups)?)
        }
    }

    fn bad_geometry(module: &str, what: &str, values: &[usize], axes: usize, least: usize) -> Error {
        Error::argument(
            format!("`{module}`: {what} {values:?} does not fit {axes} spatial axes"),
            format!("pass one value, or one per axis; each is at least {least}"),
        )
    }

    impl Trainable for Training {
        fn name(&self) -> &'static str {
            if self.weight.len() > 2 {
                "LoCon"
            } else {
                "LoRA"
            }
        }

        fn rank(&self) -> usize {
            self.rank
        }

        fn alpha(&self) -> f64 {
            self.alpha
        }

        fn parameters(&self) -> Vec<Parameter> {
            let mut down = vec![self.rank];
            down.extend(&self.weight[1..]);
            let mut up = vec![1; self.weight.len()];
            (up[0], up[1]) = (self.weight[0], self.rank);
            // torch's kaiming_uniform_(a = sqrt(5)): the bound is 1 / sqrt(fan_in).
            let fan_in = self.weight[1..].iter().map(|&d| d as f64).product::<f64>();
            vec![
                Parameter { slot: DOWN, shape: down, init: Init::Uniform { bound: 1.0 / fan_in.sqrt() } },
                Parameter { slot: UP, shape: up, init: Init::Zeros },
            ]
        }

        fn forward(&self, parameters: &[Tensor], x: &Tensor) -> Result<Tensor> {
            let [down, up] = parameters else { return Err(malformed(UP, "needs down and up")) };
            if self.weight.len() == 2 {
                let t = self.scaled(x.f_linear(down, None::<Tensor>)?)?;
                return Ok(t.f_linear(up, None::<Tensor>)?);
            }
            if self.groups > 1 {
                // `up` mixes ranks into outputs of one group each, while `down` belongs to all: only dW itself has the groups' shape.
                return self.convolve(x, &self.delta(up, down)?);
            }
            let t = self.scaled(self.convolve(x, down)?)?;
            let (ones, zeros) = (vec![1i64; self.stride.len()], vec![0i64; self.stride.len()]);
            Ok(t.f_convolution(up, None::<Tensor>, &ones[..], &zeros[..], &ones[..], false, &zeros[..], 1)?)
        }

        fn backward(
            &self,
            parameters: &[Tensor],
            x: &Tensor,
            grad_y: &Tensor,
            want_input: bool,
        ) -> Result<Gradients> {
            let ([down, up], 2) = (parameters, self.weight.len()) else {
                return differentiate(&|x| self.forward(parameters, x), parameters, x, grad_y, want_input);
            };
            // Four products; differentiating `forward` would compute its output once more for nothing.
            tch::no_grad(|| {
                let (inputs, outputs) = (self.weight[1] as i64, self.weight[0] as i64);
                let (rows, grad) = (x.f_reshape([-1, inputs])?, grad_y.f_reshape([-1, outputs])?);
                let t = self.scaled(rows.f_matmul(&down.f_transpose(0, 1)?)?)?;
                let grad_t = self.scaled(grad.f_matmul(up)?)?;
                let grad_down = grad_t.f_transpose(0, 1)?.f_matmul(&rows)?;
                let grad_up = grad.f_transpose(0, 1)?.f_matmul(&t)?;
                let input = want_input.then(|| grad_t.f_matmul(down)?.f_reshape(x.size())).transpose()?;
                Ok(Gradients { parameters: vec![grad_down, grad_up], input })
            })
        }
    }
}

#[cfg(all(test, feature = "torch"))]
mod tests {
    use super::*;
    use crate::algo::{Algorithm, Gradients, Trainable};
    use crate::merge::bypass::{self, Geometry};
    use crate::merge::ops::Term;
    use crate::view::{Device, View};
    use tch::{Kind, Tensor as Torch};

    struct Case {
        name: &'static str,
        weight: &'static [usize],
        geometry: Geometry,
        x: &'static [i64],
        y: &'static [i64],
    }

    fn cases() -> Vec<Case> {
        let geometry = |stride: &[usize], padding: &[usize], dilation: &[usize], groups| Geometry {
            stride: stride.to_vec(),
            padding: padding.to_vec(),
            dilation: dilation.to_vec(),
            groups,
        };
        let case = |name, weight, geometry, x, y| Case { name, weight, geometry, x, y };
        vec![
            case("linear", &[5, 7], Geometry::default(), &[2, 3, 7], &[2, 3, 5]),
            case("linear, one row", &[5, 7], Geometry::default(), &[7], &[5]),
            case("conv1d", &[6, 4, 3], geometry(&[2], &[1], &[1], 1), &[2, 4, 9], &[2, 6, 5]),
            case("conv2d", &[6, 4, 3, 3], geometry(&[1, 2], &[1, 0], &[1], 1), &[2, 4, 5, 7], &[2, 6, 5, 3]),
            case("conv2d 1x1", &[6, 4, 1, 1], Geometry::default(), &[2, 4, 3, 5], &[2, 6, 3, 5]),
            case(
                "conv2d dilated",
                &[6, 4, 3, 3],
                geometry(&[1], &[2], &[2], 1),
                &[2, 4, 6, 5],
                &[2, 6, 6, 5],
            ),
            case(
                "conv2d grouped",
                &[6, 2, 3, 3],
                geometry(&[1], &[1], &[1], 2),
                &[2, 4, 5, 4],
                &[2, 6, 5, 4],
            ),
            case(
                "conv3d",
                &[4, 3, 2, 3, 3],
                geometry(&[1, 2, 1], &[0, 1, 1], &[1], 1),
                &[1, 3, 3, 5, 4],
                &[1, 4, 2, 3, 4],
            ),
        ]
    }

    const RANK: usize = 3;
    const ALPHA: f64 = 1.7;

    fn training(case: &Case) -> Training {
        Training::new(case.name, case.weight, &case.geometry, RANK, ALPHA).unwrap()
    }

    fn wave(shape: &[i64], phase: f64) -> Torch {
        let n = shape.iter().product::<i64>();
        Torch::from_slice(&(0..n).map(|i| (i as f64 * 1.37 + phase).sin()).collect::<Vec<f64>>())
            .reshape(shape)
    }

    fn factors(module: &Training) -> Vec<Torch> {
        let shape = |p: &crate::algo::Parameter| p.shape.iter().map(|&d| d as i64).collect::<Vec<_>>();
        let leaf = |(i, p)| wave(&shape(p), i as f64 + 0.2).set_requires_grad(true);
        module.parameters().iter().enumerate().map(leaf).collect()
    }

    fn assert_close(what: &str, got: &Torch, want: &Torch, tolerance: f64) {
        assert_eq!(got.size(), want.size(), "{what}");
        let off = (got - want).abs().max().double_value(&[]);
        let scale = want.abs().max().double_value(&[]);
        assert!(off <= tolerance * scale, "{what}: off by {off} of {scale}");
    }

    #[test]
    fn gradients_are_those_of_central_differences_and_of_autograd() {
        for case in cases() {
            let module = training(&case);
            let (parameters, x, grad_y) = (factors(&module), wave(case.x, 3.0), wave(case.y, 5.0));
            let Gradients { parameters: got, input } =
                module.backward(&parameters, &x, &grad_y, true).unwrap();
            let input = input.unwrap();
            assert!(module.backward(&parameters, &x, &grad_y, false).unwrap().input.is_none());
            let auto = crate::algo::differentiate(
                &|x| module.forward(&parameters, x),
                &parameters,
                &x,
                &grad_y,
                true,
            )
            .unwrap();
            let tensors: Vec<Torch> =
                parameters.iter().map(|p| p.detach().copy()).chain([x.copy()]).collect();
            let loss = |at: usize, element: i64, by: f64| {
                tch::no_grad(|| {
                    let moved: Vec<Torch> = tensors.iter().map(Torch::copy).collect();
                    let _ = moved[at].flatten(0, -1).narrow(0, element, 1).g_add_scalar_(by);
                    let (x, parameters) = moved.split_last().unwrap();
                    (module.forward(parameters, x).unwrap() * &grad_y).sum(Kind::Double).double_value(&[])
                })
            };
            let gradients = got.iter().chain([&input]).zip(auto.parameters.iter().chain(&auto.input));
            for (at, (got, auto)) in gradients.enumerate() {
                let what = format!("{}, tensor {at}", case.name);
                assert_close(&what, got, auto, 1e-12);
                let n = got.numel() as i64;
                let differences: Vec<f64> =
                    (0..n).map(|i| (loss(at, i, 1e-4) - loss(at, i, -1e-4)) / 2e-4).collect();
                // The loss is linear in each element, so differences err only by rounding.
                assert_close(&what, &got.flatten(0, -1), &Torch::from_slice(&differences), 1e-8);
            }
        }
    }

    #[test]
    fn the_training_forward_is_the_unmerged_forward() {
        for case in cases() {
            let module = training(&case);
            let values = |t: &Torch| Vec::<f32>::try_from(&t.to_kind(Kind::Float).flatten(0, -1)).unwrap();
            let (parameters, x) = (factors(&module), wave(case.x, 3.0));
            let want = tch::no_grad(|| module.forward(&parameters, &x)).unwrap();
            let shapes = module.parameters();
            let factor = |i: usize| Tensor::of_f32(values(&parameters[i]), &shapes[i].shape);
            let lora = Lora::new(case.name, factor(1), factor(0), None, Some(ALPHA as f32)).unwrap();
            let op = lora.lower(case.name, case.weight).unwrap().remove(0);
            assert!(matches!(op, Op::LowRank(_)), "{}", case.name);
            let (mut x, mut y) = (values(&x), vec![0f32; want.numel()]);
            let view = |data: &mut [f32], shape: &[i64]| {
                let shape: Vec<usize> = shape.iter().map(|&d| d as usize).collect();
                // SAFETY: the vectors hold as many elements as the shapes and outlive the views.
                unsafe {
                    View::from_raw(
                        data.as_mut_ptr().cast(),
                        Device::Cpu,
                        crate::dtype::Dtype::F32,
                        &shape,
                        None,
                    )
                }
                .unwrap()
            };
            let terms = [Term { op: &op, strength: 1.0, slice: None }];
            let (x, out) = (view(&mut x, case.x), view(&mut y, case.y));
            let mut base = vec![0f32; case.weight.iter().product()];
            let weight: Vec<i64> = case.weight.iter().map(|&d| d as i64).collect();
            let base = view(&mut base, &weight);
            bypass::forward(case.name, &base, &case.geometry, &x, &out, &terms).unwrap();
            // fp32 against f64.
            assert_close(case.name, &Torch::from_slice(&y).to_kind(Kind::Double), &want.flatten(0, -1), 1e-6);
        }
    }
}
