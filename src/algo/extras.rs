//! What may stand beside the factors of several algorithms: a magnitude (DoRA), a scalar, a bias, a grown shape. Each is read once here and
//! put around the algorithm's module.
//!
//! | tensor | meaning |
//! |---|---|
//! | `dora_scale` | magnitude: [O, 1..] or [O] per output channel, [1, I, 1..] per input channel. `W' = W + s * (V o m / |V| - W)`, `V = W + dW` |
//! | `lora_magnitude_vector` | PEFT's magnitude, always per output channel: [O], for convolutions [1, O, 1..] |
//! | `scalar` | a factor on dW |
//! | `diff_b` | `b' = b + s * diff_b` |
//! | `reshape_weight` | the shape to which the weight grows before it is changed |
//!
//! DoRA: Liu et al. 2024, arXiv:2402.09353. The norm is V's and has no epsilon (LyCORIS adds one of the dtype, ComfyUI divides by |W|).

use super::{malformed, required, Algorithm, Changes, Group};
use crate::error::{Error, Result};
use crate::merge::ops::{Decompose, Op};
use crate::view::Tensor;

const MAGNITUDE: &str = "dora_scale";
const PEFT_MAGNITUDE: &str = "lora_magnitude_vector";
const SCALAR: &str = "scalar";
pub(super) const BIAS: &str = "diff_b";
const GROWN: &str = "reshape_weight";

pub(super) const NAMES: &[&str] = &[MAGNITUDE, PEFT_MAGNITUDE, SCALAR, BIAS, GROWN];

/// The tensors of a module that belong to no single algorithm.
#[derive(Clone, Debug, Default)]
pub(super) struct Extras {
    magnitude: Option<(&'static str, Tensor)>,
    scalar: Option<(Tensor, f32)>,
    bias: Option<Tensor>,
    grown: Option<(Tensor, Vec<usize>)>,
    grows: bool,
}

impl Extras {
    /// Takes them out of a group.
    pub fn take(module: &str, mut group: Group) -> Result<(Self, Group)> {
        let mut extras = Extras { grows: group.grows, ..Extras::default() };
        for &name in NAMES {
            let Some(at) = group.tensors.iter().position(|(n, _)| *n == name) else { continue };
            if name != GROWN {
                required(module, &group, name)?;
            }
            let (name, tensor) = group.tensors.remove(at);
            match name {
                SCALAR => extras.scalar = Some(super::number(module, name, &tensor)?),
                BIAS => extras.bias = Some(tensor),
                GROWN => {
                    let sizes = sizes(module, &tensor)?;
                    let list = sizes.iter().map(|&v| v as f32).collect();
                    extras.grown = Some((Tensor::of_f32(list, &[sizes.len()]), sizes));
                }
                _ if extras.magnitude.is_some() => {
                    return Err(malformed(
                        module,
                        format!("both `{MAGNITUDE}` and `{PEFT_MAGNITUDE}` are there"),
                    ))
                }
                _ => extras.magnitude = Some((name, tensor)),
            }
        }
        Ok((extras, group))
    }

    pub fn is_empty(&self) -> bool {
        self.magnitude.is_none() && self.scalar.is_none() && self.bias.is_none() && self.grown.is_none()
    }

    /// The whole module. `inner` is `None` when the group has nothing else.
    pub fn around(self, module: &str, inner: Option<Box<dyn Algorithm>>) -> Result<Box<dyn Algorithm>> {
        let inner = match inner {
            Some(inner) if self.is_empty() && !self.grows => return Ok(inner),
            inner => inner,
        };
        let name = match (&inner, &self.magnitude) {
            (None, None) if self.bias.is_some() => "bias",
            (None, _) => return Err(malformed(module, "has no factors")),
            (Some(inner), None) => inner.name(),
            (Some(inner), Some((magnitude, _))) => decomposed(inner.name()).ok_or_else(|| {
                malformed(module, format!("`{magnitude}` has no meaning beside {}", inner.name()))
            })?,
        };
        let own = inner.as_ref().and_then(|inner| inner.shape());
        if let (Some((_, to)), Some(_)) = (&self.grown, &inner) {
            if own.as_ref() != Some(to) {
                return Err(malformed(
                    module,
                    format!("`{GROWN}` {to:?} is not the module's own shape {own:?}"),
                ));
            }
        }
        let own = own.filter(|_| self.grows);
        let grown = self.grown.as_ref().map(|(_, sizes)| sizes.clone()).or(own);
        Ok(Box::new(Dressed { name, inner, grown, extras: self }))
    }
}

/// What an algorithm is called with a magnitude around it; `None` for those that have none.
fn decomposed(inner: &str) -> Option<&'static str> {
    Some(match inner {
        "LoRA" => "DoRA",
        "LoCon" => "DoRA (LoCon)",
        "LoHa" => "DoRA (LoHa)",
        "LoKr" => "DoRA (LoKr)",
        _ => return None,
    })
}

