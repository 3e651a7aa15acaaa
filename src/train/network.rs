//! A set of modules in training, driven by the host: it calls `forward` and `backward` per layer from its own graph, then `step`.

use super::config::Config;
use super::fused::Fused;
use super::init;
use super::keep::Run;
use super::metadata::Session;
use super::modules::Known;
use super::optim::{Layout, Optimizer};
use super::params::{Params, Plan};
use super::update::Step;
use crate::algo;
use crate::algo::draw::{Draw, Dropout};
use crate::algo::training::{Form, Layer, Parameter, Pass, Trainable};
use crate::error::{Error, Result};
use crate::merge::bypass::{self, Geometry};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Prefixes that a name has when it already stands as in a kohya file.
const KOHYA_PREFIXES: [&str; 4] = ["lora_unet_", "lora_te", "lora_prior_", "lycoris_"];
/// What hosts put before a diffusion model's own names; kohya's names leave it out.
const HOST_PREFIXES: [&str; 3] = ["model.diffusion_model.", "diffusion_model.", "unet."];

/// One adapted weight in training.
pub(super) struct Module {
    /// As in the file.
    pub(super) name: String,
    pub(super) layer: Layer,
    pub(super) algorithm: Box<dyn Trainable>,
    pub(super) parameters: Vec<Parameter>,
    /// Its parameters in the flat store; empty before `build`.
    pub(super) range: Range<usize>,
    dropout: Dropout,
    /// Of its random choices.
    stream: u64,
    /// Factors of the learning rate: of most parameters, of those that LoRA+ raises.
    rates: (f64, f64),
    /// How the layer slides, for the check of shapes; `None` for norms.
    geometry: Option<Geometry>,
}

impl Module {
    /// The factor of a parameter's learning rate.
    fn rate(&self, parameter: &Parameter) -> f64 {
        match parameter {
            p if p.frozen => 0.0,
            p if p.plus => self.rates.1,
            _ => self.rates.0,
        }
    }
}

/// Modules, their parameters, and everything that changes them.
///
/// Modules are registered, then [`Network::build`] allocates. One thread at a time; different threads may take turns.
pub struct Network {
    pub(super) config: Config,
    pub(super) modules: Vec<Module>,
    names: HashMap<String, usize>,
    /// The modules of `network_weights` by their names, where the options take ranks from them.
    known: Option<HashMap<String, Known>>,
    pub(super) built: Option<Built>,
    pub(super) steps: u64,
    /// Calls of `step` since the last update.
    pub(super) micro: u64,
    /// Whether the gradient may be other than zero.
    pub(super) dirty: bool,
    evaluating: bool,
    /// What the last update did; where updates are fused, the device knows.
    pub(super) last: Step,
    /// Updates that were left out and not yet told, likewise.
    pub(super) skipped: u64,
    /// See [`Network::hold`].
    pub(super) held: bool,
    pub(super) run: Run,
    pub(super) session: Session,
}

/// What exists after `build`.
pub(super) struct Built {
    pub(super) params: Params,
    pub(super) optimizer: Box<dyn Optimizer>,
    /// The average of the parameters, if one is kept.
    pub(super) ema: Option<Tensor>,
    /// What does the updates, instead of `optimizer`, where it can.
    pub(super) fused: Option<Fused>,
    pub(super) device: Device,
    /// The number of the micro-step, i64, on the device: what random choices depend on. `None` where nothing is left to chance.
    pub(super) draws: Option<Tensor>,
    /// See [`Network::set_ranks`].
    pub(super) ranks: Option<Tensor>,
}

impl Network {
    /// An empty network.
    pub fn new(config: Config) -> Result<Self> {
        let known = match &config.network_weights {
            Some(path) if config.dim_from_weights => Some(super::file::modules_of(Path::new(path))?),
            _ => None,
        };
        Ok(Network {
            known,
            session: Session::new(&config.to_json().to_string()),
            run: Run::default(),
            config,
            modules: Vec::new(),
            names: HashMap::new(),
            built: None,
            steps: 0,
            micro: 0,
            dirty: false,
            evaluating: false,
            last: Step::default(),
            skipped: 0,
            held: false,
        })
    }

