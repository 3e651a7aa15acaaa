//! Replacement: `W' = W + s * (set_weight - W)`, at strength 1 the given weight itself. ComfyUI's key for what Flux control LoRAs do to norms;
//! there the strength is ignored, here it moves between the two, so that 0 is the base.

use super::{required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::{Op, Replace};
use crate::view::Tensor;

const SET: &str = "set_weight";

pub(super) const RECIPE: Recipe = Recipe { name: "set", marks: &[SET], knows: &[SET, ALPHA], read };

/// One module.
#[derive(Debug)]
struct Set {
    value: Tensor,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    Ok(Box::new(Set { value: required(module, group, SET)?.clone() }))
}

impl Algorithm for Set {
    fn name(&self) -> &'static str {
        "set"
    }

    fn shape(&self) -> Option<Vec<usize>> {
        Some(self.value.shape().to_vec())
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        super::fit(module, self.value.shape(), target)?;
        let rows = target.first().copied().unwrap_or(1);
        Ok(vec![Op::Replace(Replace { value: super::matrix(module, &self.value, rows)? })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![(SET, &self.value)]
    }
}
