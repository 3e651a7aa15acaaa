//! Optimizers, one file each. An optimizer sees one flat parameter and one flat gradient; modules do not exist here.

pub mod adamw;

use crate::error::Result;
use tch::Tensor;

/// The rule by which gradients become a change of the parameters.
pub trait Optimizer: Send {
    /// Its name in a configuration.
    fn name(&self) -> &'static str;
    /// One update of `master` in place; `step` counts from 1. `gradient` may be used as scratch and holds nothing useful afterwards.
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        step: u64,
    ) -> Result<()>;
    /// What a resume file must hold, by name, each as long as the parameters. Copying into these tensors restores the state.
    fn state(&self) -> Vec<(&'static str, &Tensor)>;
}
