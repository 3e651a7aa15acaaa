//! Full difference: `dW = diff`, in the shape of the weight. LyCORIS `full`, and what extraction tools write where a low rank would not do.
//!
//! A difference of the bias (`diff_b`) beside it makes the module unsupported: this version changes weights only.

use super::{required, Algorithm, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::{Dense, Op};
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

    fn rank(&self) -> Option<usize> {
        None
    }

    fn alpha(&self) -> Option<f32> {
        None
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Op> {
        super::fit(module, self.diff.shape(), target)?;
        let rows = target.first().copied().unwrap_or(1);
        Ok(Op::Dense(Dense { diff: super::matrix(module, &self.diff, rows)? }))
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![(DIFF, &self.diff)]
    }
}
