//! (IA)^3: `W' = W o (1 + s * w)`, w along the output or the input channels.
//!
//! Liu et al. 2022, arXiv:2205.05638.
//!
//! | tensor | shape |
//! |---|---|
//! | `weight` | LyCORIS: w, O or I values, for convolutions with axes of 1 around them |
//! | `on_input` | one number: 0 output, else input |
//! | `ia3_l` | PEFT: 1 + w; Linear [O, 1] or [1, I]; convolutions [1, O or I, 1..], told by `feedforward_modules` of the configuration |
//!
//! PEFT scales a layer's output with its bias; LyCORIS merges into the weight alone.

use super::{malformed, required, Algorithm, Changes, Group, Recipe, ALPHA};
use crate::error::{Error, Result};
use crate::merge::ops::{Op, Scale};
use crate::view::Tensor;

const WEIGHT: &str = "weight";
const ON_INPUT: &str = "on_input";
const PEFT_L: &str = "ia3_l";

// Neither has a use for an alpha; a host that gives every module one shall not be refused.
pub(super) const RECIPE: Recipe =
    Recipe { name: "(IA)^3", marks: &[ON_INPUT, WEIGHT], knows: &[WEIGHT, ON_INPUT, ALPHA], read };
pub(super) const PEFT: Recipe =
    Recipe { name: "(IA)^3 (PEFT)", marks: &[PEFT_L], knows: &[PEFT_L, ALPHA], read: read_peft };

/// One module.
#[derive(Debug)]
struct Ia3 {
    /// As the file has them.
    tensors: Vec<(&'static str, Tensor)>,
    /// w as one row of values.
    v: Tensor,
    axis: usize,
    /// Whether the bias is scaled with the output.
    with_bias: bool,
}

/// The values of a tensor that is a vector but for axes of 1.
fn vector(module: &str, name: &str, tensor: &Tensor) -> Result<Tensor> {
    if tensor.shape().iter().filter(|&&d| d != 1).count() > 1 {
        return Err(malformed(module, format!("`{name}` must be a vector, it is {:?}", tensor.shape())));
    }
    let flat = tensor.reshape(&[tensor.count()]);
    flat.ok_or_else(|| malformed(module, format!("`{name}` is not contiguous")))
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let weight = required(module, group, WEIGHT)?;
    let Some(on_input) = group.get(ON_INPUT) else {
        return Err(malformed(module, format!("`{ON_INPUT}` is missing")));
    };
    let v = vector(module, WEIGHT, weight)?;
    let (on_input, flag) = super::number(module, ON_INPUT, on_input)?;
    let tensors = vec![(WEIGHT, weight.clone()), (ON_INPUT, on_input)];
    Ok(Box::new(Ia3 { tensors, v, axis: usize::from(flag != 0.0), with_bias: false }))
}

fn read_peft(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let tensor = required(module, group, PEFT_L)?;
    let axis = match *tensor.shape() {
        [_, 1] => 0,
        [1, _] => 1,
        _ => match group.config.as_ref().and_then(|c| c.is_feedforward(module)) {
            Some(feedforward) => usize::from(feedforward),
            None => {
                return Err(Error::Unsupported {
                    what: format!(
                        "`{module}`: `{PEFT_L}` {:?} does not say which channels it scales",
                        tensor.shape()
                    ),
                    hint: "put the adapter_config.json of its training beside the file".into(),
                })
            }
        },
    };
    let l = vector(module, PEFT_L, tensor)?;
    let v = l.to_f32(module)?.into_iter().map(|l| l - 1.0).collect();
    let v = Tensor::of_f32(v, &[l.count()]);
    Ok(Box::new(Ia3 { tensors: vec![(PEFT_L, tensor.clone())], v, axis, with_bias: axis == 0 }))
}

impl Algorithm for Ia3 {
    fn name(&self) -> &'static str {
        "(IA)^3"
    }

