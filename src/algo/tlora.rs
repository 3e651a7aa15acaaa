//! T-LoRA: `dW = alpha / rank * (P diag(lambda) Q - P0 diag(lambda0) Q0)`, where P0, lambda0, Q0 are what training began with.
//!
//! Soboleva et al. 2025, arXiv:2507.05964; LyCORIS. The file holds the first three only. What training began with are by default the leading
//! singular vectors of the layer's own weight, so their product is the weight's nearest matrix of that rank and is taken from the weight
//! again. A file trained from a random matrix, or from the last or middle singular vectors, does not say so and cannot be told apart.
//! Training masks the ranks by the timestep; a prefix of the ranks is the state under that mask.
//!
//! | tensor | shape |
//! |---|---|
//! | `p_layer.weight` | O, r, 1.. |
//! | `q_layer.weight` | r, I, 1.. |
//! | `lambda_layer` | 1, r |

use super::{malformed, matrix, required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::{LowRank, Op, Principal};
use crate::view::Tensor;

const P: &str = "p_layer.weight";
const Q: &str = "q_layer.weight";
const LAMBDA: &str = "lambda_layer";

pub(super) const RECIPE: Recipe =
    Recipe { name: "T-LoRA", marks: &[P, Q, LAMBDA], knows: &[P, Q, LAMBDA, ALPHA], read };

/// One module.
#[derive(Debug, Clone)]
struct Tlora {
    p: Tensor,
    q: Tensor,
    lambda: Tensor,
    alpha_tensor: Option<Tensor>,
    alpha: Option<f32>,
    rank: usize,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let (p, q) = (required(module, group, P)?.clone(), required(module, group, Q)?.clone());
    let lambda = required(module, group, LAMBDA)?.clone();
    let rank = lambda.count();
    let flat = |shape: &[usize]| shape.len() >= 2 && shape[2..].iter().all(|&d| d == 1);
    if !flat(p.shape()) || !flat(q.shape()) || p.shape()[1] != rank || q.shape()[0] != rank {
        let what = format!(
            "P {:?}, Q {:?} and lambda {:?} do not fit together",
            p.shape(),
            q.shape(),
            lambda.shape()
        );
        return Err(malformed(module, what));
    }
    let (alpha_tensor, alpha) = super::alpha(module, group)?;
    Ok(Box::new(Tlora { p, q, lambda, alpha_tensor, alpha, rank }))
}

impl Algorithm for Tlora {
    fn name(&self) -> &'static str {
        "T-LoRA"
    }

    fn rank(&self) -> Option<usize> {
        Some(self.rank)
    }

    fn alpha(&self) -> Option<f32> {
        self.alpha
    }

    fn shape(&self) -> Option<Vec<usize>> {
        Some([&[self.p.shape()[0]], &self.q.shape()[1..]].concat())
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let shape = self.shape().unwrap_or_default();
        super::fit(module, &shape, target)?;
        let scale = super::scale(self.alpha, self.rank);
        let q = matrix(module, &self.q, self.rank)?;
        let lambda = self.lambda.to_f32(module)?;
        let p = self.p.to_f32(module)?;
        let up = p.iter().enumerate().map(|(i, p)| p * lambda[i % self.rank]).collect();
        let up = Tensor::of_f32(up, &[shape[0], self.rank]);
        Ok(vec![
            Op::LowRank(LowRank { up, down: q, scale }),
            Op::Principal(Principal { rank: self.rank, scale: -scale }),
        ])
    }

    fn prefix(&self, module: &str, rank: usize) -> Option<Result<Box<dyn Algorithm>>> {
        let rank = rank.clamp(1, self.rank);
        let cut = || {
            let (p, lambda) = (super::columns(module, &self.p, rank)?, self.lambda.reshape(&[1, self.rank]));
            let lambda = lambda.ok_or_else(|| malformed(module, "a factor is not contiguous"))?;
            let lambda = super::columns(module, &lambda, rank)?;
            let q = self.q.rows(0..rank).ok_or_else(|| malformed(module, "a factor is not contiguous"))?;
            // A mask leaves alpha / rank of the whole as it is.
            let alpha = (super::scale(self.alpha, self.rank) * rank as f64) as f32;
            let alpha_tensor = Some(Tensor::of_f32(vec![alpha], &[]));
            Ok::<Box<dyn Algorithm>, _>(Box::new(Tlora {
                p,
                q,
                lambda,
                alpha_tensor,
                alpha: Some(alpha),
                rank,
            }))
        };
        Some(cut())
    }

    fn note(&self) -> Option<String> {
        let note = "read as trained from the leading singular vectors of the model's own weights, which the file does not say";
        Some(note.to_owned())
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors = vec![(P, &self.p), (Q, &self.q), (LAMBDA, &self.lambda)];
        tensors.extend(self.alpha_tensor.as_ref().map(|t| (ALPHA, t)));
        tensors
    }
}

