//! Norm layers: `w' = w + s * w_norm`, `b' = b + s * b_norm`. LyCORIS (`train_norm`).

use super::{required, Algorithm, Changes, Group, Recipe, ALPHA};
use crate::error::Result;
use crate::merge::ops::Op;
use crate::view::Tensor;

const WEIGHT: &str = "w_norm";
const BIAS: &str = "b_norm";

pub(super) const RECIPE: Recipe =
    Recipe { name: "norm", marks: &[WEIGHT, BIAS], knows: &[WEIGHT, BIAS, ALPHA], read };

/// One module; at least one of the two.
#[derive(Debug)]
struct Norm {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let get =
        |name: &str| group.get(name).is_some().then(|| required(module, group, name).cloned()).transpose();
    Ok(Box::new(Norm { weight: get(WEIGHT)?, bias: get(BIAS)? }))
}

impl Algorithm for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn shape(&self) -> Option<Vec<usize>> {
        self.weight.as_ref().map(|t| t.shape().to_vec())
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        self.weight.iter().map(|t| super::dense(module, t, target, 1.0)).collect()
    }

    fn lower_bias(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        self.bias.iter().map(|t| super::dense(module, t, target, 1.0)).collect()
    }

    fn changes(&self) -> Changes {
        Changes { weight: self.weight.is_some(), bias: self.bias.is_some() }
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let pairs = [(WEIGHT, &self.weight), (BIAS, &self.bias)];
        pairs.into_iter().filter_map(|(name, tensor)| Some((name, tensor.as_ref()?))).collect()
    }
}

/// The same formula in training.
#[cfg(feature = "torch")]
pub(super) const BEGIN: super::training::Begin = super::training::Begin {
    names: &["norm"],
    new: |layer, _, _| {
        let difference = super::full::training::Difference::new("norm", [WEIGHT, BIAS], layer, &layer.weight);
        Ok(Box::new(difference))
    },
};
