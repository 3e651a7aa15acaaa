//! A network's adapter file: written in kohya's form with its metadata, read to go on from any adapter that fits.

use super::modules::Known;
use super::network::{file_name, train, Built, Network};
use super::params::to_host;
use crate::adapter::safetensors::Writer;
use crate::adapter::Adapter;
use crate::adapter::KeyStatus;
use crate::dtype::{Dtype, Float};
use crate::error::{Error, FileFault, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Relative difference up to which two alphas are the same number: bf16 keeps no more.
const ALPHA_TOLERANCE: f64 = 1.0 / 256.0;

impl Network {
    /// Writes the adapter. `metadata` is added to what the network knows and wins over it; `ss_base_model_version` in it also decides
    /// modelspec's architecture. With `ema` the values are those of the average.
    pub fn save(
        &self,
        path: &Path,
        dtype: Float,
        metadata: &BTreeMap<String, String>,
        ema: bool,
    ) -> Result<()> {
        let steps = self.settled_steps()?;
        let built = self.built()?;
        let params = &built.params;
        let averaged = match (ema, steps) {
            (true, _) => Some(self.ema()?.shallow_clone()),
            (false, 0) => None,
            (false, _) => tch::no_grad(|| built.optimizer.averaged(params.master()))?,
        };
        let values = to_host(averaged.as_ref().unwrap_or(params.master()))?;
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        let mut broken = Vec::new();
        for module in &self.modules {
            for (slot, number) in module.algorithm.constants() {
                // Always f32: a rounded alpha would scale the reloaded adapter otherwise than it was trained.
                let bytes = (number as f32).to_le_bytes().to_vec();
                tensors.push((format!("{}.{slot}", module.name), Dtype::F32, Vec::new(), bytes));
            }
            for (parameter, segment) in module.parameters.iter().zip(&params.segments()[module.range.clone()])
            {
                if !parameter.saved {
                    continue;
                }
                let values = segment.values(&values);
                let mut bytes = vec![0; values.len() * dtype.size()];
                dtype.write(&values, &mut bytes);
                let key = format!("{}.{}", module.name, parameter.slot);
                if !finite(dtype, &values, &bytes) {
                    broken.push(key.clone());
                }
                tensors.push((key, dtype.dtype(), parameter.shape.clone(), bytes));
            }
        }
        if let Some(first) = broken.first() {
            return Err(train(
                format!(
                    "{} tensors hold values that are not finite in {}; the first is `{first}`",
                    broken.len(),
                    dtype.dtype()
                ),
                "nothing was written; go back to an earlier state, or save in another dtype",
            ));
        }
        // Larger elements first, then by name: every tensor is aligned, as in the files of the safetensors library.
        tensors.sort_unstable_by(|a, b| b.1.bitsize().cmp(&a.1.bitsize()).then_with(|| a.0.cmp(&b.0)));
        let mut hash = Sha256::new();
        tensors.iter().for_each(|(.., bytes)| hash.update(bytes));
        let mut all = self.metadata(metadata.get("ss_base_model_version").map(String::as_str), steps);
        all.insert("sshs_model_hash".into(), format!("{:x}", hash.finalize()));
        all.extend(metadata.iter().map(|(k, v)| (k.clone(), v.clone())));
        let (header, bodies): (Vec<_>, Vec<_>) =
            tensors.into_iter().map(|(k, d, s, b)| ((k, d, s), b)).unzip();
        let mut writer = Writer::create(path, &header, &all)?;
        bodies.iter().try_for_each(|body| writer.write(body))?;
        writer.finish()
    }

    /// What sd-scripts and modelspec would say about this network; every value is text.
    fn metadata(&self, base: Option<&str>, steps: u64) -> BTreeMap<String, String> {
        let (c, options) = (&self.config, &self.config.modules.all);
        let schedule = c.schedule();
        let mut all: BTreeMap<&str, String> = BTreeMap::from([
            ("ss_network_module", "networks.lora".into()),
            ("ss_network_dim", options.rule.dim.to_string()),
            ("ss_network_alpha", options.rule.alpha.to_string()),
            ("ss_learning_rate", schedule.base.to_string()),
            ("ss_lr_scheduler", schedule.scheduler.name().into()),
            ("ss_lr_warmup_steps", schedule.warmup.to_string()),
            ("ss_max_train_steps", schedule.total.map_or("None".into(), |n| n.to_string())),
            ("ss_steps", steps.to_string()),
            ("ss_max_grad_norm", c.max_grad_norm.to_string()),
            ("ss_gradient_accumulation_steps", c.gradient_accumulation_steps.to_string()),
            ("ss_mixed_precision", c.precision_name().into()),
            ("ss_seed", c.seed.to_string()),
            ("ss_optimizer", c.optimizer.written()),
            ("modelspec.sai_model_spec", "1.0.1".into()),
            ("modelspec.title", c.output_name.clone().unwrap_or_else(|| "LoRA".into())),
        ]);
        if self.modules.iter().any(|m| m.layer.large_kernel()) {
            let args = json!({"conv_dim": options.conv_dim.to_string(), "conv_alpha": options.conv_alpha.to_string()});
            all.insert("ss_network_args", args.to_string());
        }
        if let Some(name) = &c.output_name {
            all.insert("ss_output_name", name.clone());
        }
        if let Some(comment) = &c.training_comment {
            all.insert("ss_training_comment", comment.clone());
        }
        const STABILITY: &str = "https://github.com/Stability-AI/generative-models";
        let spec = match base {
            Some("sd_v1") => Some(("stable-diffusion-v1/lora", "diffusers")),
            Some("sd_v2") => Some(("stable-diffusion-v2-512/lora", "diffusers")),
            Some("sd_v2_v") => Some(("stable-diffusion-v2-768-v/lora", "diffusers")),
            Some(name) if name.starts_with("sdxl_") => Some(("stable-diffusion-xl-v1-base/lora", STABILITY)),
            _ => None,
        };
        if let Some((architecture, implementation)) = spec {
            all.insert("modelspec.architecture", architecture.into());
            all.insert("modelspec.implementation", implementation.into());
        }
        all.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
    }

    /// Takes the values of an adapter file, in any dialect that can be read, and gives the number of modules that it had. Modules of
    /// the network that the file lacks keep their values. Anything in the file that does not fit is an error that lists all of it, and
    /// nothing is taken.
    pub fn load_weights(&mut self, path: &Path) -> Result<usize> {
        self.built()?;
        let started = self.settled_steps()? > 0;
        let adapter = Adapter::open(path)?;
        let mut problems = Vec::new();
        for key in adapter.keys() {
            match &key.status {
                KeyStatus::Readable => {}
                KeyStatus::Unsupported(why) | KeyStatus::Malformed(why) => {
                    problems.push(format!("`{}`: {why}", key.key))
                }
            }
        }
        let (mut taken, mut values) = (0, Vec::new());
        for source in adapter.modules() {
            let Some(module) = self.find(&file_name(&source.name)) else {
                problems.push(format!("`{}` is no module of this network", source.name));
                continue;
            };
            taken += 1;
            let (name, kind, ours) = (&source.name, source.algorithm.name(), module.algorithm.name());
            let family = |name: &str| name.replace("LoCon", "LoRA");
            if family(kind) != family(ours) {
                problems.push(format!("`{name}` is {kind}, this network trains {ours}"));
                continue;
            }
            let mut tensors = source.algorithm.tensors();
            for (slot, ours) in module.algorithm.constants() {
                let at = tensors.iter().position(|(name, _)| *name == slot);
                let theirs = at.and_then(|at| tensors.swap_remove(at).1.scalar()).unwrap_or(0.0);
                // A missing or zero alpha means the rank.
                let rank = source.algorithm.rank().filter(|_| slot == "alpha" && theirs == 0.0);
                let theirs = rank.map_or(theirs, |rank| rank as f64);
                if (theirs - ours).abs() > ALPHA_TOLERANCE * ours.abs() {
                    problems.push(format!("`{name}` has {slot} {theirs}, this network {ours}"));
                }
            }
            for (index, parameter) in module.range.clone().zip(&module.parameters).filter(|(_, p)| p.saved) {
                let Some(at) = tensors.iter().position(|(slot, _)| *slot == parameter.slot) else {
                    problems.push(format!("`{}` lacks `{}`", source.name, parameter.slot));
                    continue;
                };
                let (_, tensor) = tensors.swap_remove(at);
                if same_shape(tensor.shape(), &parameter.shape) {
                    values.push((index, tensor.to_f32(&source.name)?));
                } else {
                    let (slot, got, want) = (parameter.slot, tensor.shape(), &parameter.shape);
                    problems
                        .push(format!("`{}.{slot}` has shape {got:?}, this network {want:?}", source.name));
                }
            }
            let left = tensors
                .iter()
                .map(|(slot, _)| format!("`{}.{slot}` has no place in this network", source.name));
            problems.extend(left);
        }
        if !problems.is_empty() {
            let why = format!("does not fit this network: {}", problems.join("; "));
            return Err(Error::File { path: path.to_owned(), fault: FileFault::WrongKind { why } });
        }
        let Built { params, optimizer, ema, .. } = self.built_mut()?;
        values.iter().try_for_each(|(index, values)| params.set(*index, values))?;
        if started {
            tch::no_grad(|| optimizer.restart(params.master()))?;
        }
        // It begins anew there.
        ema.as_mut().map(|ema| tch::no_grad(|| ema.f_copy_(params.master()))).transpose()?;
        params.refresh()?;
        params.settle()?;
        Ok(taken)
    }
}

/// What an adapter file says about its modules, by their names in a network.
pub(super) fn modules_of(path: &Path) -> Result<HashMap<String, Known>> {
    let adapter = Adapter::open(path)?;
    let known = |source: &crate::adapter::Module| Known {
        algorithm: source.algorithm.name(),
        rank: source.algorithm.rank(),
        alpha: source.algorithm.alpha().map(f64::from),
    };
    Ok(adapter.modules().iter().map(|source| (file_name(&source.name), known(source))).collect())
}

/// Whether every value is finite, before and after rounding.
fn finite(dtype: Float, values: &[f32], bytes: &[u8]) -> bool {
    let mut rounded = vec![0f32; values.len()];
    dtype.read(bytes, &mut rounded);
    rounded.iter().all(|v| v.is_finite())
}

/// Equal but for axes of one at the end: a 1x1 convolution is a Linear layer.
fn same_shape(a: &[usize], b: &[usize]) -> bool {
    let longest = a.len().max(b.len());
    let at = |shape: &[usize], i: usize| shape.get(i).copied().unwrap_or(1);
    (0..longest).all(|i| at(a, i) == at(b, i))
}
