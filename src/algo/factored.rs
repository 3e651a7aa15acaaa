//! A module in training that is computed as a LoRA whose factors follow from other tensors, or from what was drawn.

use super::lora::training::Training as Lora;
use super::training::{evenly, Parameter, Pass, Trainable};
use crate::error::Result;
use std::fmt::Debug;
use tch::Tensor;

/// What differs between such modules.
pub(super) trait Factors: Debug + Send {
    /// See [`Trainable::name`].
    const NAME: &'static str;
    /// Whether dW is the product of all parameters.
    const PRODUCT: bool;

    /// Down and up of the LoRA, in the compute dtype; differentiable in the parameters.
    fn factors(&self, pass: &Pass) -> Result<[Tensor; 2]>;
}

/// The module. Rank and alpha are the LoRA's.
#[derive(Debug)]
pub(super) struct Factored<F> {
    pub(super) lora: Lora,
    pub(super) parameters: Vec<Parameter>,
    pub(super) source: F,
}

impl<F: Factors> Trainable for Factored<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn rank(&self) -> Option<usize> {
        self.lora.rank()
    }

    fn constants(&self) -> Vec<(&'static str, f64)> {
        self.lora.constants()
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.parameters.clone()
    }

    fn delta(&self, pass: &Pass) -> Result<Tensor> {
        self.lora.delta(&Pass { parameters: &self.source.factors(pass)?, ..*pass })
    }

    fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor> {
        self.lora.forward(&Pass { parameters: &self.source.factors(pass)?, ..*pass }, x)
    }

    fn add_forward(&self, pass: &Pass, x: &Tensor, y: &Tensor) -> Result<()> {
        self.lora.add_forward(&Pass { parameters: &self.source.factors(pass)?, ..*pass }, x, y)
    }

    fn accumulate(
        &self,
        pass: &Pass,
        x: &Tensor,
        grad_y: &Tensor,
        want_input: bool,
        into: &[Tensor],
    ) -> Result<Option<Tensor>> {
        self.lora.accumulate_through(&|| self.source.factors(pass), pass, (x, grad_y), want_input, into)
    }

    fn norm(&self, pass: &Pass) -> Result<Tensor> {
        self.lora.norm(&Pass { parameters: &self.source.factors(pass)?, ..*pass })
    }

    fn shrunk(&self, ratio: &Tensor) -> Result<Option<Vec<Tensor>>> {
        if F::PRODUCT {
            return evenly(ratio, self.parameters.len());
        }
        Ok(None)
    }
}
