//! A set of modules in training, driven by the host: it calls `forward` and `backward` per layer from its own graph, then `step`.

use super::config::Config;
use super::init;
use super::optim::{Layout, Optimizer};
use super::params::{Params, Plan};
use crate::algo::{lora, Parameter, Trainable};
use crate::error::{Error, Result};
use crate::merge::bypass;
use crate::merge::bypass::Geometry;
use std::collections::HashMap;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Prefixes that a name has when it already stands as in a kohya file.
const KOHYA_PREFIXES: [&str; 4] = ["lora_unet_", "lora_te", "lora_prior_", "lycoris_"];
/// What hosts put before a diffusion model's own names; kohya's names leave it out.
const HOST_PREFIXES: [&str; 3] = ["model.diffusion_model.", "diffusion_model.", "unet."];

/// One adapted weight in training.
pub(super) struct Module {
    /// As in the file.
    pub(super) name: String,
    /// Shape of the weight.
    pub(super) weight: Vec<usize>,
    geometry: Geometry,
    pub(super) algorithm: Box<dyn Trainable>,
    pub(super) parameters: Vec<Parameter>,
    /// Its parameters in the flat store; empty before `build`.
    pub(super) range: Range<usize>,
}

/// What [`Network::step`] did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Updates done so far, this one included.
    pub step: u64,
    /// Learning rate of this update; in the middle of an accumulation that of the coming one.
    pub learning_rate: f64,
    /// Norm of the averaged gradient before clipping; 0 in the middle of an accumulation.
    pub grad_norm: f64,
    /// Whether the parameters changed; false in the middle of an accumulation.
    pub updated: bool,
}

/// Modules, their parameters, and everything that changes them.
///
/// Modules are registered, then [`Network::build`] allocates. One thread at a time; different threads may take turns.
pub struct Network {
    pub(super) config: Config,
    pub(super) modules: Vec<Module>,
    names: HashMap<String, usize>,
    pub(super) built: Option<Built>,
    pub(super) steps: u64,
    /// Calls of `step` since the last update.
    pub(super) micro: u64,
    /// Whether the gradient may be other than zero.
    pub(super) dirty: bool,
}

/// What exists after `build`.
pub(super) struct Built {
    pub(super) params: Params,
    pub(super) optimizer: Box<dyn Optimizer>,
    device: Device,
}

impl Network {
    /// An empty network.
    pub fn new(config: Config) -> Result<Self> {
        Ok(Network {
            config,
            modules: Vec::new(),
            names: HashMap::new(),
            built: None,
            steps: 0,
            micro: 0,
            dirty: false,
        })
    }

    /// Registers a weight and gives the module's index. `name` is either as in a kohya file (`lora_unet_..`, `lora_te1_..`) or the
    /// dotted name of a weight or layer of the diffusion model, which becomes `lora_unet_` and the name with underscores.
    pub fn add_module(&mut self, name: &str, weight_shape: &[usize], geometry: Geometry) -> Result<usize> {
        if self.built.is_some() {
            let hint = "register every module before build";
            return Err(train(
                format!("`{name}` comes after build: the parameters are already allocated"),
                hint,
            ));
        }
        let file_name = file_name(name);
        if file_name.ends_with('_') || file_name.contains(|c: char| c.is_control() || c.is_whitespace()) {
            return Err(Error::argument(
                format!("`{name}` is no name of a module"),
                "pass the weight's name in the model",
            ));
        }
        if let Some(&other) = self.names.get(&file_name) {
            let what = format!("`{name}` is registered already, as module {other}: `{file_name}` can stand in a file only once");
            return Err(Error::argument(what, "register each weight once"));
        }
        let c = &self.config;
        let large_kernel = weight_shape.iter().skip(2).any(|&k| k != 1);
        let (rank, alpha) =
            if large_kernel { (c.conv_dim, c.conv_alpha) } else { (c.network_dim, c.network_alpha) };
        let algorithm: Box<dyn Trainable> =
            Box::new(lora::Training::new(&file_name, weight_shape, &geometry, rank, alpha)?);
        let (parameters, weight) = (algorithm.parameters(), weight_shape.to_vec());
        self.names.insert(file_name.clone(), self.modules.len());
        self.modules.push(Module { name: file_name, weight, geometry, algorithm, parameters, range: 0..0 });
        Ok(self.modules.len() - 1)
    }

    /// Number of modules.
    pub fn modules(&self) -> usize {
        self.modules.len()
    }

    /// Number of trained values; the flat buffers are a little longer, since parameters begin at aligned offsets.
    pub fn parameter_count(&self) -> usize {
        let counts =
            self.modules.iter().flat_map(|m| &m.parameters).map(|p| p.shape.iter().product::<usize>());
        counts.fold(0, usize::saturating_add)
    }