/// Sizes up to here are whole numbers of f32.
const MOST: f64 = 16_777_216.0;

/// A shape kept in a tensor.
fn sizes(module: &str, tensor: &Tensor) -> Result<Vec<usize>> {
    let wrong = || malformed(module, format!("`{GROWN}` must list sizes, it is {tensor:?}"));
    let flat =
        tensor.reshape(&[tensor.count()]).filter(|t| (1..=5).contains(&t.count())).ok_or_else(wrong)?;
    let size = |i| flat.rows(i..i + 1)?.scalar().filter(|v| (1.0..=MOST).contains(v) && v.fract() == 0.0);
    (0..flat.count()).map(|i| size(i).map(|v| v as usize).ok_or_else(wrong)).collect()
}

/// A module with something around it.
#[derive(Debug)]
struct Dressed {
    name: &'static str,
    inner: Option<Box<dyn Algorithm>>,
    grown: Option<Vec<usize>>,
    extras: Extras,
}

impl Dressed {
    /// The axis that a magnitude of this shape lies along, on a weight of `target`.
    fn axis(&self, module: &str, slot: &str, shape: &[usize], target: &[usize]) -> Result<usize> {
        let long: Vec<usize> = (0..shape.len()).filter(|&i| shape[i] != 1).collect();
        let count: usize = shape.iter().product();
        let axis = match long[..] {
            // PEFT writes a convolution's as [1, O, 1..].
            _ if slot == PEFT_MAGNITUDE => Some(0),
            [] if shape.len() < 2 || target.first() == Some(&1) => Some(0),
            [] => Some(1),
            [0] => Some(0),
            [1] => Some(1),
            _ => None,
        };
        axis.filter(|&axis| long.len() < 2 && target.get(axis) == Some(&count)).ok_or_else(|| Error::Shape {
            tensor: module.to_owned(),
            what: format!(
                "`{slot}` has one value neither per output nor per input channel (its shape first)"
            ),
            expected: shape.to_vec(),
            got: target.to_vec(),
        })
    }
}