    /// Registers a Linear layer or convolution; see [`Network::add_layer`].
    #[cfg(test)]
    pub fn add_module(
        &mut self,
        name: &str,
        weight_shape: &[usize],
        geometry: Geometry,
    ) -> Result<Option<usize>> {
        let layer = Layer::sliding(name, weight_shape, &geometry, false)?;
        self.add_layer(layer, Some(geometry), None)
    }

    /// Registers a layer and gives the module's index, or `None` where the options leave it out. The layer's name is either as in a kohya
    /// file (`lora_unet_..`, `lora_te1_..`) or the dotted name of a weight or layer of the diffusion model, which becomes `lora_unet_` and
    /// the name with underscores. `weight` is the layer's own, for algorithms that start from it.
    pub fn add_layer(
        &mut self,
        layer: Layer,
        geometry: Option<Geometry>,
        weight: Option<&Tensor>,
    ) -> Result<Option<usize>> {
        let name = &layer.name;
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
        let Some(mut chosen) = self.config.modules.of([name, &file_name]).choose(&layer) else {
            return Ok(None);
        };
        if let Some(known) = &self.known {
            let Some(known) = known.get(&file_name) else { return Ok(None) };
            chosen = chosen.known(known);
        }
        let weight = weight.map(|w| tch::no_grad(|| w.f_to_kind(Kind::Float))).transpose()?;
        let algorithm = tch::no_grad(|| algo::begin(chosen.begin, &layer, &chosen.rule, weight.as_ref()))?;
        let text_encoder = file_name.starts_with("lora_te");
        let (rate, plus) = self.config.rates.factors(text_encoder, self.config.schedule().base);
        let module = Module {
            parameters: algorithm.parameters(),
            stream: init::key(self.config.seed, &file_name, "random"),
            name: file_name.clone(),
            layer,
            algorithm,
            range: 0..0,
            dropout: chosen.dropout,
            rates: (rate * chosen.rate, plus * chosen.rate),
            geometry,
        };
        self.names.insert(file_name, self.modules.len());
        self.modules.push(module);
        Ok(Some(self.modules.len() - 1))
    }

    /// Whether a module's forward and backward need the layer's weight.
    pub fn needs_weight(&self, module: usize) -> Result<bool> {
        Ok(self.module(module)?.algorithm.needs_weight())
    }

    /// Leaves nothing to chance in forward and backward from here on, or does so again.
    pub fn evaluate(&mut self, evaluating: bool) {
        self.evaluating = evaluating;
    }

    /// From here on T-LoRA computes with the first `share` of its ranks, above 0 and up to 1, in forward and backward. The number is on the
    /// device: a CUDA graph that was captured after the first call sees the later ones.
    pub fn set_ranks(&mut self, share: f64) -> Result<()> {
        if !(share > 0.0 && share <= 1.0) {
            return Err(Error::argument(
                format!("a share of {share} of the ranks"),
                "pass a number above 0, up to 1",
            ));
        }
        let built = self.built_mut()?;
        tch::no_grad(|| {
            match &mut built.ranks {
                Some(ranks) => drop(ranks.f_fill_(share)?),
                empty => *empty = Some(Tensor::f_full([0i64; 0], share, (Kind::Float, built.device))?),
            }
            Ok(())
        })
    }

    /// Number of modules.
    pub fn modules(&self) -> usize {
        self.modules.len()
    }

    /// Number of trained values; the flat buffers are a little longer, since parameters begin at aligned offsets.
    pub fn parameter_count(&self) -> usize {
        let counts = self.modules.iter().flat_map(|m| &m.parameters).map(Parameter::count);
        counts.fold(0, usize::saturating_add)
    }