#[cfg(feature = "torch")]
pub(super) use training::BEGIN;

/// The same formula in training, as a LoRA of twice the rank: `[P - P0 | P0] [diag(lambda) Q ; diag(lambda) Q - diag(lambda0) Q0]`. The
/// differences are taken in fp32 and are small, so that no near products are subtracted.
#[cfg(feature = "torch")]
mod training {
    use super::{LAMBDA, P, Q};
    use crate::algo::factored::{Factored, Factors};
    use crate::algo::lora::training::Training as Lora;
    use crate::algo::training::{Begin, Init, Layer, Parameter, Pass, Rule, Spectrum, Trainable};
    use crate::error::{Error, Result};
    use tch::{Kind, Tensor};

    pub(in crate::algo) const BEGIN: Begin = Begin { names: &["tlora", "t-lora"], new };

    /// What training began with.
    const START: [&str; 3] = ["p_start", "q_start", "lambda_start"];

    fn new(layer: &Layer, rule: &Rule, weight: Option<&Tensor>) -> Result<Box<dyn Trainable>> {
        let (name, shape) = (&layer.name, &layer.weight);
        if layer.large_kernel() {
            let what = format!("`{name}`: T-LoRA has no form for a kernel larger than one point, {shape:?}");
            return Err(Error::argument(
                what,
                "leave the layer out: algo none for its name in name_algo_map",
            ));
        }
        let weight = weight.ok_or_else(|| {
            let what = format!("`{name}`: T-LoRA begins with singular vectors of the layer's own weight");
            Error::argument(what, "pass the weight when the layer is registered")
        })?;
        // A weight has no more singular values than that.
        let rank = rule.dim.min(shape[0]).min(shape[1]);
        let alpha = rule.alpha * rank as f64 / rule.dim as f64;
        let point = &shape[2..];
        let values = start(&weight.f_reshape([shape[0] as i64, -1])?, rank, rule.sig_type)?;
        let [p, q, lambda] = values.map(|values| Init::Values(values.into()));
        let p = Parameter::new(P, &[&[shape[0], rank], point].concat(), p).ranked(1).precise();
        let q = Parameter::new(Q, &[&[rank, shape[1]], point].concat(), q).ranked(0).precise();
        let trained = [p, q, Parameter::new(LAMBDA, &[1, rank], lambda).ranked(1).precise()];
        let keep = |(p, slot)| Parameter { slot, frozen: true, saved: false, ..p };
        let kept = trained.clone().into_iter().zip(START).map(keep);
        let parameters = trained.clone().into_iter().chain(kept).collect();
        let lora = Lora::new(layer, &Rule { dim: rank, alpha, tucker: false, ..rule.clone() });
        Ok(Box::new(Factored { lora, parameters, source: Difference { rank } }))
    }

    /// `rank` singular triples of a matrix, the larger values first: P, Q, lambda.
    fn start(weight: &Tensor, rank: usize, part: Spectrum) -> Result<[Vec<f32>; 3]> {
        let weight = weight.f_to_kind(Kind::Double)?;
        let (rows, cols, rank) = (weight.size()[0], weight.size()[1], rank as i64);
        // The eigenvectors of the smaller Gram matrix are the singular vectors of the shorter side. In f64 the square costs no digits that
        // anybody has.
        let long = if rows >= cols { weight } else { weight.f_transpose(0, 1)? };
        let (_, vectors) = long.f_transpose(0, 1)?.f_matmul(&long)?.f_linalg_eigh("L")?;
        // Eigenvalues come in rising order.
        let count = rows.min(cols);
        let first = match part {
            Spectrum::Principal => count - rank,
            Spectrum::Last => 0,
            // As LyCORIS counts it, from the largest.
            Spectrum::Middle => count - rank - (count - rank) / 2,
        };
        let short = vectors.f_narrow(1, first, rank)?.f_flip([1i64])?;
        // Orthogonal already; this gives a direction to those of length 0 too.
        let (long, lengths) = Tensor::f_linalg_qr(&long.f_matmul(&short)?, "reduced")?;
        let lengths = lengths.f_diagonal(0, 0, 1)?;
        let signs = lengths.f_lt(0.0)?.f_to_kind(Kind::Double)?.f_mul_scalar(-2.0)?.f_add_scalar(1.0)?;
        let long = long.f_mul(&signs)?;
        let (p, q) = if rows >= cols { (long, short) } else { (short, long) };
        let values = |t: Tensor| -> Result<Vec<f32>> {
            Ok(Vec::try_from(t.f_to_kind(Kind::Float)?.f_contiguous()?.f_flatten(0, -1)?)?)
        };
        Ok([values(p)?, values(q.f_transpose(0, 1)?)?, values(lengths.f_abs()?)?])
    }