    /// The options.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Allocates parameters, gradient and optimizer state on `device`. No module can be added after it.
    pub fn build(&mut self, device: Device) -> Result<()> {
        if self.built.is_some() {
            return Err(train("the network is built already", "make a new network for another device"));
        }
        if self.modules.is_empty() {
            return Err(train("the network has no modules", "register the weights to train, then build"));
        }
        // In the order of names, so that the layout does not depend on the order in which a host walks its model.
        let (mut plan, mut owners, mut ranges) =
            (Plan::new(self.config.optimizer.alignment()), Vec::new(), vec![0..0; self.modules.len()]);
        for index in self.by_name() {
            let first = owners.len();
            for parameter in &self.modules[index].parameters {
                plan.push(&parameter.shape)?;
                owners.push((index, parameter));
            }
            ranges[index] = first..owners.len();
        }
        let seed = self.config.seed;
        let params = Params::new(plan, device, self.config.mixed_precision, |i, values| {
            let (module, parameter) = owners[i];
            init::fill(values, parameter.init, seed, &self.modules[module].name, parameter.slot);
        })?;
        let length = params.master().size().iter().product::<i64>() as usize;
        let layout = Layout {
            segments: params.segments().to_vec(),
            groups: vec![(0..length, 1.0)],
            learning_rate: self.config.schedule().base,
        };
        let optimizer = tch::no_grad(|| self.config.optimizer.build(&layout, params.master()))?;
        self.modules.iter_mut().zip(ranges).for_each(|(module, range)| module.range = range);
        self.built = Some(Built { params, optimizer, device });
        Ok(())
    }

    /// `y += the module's output for x`, in place; y is rounded once. No graph is recorded.
    pub fn forward(&self, module: usize, x: &Tensor, y: &Tensor) -> Result<()> {
        let (built, m) = (self.built()?, self.module(module)?);
        built.check(m, x, y)?;
        tch::no_grad(|| {
            let delta = m.algorithm.forward(built.params.leaves(m.range.clone()), &built.input(x)?)?;
            let _ = y.f_detach()?.f_add_(&delta)?;
            Ok(())
        })
    }

    /// Adds the gradients that `grad_y` causes: of the parameters into the flat gradient, of the input into `grad_x` when it is given.
    /// Computes the module again from `x`, so nothing is kept between forward and backward.
    pub fn backward(
        &mut self,
        module: usize,
        x: &Tensor,
        grad_y: &Tensor,
        grad_x: Option<&Tensor>,
    ) -> Result<()> {
        let (built, m) = (self.built()?, self.module(module)?);
        built.check(m, x, grad_y)?;
        if let Some(grad_x) = grad_x {
            built.check(m, grad_x, grad_y)?;
        }
        let range = m.range.clone();
        let gradients = tch::no_grad(|| {
            let (x, grad_y) = (built.input(x)?, built.input(grad_y)?);
            m.algorithm.backward(built.params.leaves(range.clone()), &x, &grad_y, grad_x.is_some())
        })?;
        tch::no_grad(|| {
            if let (Some(to), Some(gradient)) = (grad_x, &gradients.input) {
                let _ = to.f_detach()?.f_add_(gradient)?;
            }
            self.dirty = true;
            let params = &mut self.built_mut()?.params;
            range.zip(&gradients.parameters).try_for_each(|(i, gradient)| params.accumulate(i, gradient))
        })
    }