impl Algorithm for Dressed {
    fn name(&self) -> &'static str {
        self.name
    }

    fn rank(&self) -> Option<usize> {
        self.inner.as_ref()?.rank()
    }

    fn alpha(&self) -> Option<f32> {
        self.inner.as_ref()?.alpha()
    }

    fn shape(&self) -> Option<Vec<usize>> {
        self.inner.as_ref()?.shape()
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let Some(inner) = &self.inner else { return Ok(Vec::new()) };
        let mut ops = inner.lower(module, target)?;
        if let Some((_, scalar)) = self.extras.scalar {
            let scaled = ops.into_iter().map(|op| op.scaled(f64::from(scalar)));
            ops = scaled.collect::<Option<_>>().ok_or_else(|| {
                malformed(module, format!("`{SCALAR}` has no meaning beside {}", inner.name()))
            })?;
        }
        let Some((slot, magnitude)) = &self.extras.magnitude else { return Ok(ops) };
        let axis = self.axis(module, slot, magnitude.shape(), target)?;
        let magnitude = magnitude
            .reshape(&[magnitude.count()])
            .ok_or_else(|| malformed(module, format!("`{slot}` is not contiguous")))?;
        Ok(vec![Op::Decompose(Decompose { inside: ops, magnitude, axis })])
    }

    fn lower_bias(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let mut ops = match &self.inner {
            Some(inner) => inner.lower_bias(module, target)?,
            None => Vec::new(),
        };
        if let Some(bias) = &self.extras.bias {
            ops.push(super::dense(module, bias, target, 1.0)?);
        }
        Ok(ops)
    }

    fn changes(&self) -> Changes {
        let inner = self.inner.as_ref().map(|inner| inner.changes());
        let Changes { weight, bias } = inner.unwrap_or(Changes { weight: false, bias: false });
        Changes { weight, bias: bias || self.extras.bias.is_some() }
    }

    fn grown(&self) -> Option<&[usize]> {
        self.grown.as_deref()
    }

    fn prefix(&self, module: &str, rank: usize) -> Option<Result<Box<dyn Algorithm>>> {
        // A magnitude was trained with all ranks.
        let inner = self.inner.as_ref().filter(|_| self.extras.magnitude.is_none())?;
        let inner = inner.prefix(module, rank)?;
        Some(inner.map(|inner| -> Box<dyn Algorithm> {
            let Dressed { name, grown, extras, .. } = self;
            Box::new(Dressed { name, inner: Some(inner), grown: grown.clone(), extras: extras.clone() })
        }))
    }

    fn note(&self) -> Option<String> {
        self.inner.as_ref()?.note()
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors = self.inner.as_ref().map(|inner| inner.tensors()).unwrap_or_default();
        tensors.extend(self.extras.magnitude.as_ref().map(|(name, t)| (*name, t)));
        tensors.extend(self.extras.scalar.as_ref().map(|(t, _)| (SCALAR, t)));
        tensors.extend(self.extras.bias.as_ref().map(|t| (BIAS, t)));
        tensors.extend(self.extras.grown.as_ref().map(|(t, _)| (GROWN, t)));
        tensors
    }
}

#[cfg(feature = "torch")]
pub(super) use training::decompose;

/// DoRA in training: `dW = V o m / |V| - W`, `V = W + inner dW`, with m the lengths of W to begin with. Gradients go through |V|, as in
/// LyCORIS; PEFT takes it for a constant.
///
/// On a Linear layer, with a length per output and a LoRA inside, `dW = s U D`, no matrix of the weight's size is made. With `r = m / |V|` of
/// each row the layer's output grows by `(r - 1) o (W x) + r o (s U D x)`, and
/// `|V|^2 = |W|^2 + <P + Q, U>`, `P = s W D^T`, `Q = P + s^2 U D D^T`, row by row. The gradient of a row's |V|^2 is
/// `e = -r / (2 |V|^2) dL/dr`, `dL/dr` is the sum of `dL/dy o (V x)` over a batch, and from |V|^2 it goes to U as `2 Q`, to D as `2 s U^T V`.
#[cfg(feature = "torch")]
mod training {
    use super::{decomposed, MAGNITUDE};
    use crate::algo::training::{
        add_gradients, add_output, through_delta, Gradients, Init, Layer, Parameter, Pass, Trainable,
    };
    use crate::algo::ALPHA;
    use crate::error::{Error, Result};
    use crate::torch_ext::{multiply, product, Factor};
    use tch::Tensor;

    /// Puts a magnitude around `inner`, one per output channel or per input channel.
    pub(in crate::algo) fn decompose(
        layer: &Layer,
        inner: Box<dyn Trainable>,
        on_output: bool,
        weight: Option<&Tensor>,
    ) -> Result<Box<dyn Trainable>> {
        let Some(name) = decomposed(inner.name()) else {
            let what = format!("`{}`: DoRA has no meaning around {}", layer.name, inner.name());
            return Err(Error::argument(what, "it goes around lora, loha and lokr"));
        };
        let weight = weight.ok_or_else(|| {
            let what = format!("`{}`: DoRA begins with the lengths of the layer's own weight", layer.name);
            Error::argument(what, "pass the weight when the layer is registered")
        })?;
        let mut shape = vec![1; layer.weight.len()];
        let axis = usize::from(!on_output);
        shape[axis] = layer.weight[axis];
        let start = Vec::try_from(lengths(weight, axis)?.f_flatten(0, -1)?)?;
        let alpha = inner.constants().iter().find(|(name, _)| *name == ALPHA).map(|(_, alpha)| *alpha);
        let scale = alpha.zip(inner.rank()).map(|(alpha, rank)| alpha / rank as f64);
        let around_lora = scale.filter(|_| inner.name() == "LoRA" && on_output);
        Ok(Box::new(Decomposed { name, inner, axis, shape, start, around_lora }))
    }