    /// What is there now less what training began with, as a LoRA of twice the rank.
    #[derive(Debug)]
    struct Difference {
        rank: usize,
    }

    impl Factors for Difference {
        const NAME: &'static str = "T-LoRA";
        const PRODUCT: bool = false;

        fn factors(&self, pass: &Pass) -> Result<[Tensor; 2]> {
            let [p, q, lambda, p0, q0, lambda0] = pass.parameters else {
                return Err(Error::Backend(format!("`{}`: T-LoRA has six tensors", pass.layer.name)));
            };
            let mut ranks = vec![1i64; q.dim()];
            ranks[0] = q.size()[0];
            let (mut now, mut then) =
                (q.f_mul(&lambda.f_reshape(&ranks[..])?)?, q0.f_mul(&lambda0.f_reshape(&ranks[..])?)?);
            if let Some(share) = pass.ranks {
                let index = Tensor::f_arange(ranks[0], (Kind::Float, q.device()))?.f_reshape(&ranks[..])?;
                // Half a rank more, so that a share of k / rank is k ranks however it was rounded.
                let mask = index.f_add_scalar(0.5)?.f_lt_tensor(&share.f_mul_scalar(self.rank as f64)?)?;
                (now, then) = (now.f_mul(&mask)?, then.f_mul(&mask)?);
            }
            // Singular vectors have two signs: those of a file that was loaded may be the other ones, on both sides.
            let turned = p.f_mul(p0)?.f_sum_dim_intlist(&[0i64][..], true, None)?.f_lt(0.0)?;
            let sign = turned.f_to_kind(p.f_kind()?)?.f_mul_scalar(-2.0)?.f_add_scalar(1.0)?;
            let (p0, then) = (p0.f_mul(&sign)?, then.f_mul(&sign.f_transpose(0, 1)?)?);
            let up = Tensor::f_cat(&[p.f_sub(&p0)?, p0], 1)?;
            let down = Tensor::f_cat(&[now.shallow_clone(), now.f_sub(&then)?], 0)?;
            Ok([down.f_to_kind(pass.compute)?, up.f_to_kind(pass.compute)?])
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::algo::training::long;
        use crate::algo::training_tests::{merged, rule, wave};
        use crate::algo::{Group, ALPHA};
        use crate::merge::bypass::Geometry;
        use crate::view::Tensor as Numbers;

        fn layer(weight: &[usize]) -> Layer {
            Layer::sliding("layer", weight, &Geometry::default(), false).unwrap()
        }

        /// A weight of full rank: sines alone have a rank of 3.
        fn weight(shape: &[usize]) -> Tensor {
            wave(&long(shape), 0.4).square().exp().sin()
        }

        #[test]
        fn training_begins_with_singular_vectors() {
            for shape in [[9, 7], [7, 9]] {
                let weight = weight(&shape);
                let (u, s, v) = weight.svd(true, true);
                for (part, first) in [(Spectrum::Principal, 0), (Spectrum::Last, 4), (Spectrum::Middle, 2)] {
                    let [p, q, lambda] = start(&weight, 3, part).unwrap();
                    let near = |got: &Tensor, want: &Tensor| {
                        let off = (got - want).norm().double_value(&[]);
                        assert!(off <= 1e-6, "{part:?}: {off}");
                    };
                    let [p, q, lambda] = [p, q, lambda].map(|v| Tensor::from_slice(&v).to_kind(Kind::Double));
                    let (p, q) = (p.reshape([-1, 3]), q.reshape([3, -1]));
                    near(&lambda, &s.narrow(0, first, 3));
                    let product = (&p * &lambda).matmul(&q);
                    let (u, v) = (u.narrow(1, first, 3), v.narrow(1, first, 3));
                    near(&product, &(u * &lambda).matmul(&v.transpose(0, 1)));
                }
            }
        }

        #[test]
        fn vectors_of_a_weight_without_them_are_orthogonal() {
            // A rank of 1 and no more.
            let weight = wave(&[6, 1], 0.4).matmul(&wave(&[1, 5], 0.7));
            let [p, q, lambda] = start(&weight, 4, Spectrum::Principal).unwrap();
            assert!(lambda[1..].iter().all(|v| v.abs() < 1e-6), "{lambda:?}");
            for (vectors, axis) in
                [(Tensor::from_slice(&p).reshape([6, 4]), 0), (Tensor::from_slice(&q).reshape([4, 5]), 1)]
            {
                let gram = match axis {
                    0 => vectors.transpose(0, 1).matmul(&vectors),
                    _ => vectors.matmul(&vectors.transpose(0, 1)),
                };
                let off = (gram - Tensor::eye(4, (Kind::Float, tch::Device::Cpu))).abs().max();
                assert!(off.double_value(&[]) < 1e-5);
            }
        }

        #[test]
        fn what_has_no_form_says_why() {
            let error = new(&layer(&[8, 6, 3, 3]), &rule(), Some(&weight(&[8, 6, 3, 3]))).unwrap_err();
            assert!(
                error.to_string().contains("kernel") && error.hint().contains("name_algo_map"),
                "{error:?}"
            );
            let error = new(&layer(&[8, 6]), &rule(), None).unwrap_err();
            assert!(error.hint().contains("pass the weight"), "{error:?}");
        }

        /// More ranks than a weight has are not there, and the scale stays.
        #[test]
        fn a_rank_beyond_the_weight_is_cut() {
            let (layer, rule) = (layer(&[8, 6]), Rule { dim: 12, alpha: 3.0, ..rule() });
            let module = new(&layer, &rule, Some(&weight(&[8, 6]))).unwrap();
            assert_eq!((module.rank(), module.constants()), (Some(6), vec![(ALPHA, 1.5)]));
        }

        /// A share of the ranks is what the file is when it is cut there; fresh vectors change nothing, whatever their signs.
        #[test]
        fn a_share_of_the_ranks_is_the_file_cut_there() {
            let (layer, weight) = (layer(&[8, 6]), weight(&[8, 6]));
            let module = new(&layer, &rule(), Some(&weight)).unwrap();
            let parameters = module.parameters();
            let values = |moved: f64, sign: f64| {
                let value = |(at, parameter): (usize, &Parameter)| {
                    let Init::Values(start) = &parameter.init else { panic!("{parameter:?}") };
                    let start =
                        Tensor::from_slice(start).to_kind(Kind::Double).reshape(long(&parameter.shape));
                    match at {
                        0 | 1 => (start + wave(&long(&parameter.shape), at as f64) * moved) * sign,
                        2 => start + moved,
                        _ => start,
                    }
                };
                // The rank of 4 is stored as 8.
                let stored = |(at, parameter): (usize, &Parameter)| {
                    let room = Tensor::zeros(long(&parameter.stored), (Kind::Double, tch::Device::Cpu));
                    let axis = [1, 0, 1][at % 3];
                    room.narrow(axis, 0, 4).copy_(&value((at, parameter)));
                    room
                };
                parameters.iter().enumerate().map(stored).collect::<Vec<_>>()
            };
            let delta = |parameters: &[Tensor], share: Option<f64>| {
                let ranks = share.map(|share| Tensor::from(share as f32));
                let pass = Pass {
                    layer: &layer,
                    parameters,
                    weight: None,
                    draw: None,
                    ranks: ranks.as_ref(),
                    compute: Kind::Double,
                };
                module.delta(&pass).unwrap()
            };
            assert_eq!(delta(&values(0.0, 1.0), None).abs().max().double_value(&[]), 0.0);
            assert_eq!(delta(&values(0.0, -1.0), None).abs().max().double_value(&[]), 0.0);
            let moved = values(0.2, -1.0);
            let mut group = Group::default();
            for ((parameter, value), axis) in parameters.iter().zip(&moved).zip([1, 0, 1]).take(3) {
                let value = value.narrow(axis, 0, 4).to_kind(Kind::Float).contiguous().reshape([-1]);
                let numbers = Numbers::of_f32(Vec::try_from(value).unwrap(), &parameter.shape);
                group.tensors.push((parameter.slot, numbers));
            }
            group.tensors.push((ALPHA, Numbers::of_f32(vec![1.7], &[])));
            let file = crate::algo::read("layer", group).unwrap();
            for ranks in 1..=4 {
                let cut = file.prefix("layer", ranks).unwrap().unwrap();
                let want = merged(&cut.lower("layer", &layer.weight).unwrap(), &weight) - &weight;
                let off = (delta(&moved, Some(ranks as f64 / 4.0)) - &want).norm() / want.norm();
                assert!(off.double_value(&[]) <= 2e-6, "{ranks}: {off:?}");
            }
        }
    }
}
