//! LoHa: `dW = alpha / rank * (w1_a @ w1_b) o (w2_a @ w2_b)`, o elementwise.
//!
//! FedPara: Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS. With Tucker cores each of the two products is
//! `R[p, q, k] = sum_ij t[i, j, k] a[i, p] b[j, q]`.
//!
//! | tensor | Linear | conv | conv with Tucker cores |
//! |---|---|---|---|
//! | `hada_w1_a`, `hada_w2_a` | O, r | O, r | r, O |
//! | `hada_w1_b`, `hada_w2_b` | r, I | r, I * kernel | r, I |
//! | `hada_t1`, `hada_t2` | | | r, r, kernel |

use super::{malformed, required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::{Hadamard, Op};
use crate::view::Tensor;

const A: [&str; 2] = ["hada_w1_a", "hada_w2_a"];
const B: [&str; 2] = ["hada_w1_b", "hada_w2_b"];
const T: [&str; 2] = ["hada_t1", "hada_t2"];

pub(super) const RECIPE: Recipe = Recipe {
    name: "LoHa",
    marks: &[A[0], B[0], A[1], B[1]],
    knows: &[A[0], B[0], A[1], B[1], T[0], T[1], ALPHA],
    read,
};

/// One LoHa module.
#[derive(Debug)]
struct Loha {
    a: [Tensor; 2],
    b: [Tensor; 2],
    /// Both or none.
    cores: Option<[Tensor; 2]>,
    alpha_tensor: Option<Tensor>,
    alpha: Option<f32>,
    rank: usize,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let get = |names: [&str; 2]| {
        Ok::<_, crate::error::Error>([
            required(module, group, names[0])?.clone(),
            required(module, group, names[1])?.clone(),
        ])
    };
    let (a, b) = (get(A)?, get(B)?);
    let cores = (group.get(T[0]).is_some() || group.get(T[1]).is_some()).then(|| get(T)).transpose()?;
    let rank = b[0].shape()[0];
    let rank_axis = if cores.is_some() { 0 } else { 1 };
    for i in 0..2 {
        let fits = a[i].shape().len() == 2
            && b[i].shape().len() >= 2
            && a[i].shape()[rank_axis] == rank
            && b[i].shape()[0] == rank
            && a[i].shape() == a[0].shape()
            && b[i].shape() == b[0].shape();
        let core_fits = cores.as_ref().is_none_or(|t| {
            t[i].shape().len() > 2 && t[i].shape()[..2] == [rank, rank] && t[i].shape() == t[0].shape()
        });
        if !fits || !core_fits {
            let core = cores.as_ref().map(|t| format!(", core {:?}", t[i].shape())).unwrap_or_default();
            let what = format!(
                "factors of rank {rank} do not fit together: {:?}, {:?}{core}",
                a[i].shape(),
                b[i].shape()
            );
            return Err(malformed(module, what));
        }
    }
    let (alpha_tensor, alpha) = super::alpha(module, group)?;
    Ok(Box::new(Loha { a, b, cores, alpha_tensor, alpha, rank }))
}

impl Algorithm for Loha {
    fn name(&self) -> &'static str {
        "LoHa"
    }

    fn rank(&self) -> Option<usize> {
        Some(self.rank)
    }

    fn alpha(&self) -> Option<f32> {
        self.alpha
    }

    fn shape(&self) -> Option<Vec<usize>> {
        let [a, b] = [self.a[0].shape(), self.b[0].shape()];
        Some(match &self.cores {
            Some(t) => [&[a[1], b[1]], &t[0].shape()[2..]].concat(),
            None => [&[a[0]], &b[1..]].concat(),
        })
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let shape = self.shape().unwrap_or_default();
        super::fit(module, &shape, target)?;
        let pair = |i: usize| match &self.cores {
            Some(t) => Ok((super::transposed(module, &self.a[i])?, super::fold(module, &t[i], &self.b[i])?)),
            None => Ok((
                super::matrix(module, &self.a[i], shape[0])?,
                super::matrix(module, &self.b[i], self.rank)?,
            )),
        };
        let pairs = [pair(0), pair(1)].into_iter().collect::<Result<Vec<_>>>()?;
        let pairs = pairs.try_into().map_err(|_| malformed(module, "needs two pairs of factors"))?;
        Ok(vec![Op::Hadamard(Hadamard { pairs, scale: super::scale(self.alpha, self.rank) })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors =
            vec![(A[0], &self.a[0]), (B[0], &self.b[0]), (A[1], &self.a[1]), (B[1], &self.b[1])];
        if let Some(t) = &self.cores {
            tensors.extend([(T[0], &t[0]), (T[1], &t[1])]);
        }
        tensors.extend(self.alpha_tensor.as_ref().map(|t| (ALPHA, t)));
        tensors
    }
}

#[cfg(feature = "torch")]
pub(super) use training::BEGIN;

/// The same formula in training.
///
/// A product of two low ranks, elementwise, is a low rank too: `dW[o, i] = sum_pq (a1[o, p] a2[o, q]) (b1[p, i] b2[q, i])`. As long as r^2 ranks
/// are less work than dW the module is computed as a LoRA of so many, and dW is never there. LyCORIS always builds it.
///
/// With M1 and M2 for the two products, `dL/dM1 = s (dL/dy^T x) o M2`, and so the other way round.
#[cfg(feature = "torch")]
mod training {
    use super::{A, B, T};
    use crate::algo::lora::training::Training as Lora;
    use crate::algo::training::{
        add_gradients, add_output, by_delta, evenly, long, scaled, Begin, Init, Layer, Parameter, Pass, Rule,
        Trainable,
    };
    use crate::error::Result;
    use crate::torch_ext::{multiply, product, Factor};
    use tch::Tensor;

    pub(in crate::algo) const BEGIN: Begin =
        Begin { names: &["loha"], new: |layer, rule, _| Ok(Box::new(Training::new(layer, rule))) };

    /// A LoHa module in training.
    #[derive(Debug)]
    struct Training {
        weight: Vec<usize>,
        rank: usize,
        tucker: bool,
        /// With its alpha / rank, for as many ranks as the LoRA's factors have.
        lora: Lora,
    }

    impl Training {
        fn new(layer: &Layer, rule: &Rule) -> Self {
            let tucker = rule.tucker && layer.large_kernel();
            let lora = Lora::new(layer, &Rule { tucker: false, ..rule.clone() });
            Training { weight: layer.weight.clone(), rank: rule.dim, tucker, lora }
        }

        /// How many ranks the product of the pairs has, where they are less work than dW.
        fn ranks(&self, layer: &Layer) -> Option<usize> {
            let (outputs, inputs) = (self.weight[0], self.weight[1..].iter().product::<usize>());
            // One pair without the zeros behind its ranks: the product of both is a multiple of 8 all the same.
            let ranks = self.rank * self.rank.next_multiple_of(8);
            (layer.groups() == 1 && ranks * (outputs + inputs) <= outputs * inputs).then_some(ranks)
        }

        /// Both pairs as [O, r] and [r, I * kernel].
        fn pairs(&self, pass: &Pass) -> Result<[(Tensor, Tensor); 2]> {
            let pair = |i: usize| {
                let (a, b) = (&pass.parameters[2 * i], &pass.parameters[2 * i + 1]);
                let Some(core) = pass.parameters.get(4 + i) else {
                    return Ok((a.shallow_clone(), b.shallow_clone()));
                };
                let rank = b.size()[0];
                let core = core.f_reshape([rank, rank, -1])?;
                let b = Tensor::f_einsum("pqk,qi->pik", &[core, b.shallow_clone()], None::<i64>)?;
                Ok::<_, crate::error::Error>((a.f_transpose(0, 1)?, b.f_reshape([rank, -1])?))
            };
            Ok([pair(0)?, pair(1)?])
        }

        /// Down and up of the LoRA of so many ranks, but for the scale.
        fn factors(&self, pass: &Pass, ranks: usize) -> Result<[Tensor; 2]> {
            let ([(a1, b1), (a2, b2)], own) = (self.pairs(pass)?, self.rank as i64);
            let up = a1.f_narrow(1, 0, own)?.f_unsqueeze(2)?.f_mul(&a2.f_unsqueeze(1)?)?;
            let down = b1.f_narrow(0, 0, own)?.f_unsqueeze(1)?.f_mul(&b2.f_unsqueeze(0)?)?;
            let (mut wide, mut thin) = (long(&self.weight), vec![1; self.weight.len()]);
            wide[0] = ranks as i64;
            (thin[0], thin[1]) = (self.weight[0] as i64, ranks as i64);
            Ok([down.f_reshape(wide)?, up.f_reshape(thin)?])
        }
    }

    impl Trainable for Training {
        fn name(&self) -> &'static str {
            "LoHa"
        }

        fn rank(&self) -> Option<usize> {
            Some(self.rank)
        }

        fn constants(&self) -> Vec<(&'static str, f64)> {
            self.lora.constants()
        }

        fn parameters(&self) -> Vec<Parameter> {
            let (outputs, rank) = (self.weight[0], self.rank);
            let inputs = if self.tucker { self.weight[1] } else { self.weight[1..].iter().product() };
            let a = |i: usize, init| match self.tucker {
                true => Parameter::new(A[i], &[rank, outputs], init).ranked(0),
                false => Parameter::new(A[i], &[outputs, rank], init).ranked(1),
            };
            let b =
                |i: usize| Parameter::new(B[i], &[rank, inputs], Init::Normal { deviation: 1.0 }).ranked(0);
            // The one that starts at zero is raised by LoRA+, as in sd-scripts.
            let mut parameters =
                vec![a(0, Init::Normal { deviation: 0.1 }), b(0), a(1, Init::ZEROS).plus(), b(1)];
            if self.tucker {
                let core = [&[rank, rank], &self.weight[2..]].concat();
                let core = |i: usize| {
                    let core = Parameter::new(T[i], &core, Init::Normal { deviation: 0.1 });
                    core.ranked(0).ranked(1)
                };
                parameters.extend([core(0), core(1)]);
            }
            parameters
        }

        fn delta(&self, pass: &Pass) -> Result<Tensor> {
            let [(a1, b1), (a2, b2)] = self.pairs(pass)?;
            let product = a1.f_matmul(&b1)?.f_mul(&a2.f_matmul(&b2)?)?;
            scaled(&product.f_reshape(pass.shape())?, self.lora.scale())
        }

        fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor> {
            let Some(ranks) = self.ranks(pass.layer) else { return by_delta(self, pass, x) };
            let [down, up] = self.factors(pass, ranks)?;
            let t = scaled(&pass.layer.apply(x, &down)?, self.lora.scale())?;
            pass.dropped(pass.layer.pointwise(&t, &up)?)
        }

        fn add_forward(&self, pass: &Pass, x: &Tensor, y: &Tensor) -> Result<()> {
            if !pass.linear_into(y) {
                return add_output(self, pass, x, y);
            }
            if let Some(ranks) = self.ranks(pass.layer) {
                let inner = Pass { parameters: &self.factors(pass, ranks)?, ..*pass };
                return self.lora.add_forward(&inner, x, y);
            }
            let [(a1, b1), (a2, b2)] = self.pairs(pass)?;
            let delta = a1.f_matmul(&b1)?.f_mul_(&a2.f_matmul(&b2)?)?;
            product(y, Factor(x, false), Factor(&delta, true), 1.0, self.lora.scale())
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
            if let Some(ranks) = self.ranks(pass.layer) {
                let factors = || self.factors(pass, ranks);
                return self.lora.accumulate_through(&factors, pass, (x, grad_y), want_input, into);
            }
            let [(a1, b1), (a2, b2)] = self.pairs(pass)?;
            let (m1, m2) = (a1.f_matmul(&b1)?, a2.f_matmul(&b2)?);
            let scale = self.lora.scale();
            let grad_x = want_input.then(|| x.f_empty_like()).transpose()?;
            if let Some(grad_x) = &grad_x {
                let delta = m1.f_mul(&m2)?;
                product(grad_x, Factor(grad_y, false), Factor(&delta, false), 0.0, scale)?;
            }
            let grad = multiply(Factor(grad_y, true), Factor(x, false))?;
            let pairs = [(a1, b1, m2), (a2, b2, m1)];
            for ((a, b, mut other), into) in pairs.into_iter().zip(into.chunks(2)) {
                let grad_m = other.f_mul_(&grad)?;
                product(&into[0], Factor(&grad_m, false), Factor(&b, true), 1.0, scale)?;
                product(&into[1], Factor(&a, true), Factor(&grad_m, false), 1.0, scale)?;
            }
            Ok(grad_x)
        }

        fn shrunk(&self, ratio: &Tensor) -> Result<Option<Vec<Tensor>>> {
            evenly(ratio, self.parameters().len())
        }
    }
}
