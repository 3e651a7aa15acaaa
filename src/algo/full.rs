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
