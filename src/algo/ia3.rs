//! (IA)^3: `W' = W o (1 + s * w)`, w along the output or the input channels.
//!
//! Liu et al. 2022, arXiv:2205.05638; LyCORIS' layout.
//!
//! | tensor | shape |
//! |---|---|
//! | `weight` | O or I values, for convolutions with axes of 1 around them |
//! | `on_input` | one number: 0 output, else input |

use super::{malformed, required, Algorithm, Group, Recipe};
use crate::error::{Error, Result};
use crate::merge::ops::{Op, Scale};
use crate::view::Tensor;

const WEIGHT: &str = "weight";
const ON_INPUT: &str = "on_input";

pub(super) const RECIPE: Recipe =
    Recipe { name: "(IA)^3", marks: &[ON_INPUT, WEIGHT], knows: &[WEIGHT, ON_INPUT], read };

/// One module.
#[derive(Debug)]
struct Ia3 {
    weight: Tensor,
    on_input: Tensor,
    axis: usize,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let weight = required(module, group, WEIGHT)?.clone();
    let Some(on_input) = group.get(ON_INPUT).cloned() else {
        return Err(malformed(module, format!("`{ON_INPUT}` is missing")));
    };
    if weight.shape().iter().filter(|&&d| d != 1).count() > 1 {
        return Err(malformed(module, format!("`{WEIGHT}` must be a vector, it is {:?}", weight.shape())));
    }
    let (on_input, flag) = super::number(module, ON_INPUT, &on_input)?;
    Ok(Box::new(Ia3 { weight, on_input, axis: usize::from(flag != 0.0) }))
}

impl Algorithm for Ia3 {
    fn name(&self) -> &'static str {
        "(IA)^3"
    }

    fn rank(&self) -> Option<usize> {
        None
    }

    fn alpha(&self) -> Option<f32> {
        None
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Op> {
        let count = self.weight.count();
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
        let v = super::matrix(module, &self.weight, count)?;
        let v = v.reshape(&[count]).ok_or_else(|| malformed(module, "a vector was expected"))?;
        Ok(Op::Scale(Scale { v, axis: self.axis }))
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![(WEIGHT, &self.weight), (ON_INPUT, &self.on_input)]
    }
}
