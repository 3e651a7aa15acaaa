//! `scale_weight_norms` of sd-scripts: after an update, every module whose norm of dW is above the bound is scaled down to it.

use super::network::{Built, Module, Network};
use super::params::Params;
use crate::algo::training::Pass;
use crate::error::Result;
use tch::{Kind, Tensor};

impl Network {
    /// Scales down what is too large, without waiting for the device; nothing where `updated` is 0. Modules whose dW has no factor stay as
    /// they are.
    pub(super) fn bound_norms(&mut self, most: f64, updated: Option<&Tensor>) -> Result<()> {
        let Network { built: Some(Built { params, .. }), modules, .. } = self else { return Ok(()) };
        tch::no_grad(|| {
            let one = Tensor::f_ones([0i64; 0], (Kind::Double, params.master().device()))?;
            for module in modules.iter() {
                shrink(module, params, most, updated, &one)?;
            }
            params.refresh()
        })
    }
}

/// `one` is the number, on the device.
fn shrink(module: &Module, params: &Params, most: f64, updated: Option<&Tensor>, one: &Tensor) -> Result<()> {
    let parameters = params.exact(module.range.clone());
    let pass = Pass {
        layer: &module.layer,
        parameters,
        weight: None,
        draw: None,
        ranks: None,
        compute: Kind::Float,
    };
    if module.algorithm.shrunk(one)?.is_none() {
        return Ok(());
    }
    // A norm of zero gives infinity, which is no reason to scale.
    let mut ratio = module.algorithm.norm(&pass)?.f_reciprocal()?.f_mul_scalar(most)?.f_clamp_max(1.0)?;
    if let Some(updated) = updated {
        ratio = ratio.f_where_self(&updated.f_gt(0.0)?, one)?;
    }
    for (parameter, factor) in parameters.iter().zip(module.algorithm.shrunk(&ratio)?.iter().flatten()) {
        let _ = parameter.shallow_clone().f_mul_(&factor.f_to_kind(Kind::Float)?)?;
    }
    Ok(())
}
