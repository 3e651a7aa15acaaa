//! LoKr: `dW = scale * kron(w1, w2)`, that is `dW[u * c + p, v * d + q, k] = scale * w1[u, v] * w2[p, q, k]`.
//!
//! LyCORIS (KronA: Edalati et al. 2022, arXiv:2212.10650). Either half is whole or a product of thin factors; the shapes in the file decide, and
//! a factorisation is never guessed.
//!
//! | tensor | shape |
//! |---|---|
//! | `lokr_w1`, or `lokr_w1_a` @ `lokr_w1_b` | a, b, or a, r and r, b |
//! | `lokr_w2`, or `lokr_w2_a` @ `lokr_w2_b` | c, d, kernel, or c, r and r, d * kernel |
//! | with a Tucker core `lokr_t2` | r, r, kernel; `lokr_w2_a` r, c and `lokr_w2_b` r, d: `w2[p, q, k] = sum_ij t2[i, j, k] a[i, p] b[j, q]` |
//!
//! scale = alpha / r, of w2's factors or else of w1's. With both halves whole there is no r: the scale is 1 whatever alpha says (LyCORIS writes an
//! alpha of no meaning then); PEFT's is alpha / r of its configuration also then.

use super::{malformed, required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::{Kron, Op};
use crate::view::Tensor;

const W1: [&str; 3] = ["lokr_w1", "lokr_w1_a", "lokr_w1_b"];
const W2: [&str; 3] = ["lokr_w2", "lokr_w2_a", "lokr_w2_b"];
const T2: &str = "lokr_t2";

pub(super) const RECIPE: Recipe = Recipe {
    name: "LoKr",
    marks: &[W1[0], W1[1], W1[2], W2[0], W2[1], W2[2]],
    knows: &[W1[0], W1[1], W1[2], W2[0], W2[1], W2[2], T2, ALPHA],
    read,
};

/// One LoKr module.
#[derive(Debug)]
struct Lokr {
    /// As the file has them.
    tensors: Vec<(&'static str, Tensor)>,
    w1: Half,
    w2: Half,
    /// Of the thin factors; `None` when both halves are whole.
    rank: Option<usize>,
    alpha: Option<f32>,
}

/// One half of the product. Thin factors stay thin until a weight bounds their size.
#[derive(Debug)]
struct Half {
    factors: Factors,
    rows: usize,
    /// The shape behind the rows: columns, kernel; for w2's flattened factors one number.
    inner: Vec<usize>,
    rank: Option<usize>,
}

#[derive(Debug)]
enum Factors {
    Whole(Tensor),
    /// [rows, r] and [r, columns..]
    Thin(Tensor, Tensor),
    /// [r, rows], [r, r, kernel..] and [r, columns]
    Core(Tensor, Tensor, Tensor),
}

fn half(module: &str, group: &Group, names: [&str; 3], core: Option<&Tensor>) -> Result<Half> {
    let [whole, a, b] = names;
    if group.get(whole).is_some() {
        if let Some(extra) = [a, b].into_iter().find(|name| group.get(name).is_some()) {
            return Err(malformed(module, format!("both `{whole}` and `{extra}` are there")));
        }
        let tensor = required(module, group, whole)?;
        let Some((&rows, inner)) = tensor.shape().split_first().filter(|(_, inner)| !inner.is_empty()) else {
            return Err(malformed(
                module,
                format!("`{whole}` must have two axes or more, it is {:?}", tensor.shape()),
            ));
        };
        let factors = Factors::Whole(super::matrix(module, tensor, rows)?);
        return Ok(Half { factors, rows, inner: inner.to_vec(), rank: None });
    }
    if group.get(a).is_none() && group.get(b).is_none() {
        return Err(malformed(module, format!("neither `{whole}` nor `{a}` and `{b}` are there")));
    }
    let (left, right) = (required(module, group, a)?, required(module, group, b)?);
    let shapes = || format!("`{a}` {:?}, `{b}` {:?}", left.shape(), right.shape());
    let rank = right.shape()[0];
    if left.shape().len() != 2 || right.shape().len() < 2 {
        return Err(malformed(module, format!("factors must have two axes: {}", shapes())));
    }
    let [rows, own] = match core {
        Some(_) => [left.shape()[1], left.shape()[0]],
        None => [left.shape()[0], left.shape()[1]],
    };
    if own != rank {
        return Err(malformed(module, format!("factors of different rank: {}", shapes())));
    }
    let (left, right) = (left.clone(), right.clone());
    let (factors, inner) = match core {
        Some(core) => {
            if core.shape().len() < 3 || core.shape()[..2] != [rank, rank] {
                let what = format!("`{T2}` {:?} is no core of rank {rank}: {}", core.shape(), shapes());
                return Err(malformed(module, what));
            }
            let inner = [&[right.shape()[1]], &core.shape()[2..]].concat();
            (Factors::Core(left, core.clone(), right), inner)
        }
        None => {
            let inner = right.shape()[1..].to_vec();
            (Factors::Thin(left, super::matrix(module, &right, rank)?), inner)
        }
    };
    Ok(Half { factors, rows, inner, rank: Some(rank) })
}

impl Half {
    /// The half as a matrix.
    fn matrix(&self, module: &str) -> Result<Tensor> {
        match &self.factors {
            Factors::Whole(matrix) => Ok(matrix.clone()),
            Factors::Thin(left, right) => product(module, left, right),
            Factors::Core(left, core, right) => {
                product(module, &super::transposed(module, left)?, &super::fold(module, core, right)?)
            }
        }
    }
}

/// left @ right, in f64, rounded once.
fn product(module: &str, left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let (rows, rank, cols) = (left.shape()[0], left.shape()[1], right.shape()[1]);
    let (left, right) = (left.to_f32(module)?, right.to_f32(module)?);
    let mut out = vec![0f64; rows * cols];
    for (out, left) in out.chunks_exact_mut(cols).zip(left.chunks_exact(rank)) {
        for (&l, right) in left.iter().zip(right.chunks_exact(cols)) {
            out.iter_mut().zip(right).for_each(|(o, &r)| *o += f64::from(l) * f64::from(r));
        }
    }
    Ok(Tensor::of_f32(out.into_iter().map(|v| v as f32).collect(), &[rows, cols]))
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let core = group.get(T2).is_some().then(|| required(module, group, T2)).transpose()?;
    if core.is_some() && group.get(W2[0]).is_some() {
        return Err(malformed(module, format!("both `{}` and `{T2}` are there", W2[0])));
    }
    let (mut w1, w2) = (half(module, group, W1, None)?, half(module, group, W2, core)?);
    let rank = w2.rank.or(w1.rank);
    let mut tensors: Vec<_> = group.tensors.iter().filter(|(name, _)| *name != ALPHA).cloned().collect();
    let (alpha_tensor, alpha) = match (rank, group.config.as_ref().and_then(|c| c.scale(module))) {
        (Some(_), _) => super::alpha(module, group)?,
        // Without a rank alpha means nothing; LyCORIS' 100000 is infinite in an fp16 file.
        (None, None | Some(1.0)) => {
            let own = group.get(ALPHA).filter(|t| t.count() == 1);
            let float = own.filter(|t| crate::dtype::Float::wide(t.dtype()).is_some()).cloned();
            let number = || own.and_then(|t| t.scalar()).map(|v| Tensor::of_f32(vec![v as f32], &[]));
            (float.or_else(number), None)
        }
        // PEFT's scale has no other place in the tensors than a half itself. The alpha beside it tells readers that none is missing.
        (None, Some(scale)) => {
            let whole = w1.matrix(module)?;
            let values = whole.to_f32(module)?.into_iter().map(|v| (f64::from(v) * scale) as f32).collect();
            let whole = Tensor::of_f32(values, whole.shape());
            tensors.iter_mut().filter(|(name, _)| *name == W1[0]).for_each(|(_, t)| *t = whole.clone());
            w1.factors = Factors::Whole(whole);
            (Some(Tensor::of_f32(vec![1.0], &[])), None)
        }
    };
    tensors.extend(alpha_tensor.map(|t| (ALPHA, t)));
    Ok(Box::new(Lokr { tensors, w1, w2, rank, alpha }))
}

impl Algorithm for Lokr {
    fn name(&self) -> &'static str {
        "LoKr"
    }

    fn rank(&self) -> Option<usize> {
        self.rank
    }

    fn alpha(&self) -> Option<f32> {
        self.alpha
    }

    fn shape(&self) -> Option<Vec<usize>> {
        let (rows, b) = (self.w1.rows.checked_mul(self.w2.rows)?, self.w1.inner.first()?);
        Some(match self.w2.inner.split_first() {
            Some((d, kernel)) => [&[rows, b.checked_mul(*d)?], kernel].concat(),
            None => vec![rows, *b],
        })
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let mut shape = self.shape().unwrap_or_default();
        // A w2 of thin factors is flattened in the file: its columns are d * kernel, and only the weight tells the kernel.
        let kernel = target.get(2..).unwrap_or(&[]);
        let taps: usize = kernel.iter().product();
        if let ([cols], [_, wide]) = (&self.w2.inner[..], &mut shape[..]) {
            if taps > 1 && cols % taps == 0 {
                *wide /= taps;
                shape.extend(kernel);
            }
        }
        super::fit(module, &shape, target)?;
        let scale = self.rank.map_or(1.0, |rank| super::scale(self.alpha, rank));
        Ok(vec![Op::Kron(Kron { w1: self.w1.matrix(module)?, w2: self.w2.matrix(module)?, scale })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (*name, tensor)).collect()
    }
}

#[cfg(feature = "torch")]
pub(super) use training::BEGIN;

/// The same formula in training.
#[cfg(feature = "torch")]
mod training {
    use super::{ALPHA, T2, W1, W2};
    use crate::algo::factorization::factorization;
    use crate::algo::training::{
        add_gradients, add_output, by_delta, evenly, long, scaled, through_delta, Begin, Gradients, Init,
        Layer, Parameter, Pass, Rule, Trainable,
    };
    use crate::error::Result;
    use crate::torch_ext::{multiply, product, Factor};
    use tch::{Kind, Tensor};

    pub(in crate::algo) const BEGIN: Begin =
        Begin { names: &["lokr"], new: |layer, rule, _| Ok(Box::new(Training::new(layer, rule))) };

    /// A LoKr module in training.
    #[derive(Debug)]
    struct Training {
        weight: Vec<usize>,
        /// w1 is [a, b].
        small: [usize; 2],
        /// w2 is [c, d, kernel].
        large: [usize; 2],
        rank: usize,
        alpha: f64,
        /// Whether w1, w2 are products of thin factors.
        thin: [bool; 2],
        tucker: bool,
    }

    impl Training {
        fn new(layer: &Layer, rule: &Rule) -> Self {
            let ((mut a, mut c), (b, d)) =
                (factorization(layer.weight[0], rule.factor), factorization(layer.weight[1], rule.factor));
            if rule.unbalanced_factorization {
                (a, c) = (c, a);
            }
            let thin = |size: usize| !rule.full_matrix && 2 * rule.dim < size;
            let thin = [rule.decompose_both && thin(a.max(b)), thin(c.max(d))];
            Training {
                weight: layer.weight.clone(),
                small: [a, b],
                large: [c, d],
                rank: rule.dim,
                alpha: rule.alpha,
                thin,
                tucker: thin[1] && rule.tucker && layer.large_kernel(),
            }
        }

        fn scale(&self) -> f64 {
            self.rank().map_or(1.0, |rank| self.alpha / rank as f64)
        }

        /// The tensors of w1, and those of w2.
        fn split<'a>(&self, all: &'a [Tensor]) -> (&'a [Tensor], &'a [Tensor]) {
            all.split_at(1 + usize::from(self.thin[0]))
        }

        /// w1 with the scale in it, and the tensors of w2.
        fn halves<'a>(&self, pass: &Pass<'a>) -> Result<(Tensor, &'a [Tensor])> {
            let (w1, rest) = self.split(pass.parameters);
            Ok((scaled(&whole(w1)?, self.scale())?, rest))
        }

        /// Whether the halves one after the other are less work than dW. A group's outputs need not begin with a part.
        fn in_parts(&self, layer: &Layer) -> bool {
            let (halves, dense) = self.costs();
            layer.groups() == 1 && halves < dense
        }

        /// On a Linear layer: w1 for each row of x, and `t = X down^T` [rows, b, k], where `w2 = up down`, or down alone.
        fn inner(&self, pass: &Pass, parts: &Tensor, down: &Tensor) -> Result<(Tensor, Tensor)> {
            let [a, b] = self.small.map(|n| n as i64);
            let t = multiply(Factor(parts, false), Factor(down, true))?.f_view([-1, b, down.size()[0]])?;
            let w1 = whole(self.split(pass.parameters).0)?.f_expand([t.size()[0], a, b], false)?;
            Ok((w1, t))
        }

        /// Multiplications per position: of the halves one after the other, and of dW.
        fn costs(&self) -> (usize, usize) {
            let ([a, b], [c, d], r) = (self.small, self.large, self.rank);
            let taps = self.weight[2..].iter().product::<usize>();
            let halves = match (self.thin[1], self.tucker) {
                (false, _) => b * c * (d * taps + a),
                (true, false) => r * (b * d * taps + a * b + a * c),
                (true, true) => r * (b * d + b * r * taps + a * b + a * c),
            };
            (halves, a * b * c * d * taps)
        }
    }

    /// A half of its tensors, in any shape of its elements' order.
    fn whole(half: &[Tensor]) -> Result<Tensor> {
        Ok(match half {
            [left, right, core] => {
                let all = [core.f_flatten(2, -1)?, left.shallow_clone(), right.shallow_clone()];
                Tensor::f_einsum("ijk,ip,jq->pqk", &all, None::<i64>)?
            }
            [left, right] => left.f_matmul(right)?,
            _ => half[0].shallow_clone(),
        })
    }

    /// Of a Linear layer's w2: what acts on the input first, and what comes behind w1.
    fn down_and_up(rest: &[Tensor]) -> (&Tensor, Option<&Tensor>) {
        match rest {
            [left, right, ..] => (right, Some(left)),
            _ => (&rest[0], None),
        }
    }

    /// The axes of [rows, parts, k] turned so that parts are first: [parts, rows * k].
    fn by_part(t: &Tensor) -> Result<Tensor> {
        Ok(t.f_transpose(0, 1)?.f_reshape([t.size()[1], -1])?)
    }

    impl Trainable for Training {
        fn name(&self) -> &'static str {
            "LoKr"
        }

        fn rank(&self) -> Option<usize> {
            (self.thin != [false; 2]).then_some(self.rank)
        }

        fn constants(&self) -> Vec<(&'static str, f64)> {
            // Without a rank the scale is 1. Readers that take network_dim for the rank divide by it.
            vec![(ALPHA, self.rank().map_or(self.rank as f64, |_| self.alpha))]
        }

        fn parameters(&self) -> Vec<Parameter> {
            let ([a, b], [c, d], r) = (self.small, self.large, self.rank);
            let random = |slot, shape: &[usize]| Parameter::new(slot, shape, Init::kaiming(shape));
            // LoRA+ raises w1, as in sd-scripts.
            let mut parameters = match self.thin[0] {
                false => vec![random(W1[0], &[a, b]).plus()],
                true => {
                    vec![random(W1[1], &[a, r]).ranked(1).plus(), random(W1[2], &[r, b]).ranked(0).plus()]
                }
            };
            let zeros = |slot, shape: &[usize]| Parameter::new(slot, shape, Init::ZEROS);
            let kernel = &self.weight[2..];
            parameters.extend(match (self.thin[1], self.tucker) {
                (false, _) => vec![zeros(W2[0], &[&[c, d], kernel].concat())],
                (true, false) => vec![
                    random(W2[1], &[c, r]).ranked(1),
                    zeros(W2[2], &[r, d * kernel.iter().product::<usize>()]).ranked(0),
                ],
                (true, true) => vec![
                    random(W2[1], &[r, c]).ranked(0),
                    zeros(W2[2], &[r, d]).ranked(0),
                    random(T2, &[&[r, r], kernel].concat()).ranked(0).ranked(1),
                ],
            });
            parameters
        }

        fn delta(&self, pass: &Pass) -> Result<Tensor> {
            let (w1, rest) = self.halves(pass)?;
            let w2 = whole(rest)?;
            let ([a, b], [c, d]) = (self.small.map(|n| n as i64), self.large.map(|n| n as i64));
            let (w1, w2) = (w1.f_reshape([a, 1, b, 1, 1])?, w2.f_reshape([1, c, 1, d, -1])?);
            Ok(w1.f_mul(&w2)?.f_reshape(pass.shape())?)
        }

        /// `kron(w1, w2) x` is `w1 X w2^T` for x as a matrix X [b, d]: w2 acts on b parts of the input, then w1 mixes the parts.
        fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor> {
            if !self.in_parts(pass.layer) {
                return by_delta(self, pass, x);
            }
            let (layer, (w1, rest)) = (pass.layer, self.halves(pass)?);
            let ([a, b], [c, d]) = (self.small.map(|n| n as i64), self.large.map(|n| n as i64));
            // The channels are at the end of a Linear layer's input, else behind the batch.
            let (axes, size) = (self.weight.len() - 2, x.size());
            let lead = if axes == 0 { &size[..size.len() - 1] } else { &size[..1] };
            let parts = x.f_reshape([&[-1, d], &size[size.len() - axes..]].concat())?;
            let point = |t: Tensor| {
                let shape = [&t.size()[..], &vec![1; axes]].concat();
                t.f_reshape(shape)
            };
            let (t, up) = match rest {
                [left, right, core] => {
                    let t = layer.pointwise(&parts, &point(right.shallow_clone())?)?;
                    (layer.apply(&t, core)?, Some(point(left.f_transpose(0, 1)?)?))
                }
                [left, right] => {
                    let down = right.f_reshape([&[-1, d], &long(&self.weight[2..])[..]].concat())?;
                    (layer.apply(&parts, &down)?, Some(point(left.shallow_clone())?))
                }
                _ => (layer.apply(&parts, &rest[0])?, None),
            };
            let size = t.size();
            let (inner, spatial) = (size[1], &size[2..]);
            let values = inner * spatial.iter().product::<i64>();
            let t = w1.f_matmul(&t.f_reshape([-1, b, values])?)?;
            let y = match up {
                Some(up) => layer.pointwise(&t.f_reshape([&[-1, inner], spatial].concat())?, &up)?,
                None => t,
            };
            pass.dropped(y.f_reshape([lead, &[a * c], spatial].concat())?)
        }

        fn add_forward(&self, pass: &Pass, x: &Tensor, y: &Tensor) -> Result<()> {
            if !pass.linear_into(y) || !self.in_parts(pass.layer) {
                return add_output(self, pass, x, y);
            }
            let ([a, _], [c, d]) = (self.small.map(|n| n as i64), self.large.map(|n| n as i64));
            let (down, up) = down_and_up(self.split(pass.parameters).1);
            let (w1, t) = self.inner(pass, &x.f_reshape([-1, d])?, down)?;
            match up {
                Some(up) => {
                    let y = y.f_view([-1, c])?;
                    product(&y, Factor(&w1.f_bmm(&t)?, false), Factor(up, true), 1.0, self.scale())
                }
                None => {
                    let _ = y.f_view([-1, a, c])?.f_baddbmm_(&w1, &scaled(&t, self.scale())?)?;
                    Ok(())
                }
            }
        }

        /// With `t = X down^T`, `u = w1 t` and `y = s u up^T` the five gradients follow from those of u and t. Where w2 is whole it is down, and y
        /// is s u.
        fn accumulate(
            &self,
            pass: &Pass,
            x: &Tensor,
            grad_y: &Tensor,
            want_input: bool,
            into: &[Tensor],
        ) -> Result<Option<Tensor>> {
            if !pass.linear() || !self.in_parts(pass.layer) {
                return add_gradients(self.backward(pass, x, grad_y, want_input)?, into);
            }
            let ([a, _], [c, d]) = (self.small.map(|n| n as i64), self.large.map(|n| n as i64));
            let ((small, rest), scale) = (self.split(pass.parameters), self.scale());
            let ((down, up), (into_small, into_rest)) = (down_and_up(rest), self.split(into));
            let (into_down, into_up) = down_and_up(into_rest);
            let (parts, grad_y) = (x.f_reshape([-1, d])?, grad_y.f_reshape([-1, a, c])?);
            let (w1, t) = self.inner(pass, &parts, down)?;
            let grad_u = match (up, into_up) {
                (Some(up), Some(into_up)) => {
                    product(into_up, Factor(&grad_y, true), Factor(&w1.f_bmm(&t)?, false), 1.0, scale)?;
                    multiply(Factor(&grad_y, false), Factor(up, false))?.f_view([-1, a, up.size()[1]])?
                }
                _ => grad_y,
            };
            let (grad_rows, rows) = (by_part(&grad_u)?, by_part(&t)?);
            match (small, into_small) {
                ([left, right], [into_left, into_right]) => {
                    let grad_w1 = multiply(Factor(&grad_rows, false), Factor(&rows, true))?;
                    product(into_left, Factor(&grad_w1, false), Factor(right, true), 1.0, scale)?;
                    product(into_right, Factor(left, true), Factor(&grad_w1, false), 1.0, scale)?;
                }
                _ => product(&into_small[0], Factor(&grad_rows, false), Factor(&rows, true), 1.0, scale)?,
            }
            let grad_t = w1.f_transpose(1, 2)?.f_bmm(&grad_u)?;
            product(into_down, Factor(&grad_t, true), Factor(&parts, false), 1.0, scale)?;
            if !want_input {
                return Ok(None);
            }
            let grad_x = x.f_empty_like()?;
            product(&grad_x.f_view([-1, d])?, Factor(&grad_t, false), Factor(down, false), 0.0, scale)?;
            Ok(Some(grad_x))
        }

        fn backward(&self, pass: &Pass, x: &Tensor, grad_y: &Tensor, want_input: bool) -> Result<Gradients> {
            through_delta(self, pass, x, grad_y, want_input)
        }

        /// That of a Kronecker product is the product of both norms.
        fn norm(&self, pass: &Pass) -> Result<Tensor> {
            let (w1, rest) = self.halves(pass)?;
            let norm = |t: Tensor| t.f_to_kind(Kind::Double)?.f_norm();
            Ok(norm(w1)?.f_mul(&norm(whole(rest)?)?)?)
        }

        fn shrunk(&self, ratio: &Tensor) -> Result<Option<Vec<Tensor>>> {
            evenly(ratio, self.parameters().len())
        }
    }
}
