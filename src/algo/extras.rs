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

pub(super) const MAGNITUDE: &str = "dora_scale";
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
pub(super) fn decomposed(inner: &str) -> Option<&'static str> {
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