    /// The options.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Allocates parameters, gradient and optimizer state on `device`, and takes the values of `network_weights`. No module can be added after it.
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
            let (first, module) = (owners.len(), &self.modules[index]);
            for parameter in &module.parameters {
                plan.push(parameter, module.rate(parameter))?;
                owners.push((index, parameter));
            }
            ranges[index] = first..owners.len();
        }
        let groups = plan.place();
        let seed = self.config.seed;
        let params = Params::new(plan, device, self.config.mixed_precision, |i, values| {
            let (module, parameter) = owners[i];
            init::fill(values, &parameter.init, seed, &self.modules[module].name, parameter.slot);
        })?;
        let layout = Layout::new(params.segments(), groups, self.config.schedule().base);
        let optimizer = tch::no_grad(|| self.config.optimizer.build(&layout, params.master()))?;
        let ema = self.config.ema_decay.map(|_| params.master().f_detach_copy()).transpose()?;
        // What else changes the values after an update comes before the average.
        let within = ema.as_ref().filter(|_| self.config.scale_weight_norms.is_none());
        let fused = Fused::new(&self.config, &params, &*optimizer, within)?;
        self.modules.iter_mut().zip(ranges).for_each(|(module, range)| module.range = range);
        let draws = match self.config.modules.random() {
            false => None,
            true => Some(Tensor::f_zeros([0i64; 0], (Kind::Int64, device))?),
        };
        params.settle()?;
        self.built = Some(Built { params, optimizer, ema, fused, device, draws, ranks: None });
        if let Some(path) = self.config.network_weights.clone() {
            let loaded = self.load_weights(Path::new(&path));
            // Start values of another kind are none.
            loaded.inspect_err(|_| self.built = None)?;
        }
        Ok(())
    }

    /// `y += the module's output for x`, in place; y is rounded once. No graph is recorded. `weight` is the layer's own, for modules that
    /// need it.
    pub fn forward(&self, module: usize, x: &Tensor, weight: Option<&Tensor>, y: &Tensor) -> Result<()> {
        let (built, m) = (self.built()?, self.module(module)?);
        built.check(m, x, y)?;
        tch::no_grad(|| {
            let (weight, draw) = (built.weight(m, weight)?, self.draw(built, m));
            let pass = built.pass(m, weight.as_ref(), draw.as_ref())?;
            let x = built.input(x)?;
            if y.is_contiguous() {
                return m.algorithm.add_forward(&pass, &x, y);
            }
            let own = y.f_contiguous()?;
            m.algorithm.add_forward(&pass, &x, &own)?;
            y.shallow_clone().f_copy_(&own)?;
            Ok(())
        })
    }

    /// Adds the gradients that `grad_y` causes to the flat gradient, and gives that of the input, if it is wanted, in the compute dtype.
    /// Computes the module again from `x`, so nothing is kept between forward and backward.
    pub fn backward(
        &mut self,
        module: usize,
        x: &Tensor,
        weight: Option<&Tensor>,
        grad_y: &Tensor,
        want_input: bool,
    ) -> Result<Option<Tensor>> {
        let (built, m) = (self.built()?, self.module(module)?);
        built.check(m, x, grad_y)?;
        let input = tch::no_grad(|| {
            let (x, mut grad_y) = (built.input(x)?, built.input(grad_y)?);
            let (weight, draw) = (built.weight(m, weight)?, self.draw(built, m));
            if let Some(draw) = &draw {
                grad_y = draw.module(grad_y)?;
            }
            let pass = built.pass(m, weight.as_ref(), draw.as_ref())?;
            m.algorithm.accumulate(&pass, &x, &grad_y, want_input, built.params.gradients(m.range.clone()))
        })?;
        self.dirty = true;
        Ok(input)
    }

    /// Adds a gradient that [`Network::backward`] gave to a tensor of the host.
    pub fn add_input(&self, module: usize, to: &Tensor, gradient: &Tensor, grad_y: &Tensor) -> Result<()> {
        self.built()?.check(self.module(module)?, to, grad_y)?;
        let _ = tch::no_grad(|| to.shallow_clone().f_add_(gradient))?;
        Ok(())
    }

    /// A module's random choices in this micro-step.
    fn draw(&self, built: &Built, module: &Module) -> Option<Draw> {
        let draws = built.draws.as_ref().filter(|_| !self.evaluating)?;
        Some(Draw::new(draws, module.stream, module.dropout))
    }

    /// Throws the gradient away, and with it what was accumulated since the last update.
    pub fn zero_gradients(&mut self) -> Result<()> {
        self.built_mut()?.params.zero_gradient()?;
        (self.micro, self.dirty) = (0, false);
        Ok(())
    }

    /// Makes forward and backward see what the host wrote into [`Network::parameters`]; before the first update the average starts there.
    pub fn refresh(&mut self) -> Result<()> {
        let starts = self.settled_steps()? == 0;
        let Built { params, ema, .. } = self.built_mut()?;
        params.mend()?;
        if let Some(ema) = ema.as_mut().filter(|_| starts) {
            tch::no_grad(|| ema.f_copy_(params.master()))?;
        }
        params.refresh()
    }

    /// Updates done so far, and calls of `step` since the last one (in the middle of an accumulation). Waits for steps that were not
    /// waited for.
    pub fn progress(&self) -> Result<(u64, u64)> {
        Ok((self.settled_steps()?, self.micro))
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

    /// The average of the parameters, laid out as they are, if one is kept.
    pub fn ema(&self) -> Result<&Tensor> {
        let lacks = || train("the network keeps no average of its parameters", "set ema_decay in its config");
        self.built()?.ema.as_ref().ok_or_else(lacks)
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
    /// What a module computes from.
    fn pass<'a>(
        &'a self,
        m: &'a Module,
        weight: Option<&'a Tensor>,
        draw: Option<&'a Draw>,
    ) -> Result<Pass<'a>> {
        let (parameters, compute) = (self.params.leaves(m.range.clone()), self.params.compute());
        Ok(Pass { layer: &m.layer, parameters, weight, draw, ranks: self.ranks.as_ref(), compute })
    }

    /// The layer's own weight in the compute dtype, if the module needs it.
    fn weight(&self, m: &Module, weight: Option<&Tensor>) -> Result<Option<Tensor>> {
        let Some(weight) = weight.filter(|_| m.algorithm.needs_weight()) else { return Ok(None) };
        let shape: Vec<usize> = weight.size().into_iter().map(|d| d as usize).collect();
        if shape != m.layer.weight {
            return Err(Error::Shape {
                tensor: m.layer.name.clone(),
                what: "the layer's weight has another shape than at its registration".into(),
                expected: m.layer.weight.clone(),
                got: shape,
            });
        }
        self.placed(m, weight)?;
        Ok(Some(weight.f_to_kind(self.params.compute())?))
    }

    /// Shapes, dtypes and devices of a layer's input and output (or of their gradients).
    fn check(&self, module: &Module, x: &Tensor, y: &Tensor) -> Result<()> {
        let shape = |t: &Tensor| t.size().into_iter().map(|d| d as usize).collect::<Vec<_>>();
        let (xs, ys) = (shape(x), shape(y));
        match (&module.geometry, &module.layer.form) {
            (Some(geometry), _) => {
                bypass::Layout::check(&module.layer.name, &module.layer.weight, geometry, &xs, &ys)?;
            }
            (None, form) => {
                let weight = &module.layer.weight;
                let fits = match form {
                    Form::GroupNorm { .. } => xs.len() >= 2 && xs[1..2] == weight[..],
                    _ => xs.ends_with(weight),
                };
                if !fits || xs != ys {
                    let what = format!("input of a norm of {weight:?} beside its output");
                    return Err(Error::Shape {
                        tensor: module.layer.name.clone(),
                        what,
                        expected: xs,
                        got: ys,
                    });
                }
            }
        }
        [x, y].into_iter().try_for_each(|tensor| self.placed(module, tensor))
    }

    /// Dtype and device of a tensor of the host.
    fn placed(&self, module: &Module, tensor: &Tensor) -> Result<()> {
        let kind = tensor.f_kind()?;
        if !matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16) {
            let (tensor, got) = (module.layer.name.clone(), format!("{kind:?}"));
            return Err(Error::Dtype { tensor, got, supported: "F32, F16, BF16" });
        }
        if tensor.device() != self.device {
            let (name, device) = (&module.layer.name, tensor.device());
            let what = format!("`{name}`: a tensor is on {device:?}, the network on {:?}", self.device);
            return Err(Error::Device { what, hint: "build the network on the model's device".into() });
        }
        Ok(())
    }

    /// A tensor of the host in the compute dtype, row-major.
    fn input(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.f_to_kind(self.params.compute())?.f_contiguous()?)
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

pub(super) fn not_built() -> Error {
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