    fn shape(&self) -> Option<Vec<usize>> {
        None
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let count = self.v.count();
        if target.get(self.axis) != Some(&count) {
            let axis = ["output", "input"][self.axis];
            return Err(Error::Shape {
                tensor: module.to_owned(),
                what: format!(
                    "the module scales {axis} channels and does not fit the weight (module's length first)"
                ),
                expected: vec![count],
                got: target.to_vec(),
            });
        }
        Ok(vec![Op::Scale(Scale { v: self.v.clone(), axis: self.axis })])
    }

    fn lower_bias(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        if self.with_bias {
            self.lower(module, target)
        } else {
            Ok(Vec::new())
        }
    }

    fn changes(&self) -> Changes {
        Changes { weight: true, bias: self.with_bias }
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (*name, tensor)).collect()
    }
}

#[cfg(feature = "torch")]
pub(super) use training::BEGIN;

/// The same formula in training: what it adds is the layer's own product, scaled. 1 + w is nowhere formed, so 16 bits keep a small w.
#[cfg(feature = "torch")]
mod training {
    use super::{ON_INPUT, WEIGHT};
    use crate::algo::training::{add_gradients, Begin, Init, Layer, Parameter, Pass, Rule, Trainable};
    use crate::error::Result;
    use tch::Tensor;

    pub(in crate::algo) const BEGIN: Begin =
        Begin { names: &["ia3", "(ia)^3"], new: |layer, rule, _| Ok(Box::new(Training::new(layer, rule))) };

    /// An (IA)^3 module in training.
    #[derive(Debug)]
    struct Training {
        weight: Vec<usize>,
        axis: usize,
    }

    impl Training {
        fn new(layer: &Layer, rule: &Rule) -> Self {
            Training { weight: layer.weight.clone(), axis: usize::from(rule.train_on_input) }
        }
    }

    impl Trainable for Training {
        fn name(&self) -> &'static str {
            "(IA)^3"
        }

        fn constants(&self) -> Vec<(&'static str, f64)> {
            vec![(ON_INPUT, self.axis as f64)]
        }

        fn parameters(&self) -> Vec<Parameter> {
            let count = self.weight[self.axis];
            let shape = match self.weight.len() {
                2 => vec![count],
                axes => [&[1, count], &vec![1; axes - 2][..]].concat(),
            };
            vec![Parameter::new(WEIGHT, &shape, Init::ZEROS)]
        }

        fn needs_weight(&self) -> bool {
            true
        }

        fn delta(&self, pass: &Pass) -> Result<Tensor> {
            let mut shape = vec![1; self.weight.len()];
            shape[self.axis] = -1;
            Ok(pass.base()?.f_mul(&pass.parameters[0].f_reshape(shape)?)?)
        }

        fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor> {
            let (layer, w) = (pass.layer, pass.parameters[0].f_flatten(0, -1)?);
            pass.dropped(match self.axis {
                0 => {
                    let y = layer.apply(x, pass.base()?)?;
                    y.f_mul(&w.f_reshape(layer.channels(&y))?)?
                }
                _ => {
                    // Every group has the same factors.
                    let mut shape = vec![1; self.weight.len() - 1];
                    shape[0] = -1;
                    let w = w.f_repeat([layer.groups()])?.f_reshape(shape)?;
                    layer.apply(&x.f_mul(&w)?, pass.base()?)?
                }
            })
        }

        fn accumulate(
            &self,
            pass: &Pass,
            x: &Tensor,
            grad_y: &Tensor,
            want_input: bool,
            into: &[Tensor],
        ) -> Result<Option<Tensor>> {
            if self.axis != 1 || !pass.linear() {
                return add_gradients(self.backward(pass, x, grad_y, want_input)?, into);
            }
            // One product; differentiating `forward` would compute its output once more for nothing.
            let scaled = grad_y.f_matmul(pass.base()?)?;
            let rows = scaled.f_mul(x)?.f_reshape([-1, pass.shape()[1]])?;
            let sum = rows.f_sum_dim_intlist(&[0i64][..], false, into[0].f_kind()?)?;
            let _ = into[0].shallow_clone().f_add_(&sum)?;
            want_input.then(|| Ok(scaled.f_mul(&pass.parameters[0])?)).transpose()
        }
    }
}