    /// Ends a micro-batch. Every `gradient_accumulation_steps` calls it averages and clips the gradient, updates the parameters and
    /// zeroes the gradient; only then it waits for the device, to learn the norm.
    ///
    /// A gradient that is not finite is an error and changes nothing: `zero_gradients` skips it, stopping keeps the last good values.
    pub fn step(&mut self) -> Result<Step> {
        let (every, max_norm) = (self.config.gradient_accumulation_steps, self.config.max_grad_norm);
        let (steps, micro) = (self.steps, self.micro);
        let learning_rate = self.config.schedule().learning_rate(steps);
        let built = self.built_mut()?;
        if micro + 1 < every {
            self.micro += 1;
            return Ok(Step { step: steps, learning_rate, grad_norm: 0.0, updated: false });
        }
        let average = 1.0 / every as f64;
        let grad_norm = built.params.gradient_norm()? * average;
        if !grad_norm.is_finite() {
            return Err(train(
                format!("the gradient of step {} is not finite (norm {grad_norm}); nothing was changed", steps + 1),
                "call zero_gradients to skip it; if it stays: lower the learning rate, prefer bf16 to fp16, look for NaN in the data",
            ));
        }
        // torch.nn.utils.clip_grad_norm_ has the same 1e-6.
        let clip = if max_norm > 0.0 { (max_norm / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        tch::no_grad(|| {
            let (master, gradient) = built.params.update();
            if average * clip != 1.0 {
                let _ = gradient.f_mul_scalar_(average * clip)?;
            }
            built.optimizer.step(master, gradient, learning_rate, steps + 1)?;
            built.params.zero_gradient()?;
            built.params.refresh()
        })?;
        (self.steps, self.micro, self.dirty) = (steps + 1, 0, false);
        Ok(Step { step: self.steps, learning_rate, grad_norm, updated: true })
    }

    /// Throws the gradient away, and with it what was accumulated since the last update.
    pub fn zero_gradients(&mut self) -> Result<()> {
        self.built_mut()?.params.zero_gradient()?;
        (self.micro, self.dirty) = (0, false);
        Ok(())
    }

    /// Makes forward and backward see what the host wrote into [`Network::parameters`].
    pub fn refresh(&mut self) -> Result<()> {
        self.built_mut()?.params.refresh()
    }

    /// Updates done so far, and calls of `step` since the last one (in the middle of an accumulation).
    pub fn progress(&self) -> (u64, u64) {
        (self.steps, self.micro)
    }

    /// All parameters in fp32, flat; parameters begin at aligned offsets with zeros between them.
    pub fn parameters(&self) -> Result<&Tensor> {
        Ok(self.built()?.params.master())
    }

    /// The gradient in fp32, flat, laid out as [`Network::parameters`]: the sum since the last update. An all-reduce over several
    /// processes may change it in place before `step`.
    pub fn gradients(&self) -> Result<&Tensor> {
        Ok(self.built()?.params.gradient())
    }

    /// Module indices in the order of their names.
    pub(super) fn by_name(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.modules.len()).collect();
        order.sort_unstable_by(|&a, &b| self.modules[a].name.cmp(&self.modules[b].name));
        order
    }

    /// The module of this name, as in a file.
    pub(super) fn find(&self, file_name: &str) -> Option<&Module> {
        self.names.get(file_name).map(|&index| &self.modules[index])
    }

    pub(super) fn built(&self) -> Result<&Built> {
        self.built.as_ref().ok_or_else(not_built)
    }

    pub(super) fn built_mut(&mut self) -> Result<&mut Built> {
        self.built.as_mut().ok_or_else(not_built)
    }

    fn module(&self, index: usize) -> Result<&Module> {
        self.modules.get(index).ok_or_else(|| {
            Error::argument(format!("module {index} does not exist; there are {}", self.modules.len()), "")
        })
    }
}

impl Built {
    /// Shapes, dtypes and devices of a layer's input and output (or of their gradients).
    fn check(&self, module: &Module, x: &Tensor, y: &Tensor) -> Result<()> {
        let shape = |t: &Tensor| t.size().into_iter().map(|d| d as usize).collect::<Vec<_>>();
        bypass::Layout::check(&module.name, &module.weight, &module.geometry, &shape(x), &shape(y))?;
        for tensor in [x, y] {
            let kind = tensor.f_kind()?;
            if !matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16) {
                let (tensor, got) = (module.name.clone(), format!("{kind:?}"));
                return Err(Error::Dtype { tensor, got, supported: "F32, F16, BF16" });
            }
            if tensor.device() != self.device {
                let what = format!(
                    "`{}`: a tensor is on {:?}, the network on {:?}",
                    module.name,
                    tensor.device(),
                    self.device
                );
                return Err(Error::Device { what, hint: "build the network on the model's device".into() });
            }
        }
        Ok(())
    }

    /// A tensor of the host, without its graph, in the compute dtype.
    fn input(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.f_detach()?.f_to_kind(self.params.compute()?)?)
    }
}

/// The name under which a module stands in a kohya file.
pub(super) fn file_name(name: &str) -> String {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    if KOHYA_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
        return name.replace('.', "_");
    }
    let inner = HOST_PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name);
    format!("lora_unet_{}", inner.replace('.', "_"))
}

/// Training cannot go on.
pub(super) fn train(what: impl Into<String>, hint: impl Into<String>) -> Error {
    Error::Train { what: what.into(), hint: hint.into() }
}

fn not_built() -> Error {
    train("the network is not built", "register the modules and call build first")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_those_of_a_kohya_file() {
        for (name, want) in [
            ("lora_unet_mid_block_attentions_0_proj_in", "lora_unet_mid_block_attentions_0_proj_in"),
            ("lora_te1_text_model.encoder.layers.0.mlp.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
            ("diffusion_model.input_blocks.4.1.proj_in.weight", "lora_unet_input_blocks_4_1_proj_in"),
            ("model.diffusion_model.out.2", "lora_unet_out_2"),
            ("double_blocks.0.img_attn.qkv", "lora_unet_double_blocks_0_img_attn_qkv"),
        ] {
            assert_eq!(file_name(name), want);
        }
    }
}
