//! Full difference: `dW = diff`, in the shape of the weight. LyCORIS `full`, and what extraction tools write where a low rank would not do.

use super::{required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::Op;
use crate::view::Tensor;

const DIFF: &str = "diff";

// LyCORIS and sd-scripts write no alpha here; a stray one has no rank to divide by.
pub(super) const RECIPE: Recipe = Recipe { name: "full", marks: &[DIFF], knows: &[DIFF, ALPHA], read };

/// One module.
#[derive(Debug)]
struct Full {
    diff: Tensor,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    Ok(Box::new(Full { diff: required(module, group, DIFF)?.clone() }))
}

impl Algorithm for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn shape(&self) -> Option<Vec<usize>> {
        Some(self.diff.shape().to_vec())
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        Ok(vec![super::dense(module, &self.diff, target, 1.0)?])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![(DIFF, &self.diff)]
    }
}

#[cfg(feature = "torch")]
pub(super) use training::BEGIN;

/// The same formula in training, with the bias's difference beside it. LyCORIS trains the sum with the weight, which 16 bits round away.
#[cfg(feature = "torch")]
pub(super) mod training {
    use super::DIFF;
    use crate::algo::extras::BIAS;
    use crate::algo::training::{add_gradients, Begin, Init, Layer, Parameter, Pass, Trainable};
    use crate::error::Result;
    use crate::torch_ext::{product, Factor};
    use tch::Tensor;

    pub(in crate::algo) const BEGIN: Begin = Begin {
        names: &["full"],
        new: |layer, _, _| Ok(Box::new(Difference::new("full", [DIFF, BIAS], layer, &layer.weight[..1]))),
    };

    /// A weight's own difference in training, and its bias's.
    #[derive(Debug)]
    pub(in crate::algo) struct Difference {
        name: &'static str,
        parameters: Vec<Parameter>,
    }

    impl Difference {
        /// Under these names, for a bias of this shape.
        pub(in crate::algo) fn new(
            name: &'static str,
            [weight, bias]: [&'static str; 2],
            layer: &Layer,
            shape: &[usize],
        ) -> Self {
            let mut parameters = vec![Parameter::new(weight, &layer.weight, Init::ZEROS)];
            if layer.bias {
                parameters.push(Parameter::new(bias, shape, Init::ZEROS));
            }
            Difference { name, parameters }
        }
    }

    impl Trainable for Difference {
        fn name(&self) -> &'static str {
            self.name
        }

        fn parameters(&self) -> Vec<Parameter> {
            self.parameters.clone()
        }

        fn delta(&self, pass: &Pass) -> Result<Tensor> {
            Ok(pass.parameters[0].shallow_clone())
        }

        fn shift<'a>(&self, pass: &Pass<'a>) -> Option<&'a Tensor> {
            pass.parameters.get(1)
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
            // Straight into the gradient; differentiating `forward` would compute its output once more for nothing.
            product(&into[0], Factor(grad_y, true), Factor(x, false), 1.0, 1.0)?;
            if let Some(bias) = into.get(1) {
                let rows = grad_y.f_reshape([-1, pass.shape()[0]])?;
                let sum = rows.f_sum_dim_intlist(&[0i64][..], false, bias.f_kind()?)?;
                let _ = bias.shallow_clone().f_add_(&sum)?;
            }
            want_input.then(|| Ok(grad_y.f_matmul(&pass.parameters[0])?)).transpose()
        }
    }
}
