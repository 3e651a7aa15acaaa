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
#[cfg(feature = "torch")]
mod training {
    use super::{decomposed, MAGNITUDE};
    use crate::algo::training::{
        by_delta, differentiate, through_delta, Gradients, Init, Layer, Parameter, Pass, Trainable,
    };
    use crate::algo::ALPHA;
    use crate::error::{Error, Result};
    use tch::{Kind, Tensor};

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
        let thin = scale.filter(|_| name == "DoRA" && on_output);
        Ok(Box::new(Decomposed { name, inner, axis, shape, start, thin }))
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
        /// The scale of the inner product of two factors, on a Linear layer with a length per output. Then the layer's output is
        /// `y + (m / |V| - 1) (W x) + m / |V| (inner x)`, and the lengths follow from `|W|^2 + 2 <W, dW> + |dW|^2` and thin products:
        /// no matrix of the weight's size is made. That takes about 52 bytes per output value and 26 per weight, dW about 156 per weight,
        /// beside the same three large products; so it is taken where a batch has at most two rows per input channel.
        thin: Option<f64>,
    }

    impl Decomposed {
        fn thin(&self, pass: &Pass, x: &Tensor) -> Option<f64> {
            let inputs = pass.layer.weight[1];
            self.thin.filter(|_| pass.whole() && x.numel() <= 2 * inputs * inputs)
        }

        /// What the inner module is computed from, and the magnitude.
        fn split<'a>(&self, pass: &Pass<'a>) -> Result<(Pass<'a>, &'a Tensor)> {
            match pass.parameters.split_last() {
                Some((magnitude, parameters)) => Ok((Pass { parameters, ..*pass }, magnitude)),
                None => Err(Error::Backend(format!("`{}` has no magnitude", pass.layer.name))),
            }
        }
    }

    /// m / |V|. A row of zeros stays one.
    fn ratio(magnitude: &Tensor, lengths: &Tensor) -> Result<Tensor> {
        Ok(magnitude.f_div(&lengths.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?)
    }

    /// The rows' lengths of `W + scale up down`, without the sum.
    fn thin_lengths(base: &Tensor, parameters: &[Tensor], scale: f64, kind: Kind) -> Result<Tensor> {
        let (down, up) = (&parameters[0], parameters[1].f_to_kind(kind)?);
        let crossed = base.f_matmul(&down.f_transpose(0, 1)?)?.f_to_kind(kind)?;
        let down = down.f_to_kind(kind)?;
        let gram = down.f_matmul(&down.f_transpose(0, 1)?)?;
        // <W, up down> and |up down|^2 / 2 of each row.
        let added = crossed.f_add(&up.f_matmul(&gram)?.f_mul_scalar(scale / 2.0)?)?.f_mul(&up)?;
        let added = added.f_sum_dim_intlist(&[1i64][..], true, None)?.f_mul_scalar(2.0 * scale)?;
        let own = lengths(&base.f_to_kind(kind)?, 0)?.f_square()?;
        Ok(own.f_add(&added)?.f_clamp_min(f64::from(f32::MIN_POSITIVE))?.f_sqrt()?)
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

        fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor> {
            let Some(scale) = self.thin(pass, x) else { return by_delta(self, pass, x) };
            let (inner, magnitude) = self.split(pass)?;
            let lengths = thin_lengths(pass.base()?, inner.parameters, scale, magnitude.f_kind()?)?;
            let ratio = ratio(magnitude, &lengths)?.f_flatten(0, -1)?;
            let base = pass.layer.apply(x, pass.base()?)?;
            let base = base.f_mul(&ratio.f_sub_scalar(1.0)?.f_to_kind(pass.compute)?)?;
            let added = self.inner.forward(&inner, x)?;
            Ok(base.f_addcmul(&added, &ratio.f_to_kind(pass.compute)?)?)
        }

        fn backward(&self, pass: &Pass, x: &Tensor, grad_y: &Tensor, want_input: bool) -> Result<Gradients> {
            match self.thin(pass, x) {
                Some(_) => differentiate(&|x| self.forward(pass, x), pass.parameters, x, grad_y, want_input),
                None => through_delta(self, pass, x, grad_y, want_input),
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::algo::training::{long, Rule};
        use crate::algo::training_tests::{rule, wave};
        use crate::merge::bypass::Geometry;

        /// The lengths from squares and thin products are those of the sum, also where dW is as large as W.
        #[test]
        fn thin_lengths_are_those_of_the_sum() {
            let (base, down) = (wave(&[96, 64], 0.4), wave(&[8, 64], 1.2));
            for size in [0.0, 1e-6, 1e-3, 1.0] {
                let parameters = [down.shallow_clone(), wave(&[96, 8], 2.3) * size];
                let delta = parameters[1].matmul(&down) * 0.3;
                let want = lengths(&(&base + &delta), 0).unwrap();
                let single = parameters.each_ref().map(|t| t.to_kind(Kind::Float));
                let got = thin_lengths(&base.to_kind(Kind::Float), &single, 0.3, Kind::Float).unwrap();
                let off = (got / &want - 1.0).abs().max().double_value(&[]);
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