    /// The norms over all axes but one.
    fn lengths(weight: &Tensor, axis: usize) -> Result<Tensor> {
        let others: Vec<i64> = (0..weight.dim()).filter(|&a| a != axis).map(|a| a as i64).collect();
        Ok(weight.f_norm_scalaropt_dim(2, &others[..], true)?)
    }

    /// A module in training with a magnitude around it.
    #[derive(Debug)]
    struct Decomposed {
        name: &'static str,
        inner: Box<dyn Trainable>,
        /// The channels that have a length each: of the outputs, 0, or of the inputs, 1.
        axis: usize,
        /// Of the magnitude.
        shape: Vec<usize>,
        start: Vec<f32>,
        /// alpha / rank of a LoRA inside, where there is a length per output.
        around_lora: Option<f64>,
    }

    impl Decomposed {
        /// What the inner module is computed from, and the magnitude.
        fn split<'a>(&self, pass: &Pass<'a>) -> Result<(Pass<'a>, &'a Tensor)> {
            match pass.parameters.split_last() {
                Some((magnitude, parameters)) => Ok((Pass { parameters, ..*pass }, magnitude)),
                None => Err(Error::Backend(format!("`{}` has no magnitude", pass.layer.name))),
            }
        }

        /// The rows of V and what belongs to them, on a Linear layer from which nothing is left out.
        fn rows<'a>(&self, pass: &Pass<'a>) -> Result<Option<Rows<'a>>> {
            let Some(scale) = self.around_lora.filter(|_| pass.linear()) else { return Ok(None) };
            match pass.parameters {
                [down, up, magnitude] => Rows::new(pass.base()?, [down, up], magnitude, scale).map(Some),
                _ => Ok(None),
            }
        }
    }

    /// m / |V|. A row of zeros stays one.
    fn ratio(magnitude: &Tensor, lengths: &Tensor) -> Result<Tensor> {
        Ok(magnitude.f_div(&lengths.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?)
    }

    /// `V = W + s up down` by thin products alone; what is not of the compute dtype has the magnitude's. A row of V much shorter than W's has
    /// fewer digits, by the ratio of their squares; training stays far from there.
    struct Rows<'a> {
        base: &'a Tensor,
        down: &'a Tensor,
        up: &'a Tensor,
        /// `up` in the magnitude's dtype.
        precise_up: Tensor,
        scale: f64,
        /// Q [O, r].
        crossed: Tensor,
        /// |V| [O, 1].
        lengths: Tensor,
        /// m / |V| [O, 1].
        ratio: Tensor,
    }

    impl<'a> Rows<'a> {
        fn new(
            base: &'a Tensor,
            [down, up]: [&'a Tensor; 2],
            magnitude: &Tensor,
            scale: f64,
        ) -> Result<Self> {
            let kind = magnitude.f_kind()?;
            let precise_up = up.f_to_kind(kind)?;
            let times_down = |t: &Tensor, scale: f64| {
                let out = Tensor::f_empty([t.size()[0], down.size()[0]], (kind, t.device()))?;
                product(&out, Factor(t, false), Factor(down, true), 0.0, scale)?;
                Ok::<_, Error>(out)
            };
            let own = times_down(base, scale)?;
            let crossed = own.f_addmm(&precise_up, &times_down(down, scale * scale)?)?;
            let added =
                { own }.f_add_(&crossed)?.f_mul_(&precise_up)?.f_sum_dim_intlist(&[1i64][..], true, None)?;
            let lengths =
                base.f_norm_scalaropt_dim_dtype(2, &[1i64][..], true, kind)?.f_square_()?.f_add_(&added)?;
            let lengths = { lengths }.f_clamp_min_(f64::from(f32::MIN_POSITIVE))?.f_sqrt_()?;
            let ratio = ratio(magnitude, &lengths)?;
            Ok(Rows { base, down, up, precise_up, scale, crossed, lengths, ratio })
        }

        /// `factor o up`, in the compute dtype.
        fn up_times(&self, factor: &Tensor) -> Result<Tensor> {
            Ok(self.precise_up.f_mul(factor)?.f_to_kind(self.up.f_kind()?)?)
        }

        /// r - 1 as [O], in the compute dtype.
        fn beyond_one(&self) -> Result<Tensor> {
            Ok(self.ratio.f_flatten(0, -1)?.f_sub_scalar(1.0)?.f_to_kind(self.up.f_kind()?)?)
        }

        fn add_forward(&self, x: &Tensor, y: &Tensor) -> Result<()> {
            // Not r o (V x) - W x: that would round the small difference at the size of W x.
            let base = multiply(Factor(x, false), Factor(self.base, true))?.f_view_as(y)?;
            let _ = y.shallow_clone().f_addcmul_(&base, &self.beyond_one()?)?;
            let t = multiply(Factor(x, false), Factor(self.down, true))?;
            product(y, Factor(&t, false), Factor(&self.up_times(&self.ratio)?, true), 1.0, self.scale)
        }

        fn accumulate(
            &self,
            x: &Tensor,
            grad_y: &Tensor,
            want_input: bool,
            into: [&Tensor; 3],
        ) -> Result<Option<Tensor>> {
            let (Rows { base, down, up, scale, ratio, .. }, [into_down, into_up, into_magnitude]) =
                (self, into);
            let own = Tensor::shallow_clone;
            // The magnitude: dL/dr / |V|.
            let t = multiply(Factor(x, false), Factor(down, true))?;
            let mut turned = multiply(Factor(x, false), Factor(base, true))?;
            product(&turned, Factor(&t, false), Factor(up, true), 1.0, *scale)?;
            let rows = turned.size();
            let moved = turned.f_mul_(&grad_y.f_view(&rows[..])?)?;
            let grad_ratio =
                moved.f_sum_dim_intlist(&[0i64][..], false, ratio.f_kind()?)?.f_view_as(ratio)?;
            let _ = own(into_magnitude).f_addcdiv_(&grad_ratio, &self.lengths)?;
            // Through the lengths: 2 e.
            let twice = grad_ratio.f_mul(ratio)?.f_div_(&self.lengths.f_square()?)?.f_neg_()?;
            let _ = own(into_up).f_addcmul_(&self.crossed, &twice)?;
            // LoRA-FA holds down.
            let moves = down.requires_grad();
            if moves {
                let up_twice = self.up_times(&twice)?;
                product(into_down, Factor(&up_twice, true), Factor(base, false), 1.0, *scale)?;
                let gram = multiply(Factor(&up_twice, true), Factor(up, false))?;
                product(into_down, Factor(&gram, false), Factor(down, false), 1.0, scale * scale)?;
            }
            // Through s U D x.
            let grad_up = self.crossed.f_empty_like()?;
            product(&grad_up, Factor(grad_y, true), Factor(&t, false), 0.0, *scale)?;
            let _ = own(into_up).f_addcmul_(&grad_up, ratio)?;
            let grad_t = multiply(Factor(grad_y, false), Factor(&self.up_times(ratio)?, false))?;
            if moves {
                product(into_down, Factor(&grad_t, true), Factor(x, false), 1.0, *scale)?;
            }
            if !want_input {
                return Ok(None);
            }
            let grad_x = multiply(Factor(&grad_y.f_mul(&self.beyond_one()?)?, false), Factor(base, false))?;
            product(&grad_x, Factor(&grad_t, false), Factor(down, false), 1.0, *scale)?;
            Ok(Some(grad_x.f_view_as(x)?))
        }
    }

    impl Trainable for Decomposed {
        fn name(&self) -> &'static str {
            self.name
        }

        fn rank(&self) -> Option<usize> {
            self.inner.rank()
        }

        fn constants(&self) -> Vec<(&'static str, f64)> {
            self.inner.constants()
        }

        fn parameters(&self) -> Vec<Parameter> {
            let magnitude =
                Parameter::new(MAGNITUDE, &self.shape, Init::Values(self.start.clone())).precise();
            self.inner.parameters().into_iter().chain([magnitude]).collect()
        }

        fn needs_weight(&self) -> bool {
            true
        }

        fn delta(&self, pass: &Pass) -> Result<Tensor> {
            let (inner, magnitude) = self.split(pass)?;
            let base = pass.base()?.f_to_kind(magnitude.f_kind()?)?;
            let inner = self.inner.delta(&inner)?.f_to_kind(magnitude.f_kind()?)?;
            let ratio = ratio(magnitude, &lengths(&base.f_add(&inner)?, self.axis)?)?;
            // Not V m / |V| - W: that would round the small difference at the size of W.
            let delta = base.f_mul(&ratio.f_sub_scalar(1.0)?)?.f_addcmul(&inner, &ratio)?;
            Ok(delta.f_to_kind(pass.compute)?)
        }

        fn add_forward(&self, pass: &Pass, x: &Tensor, y: &Tensor) -> Result<()> {
            match self.rows(pass)?.filter(|_| pass.linear_into(y)) {
                Some(rows) => rows.add_forward(x, y),
                None => add_output(self, pass, x, y),
            }
        }

        fn backward(&self, pass: &Pass, x: &Tensor, grad_y: &Tensor, want_input: bool) -> Result<Gradients> {
            through_delta(self, pass, x, grad_y, want_input)
        }

        fn accumulate(
            &self,
            pass: &Pass,
            x: &Tensor,
            grad_y: &Tensor,
            want_input: bool,
            into: &[Tensor],
        ) -> Result<Option<Tensor>> {
            match (self.rows(pass)?, into) {
                (Some(rows), [down, up, magnitude]) => {
                    rows.accumulate(x, grad_y, want_input, [down, up, magnitude])
                }
                _ => add_gradients(self.backward(pass, x, grad_y, want_input)?, into),
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::algo::training::{long, Rule};
        use crate::algo::training_tests::{rule, wave};
        use crate::merge::bypass::Geometry;
        use tch::Kind;

        /// The lengths from squares and thin products are those of the sum, also where dW is as large as W.
        #[test]
        fn lengths_are_those_of_the_sum() {
            let (base, down) = (wave(&[96, 64], 0.4), wave(&[8, 64], 1.2));
            for size in [0.0, 1e-6, 1e-3, 1.0] {
                let parameters = [down.shallow_clone(), wave(&[96, 8], 2.3) * size];
                let delta = parameters[1].matmul(&down) * 0.3;
                let want = lengths(&(&base + &delta), 0).unwrap();
                let single = [&base, &parameters[0], &parameters[1]].map(|t| t.to_kind(Kind::Float));
                let [base, down, up] = &single;
                let rows = Rows::new(base, [down, up], &want.to_kind(Kind::Float), 0.3).unwrap();
                let off = (rows.lengths / &want - 1.0).abs().max().double_value(&[]);
                // A few roundings, as in the sum itself; V is nowhere much shorter than W.
                assert!(off <= 5e-7, "{size}: {off}");
            }
        }

        #[test]
        fn what_cannot_begin_says_why() {
            let layer = Layer::sliding("layer", &[8, 6], &Geometry::default(), false).unwrap();
            let rule = Rule { decompose: Some(true), ..rule() };
            let begin = |name: &str, weight: Option<&Tensor>| {
                let begin = crate::algo::TRAINED.iter().find(|b| b.names[0] == name).unwrap();
                crate::algo::begin(begin, &layer, &rule, weight)
            };
            let weight = wave(&long(&layer.weight), 0.4).to_kind(Kind::Float);
            assert_eq!(begin("lora", Some(&weight)).unwrap().name(), "DoRA");
            let error = begin("lora", None).unwrap_err();
            assert!(error.hint().contains("pass the weight"), "{error:?}");
            let error = begin("boft", Some(&weight)).unwrap_err();
            assert!(error.to_string().contains("no meaning around BOFT"), "{error}");
            let error = begin("lora", Some(&weight.transpose(0, 1))).unwrap_err();
            assert!(matches!(error, Error::Shape { .. }), "{error}");
        }
    }
}
