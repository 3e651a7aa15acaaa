//! A network's adapter: written in kohya's form with its metadata, given as a snapshot in memory, read to go on from any that fits.

use super::metadata::{hashes, Stored};
use super::modules::Known;
use super::network::{file_name, train, Built, Network};
use super::params::to_host;
use crate::adapter::safetensors::Writer;
use crate::adapter::Adapter;
use crate::adapter::KeyStatus;
use crate::algo::training::family;
use crate::dtype::{Dtype, Float};
use crate::error::{Error, FileFault, Result};
use crate::view::Tensor;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

/// Relative difference up to which two alphas are the same number: bf16 keeps no more.
const ALPHA_TOLERANCE: f64 = 1.0 / 256.0;

impl Network {
    /// Writes the adapter. `added` is added to the metadata of the network and of its configuration, and wins over both. With `ema` the
    /// values are those of the average.
    pub fn save(&self, path: &Path, dtype: Float, added: &BTreeMap<String, String>, ema: bool) -> Result<()> {
        let steps = self.settled_steps()?;
        write(path, self.tensors(dtype, steps, ema)?, self.metadata(added, steps, None))
    }

    /// [`Network::save`] of the adapter cut to its first `rank` ranks, as [`Adapter::prefix`] cuts it.
    pub(super) fn save_prefix(&self, rank: usize, path: &Path, dtype: Float, ema: bool) -> Result<()> {
        let steps = self.settled_steps()?;
        let whole = in_memory(self.tensors(dtype, steps, ema)?, BTreeMap::new())?;
        let stored = |(key, tensor, bytes): (String, &Tensor, &[u8])| {
            (key, tensor.dtype(), tensor.shape().to_vec(), bytes.to_vec())
        };
        let mut tensors: Vec<Stored> = whole.prefix(rank)?.tensors()?.into_iter().map(stored).collect();
        sort(&mut tensors);
        write(path, tensors, self.metadata(&BTreeMap::new(), steps, Some(rank)))
    }

    /// The adapter that `save` would write now, in the configured precision, as if it were read from that file. It has its own memory:
    /// training goes on and the snapshot stays.
    pub fn adapter(&self) -> Result<Arc<Adapter>> {
        let steps = self.settled_steps()?;
        let tensors = self.tensors(self.config.saving.precision, steps, false)?;
        in_memory(tensors, self.metadata(&BTreeMap::new(), steps, None))
    }

    /// Every tensor of the adapter after `steps` updates, in the order of its file.
    fn tensors(&self, dtype: Float, steps: u64, ema: bool) -> Result<Vec<Stored>> {
        let built = self.built()?;
        let params = &built.params;
        let averaged = match (ema, steps) {
            (true, _) => Some(self.ema()?.shallow_clone()),
            (false, 0) => None,
            (false, _) => tch::no_grad(|| built.optimizer.averaged(params.master()))?,
        };
        let values = to_host(averaged.as_ref().unwrap_or(params.master()))?;
        let mut tensors: Vec<Stored> = Vec::new();
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
        sort(&mut tensors);
        Ok(tensors)
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
            if family(kind) != family(ours) {
                problems.push(format!("`{name}` is {kind}, this network trains {ours}"));
                continue;
            }
            let mut tensors = source.algorithm.tensors();
            for (slot, ours) in module.algorithm.constants() {
                let at = tensors.iter().position(|(name, _)| *name == slot);
                let theirs = at.and_then(|at| tensors.swap_remove(at).1.scalar());
                if slot == "alpha" && theirs.is_some() && source.algorithm.alpha().is_none() {
                    // It has no meaning for what was read: LoKr without a rank.
                    continue;
                }
                let theirs = theirs.unwrap_or(0.0);
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

/// Larger elements first, then by name: every tensor is aligned, as in the files of the safetensors library.
fn sort(tensors: &mut [Stored]) {
    tensors.sort_unstable_by(|a, b| b.1.bitsize().cmp(&a.1.bitsize()).then_with(|| a.0.cmp(&b.0)));
}

/// The adapter of these tensors, as if it were read from a file.
fn in_memory(tensors: Vec<Stored>, metadata: BTreeMap<String, String>) -> Result<Arc<Adapter>> {
    let tensor = |(key, dtype, shape, bytes): Stored| {
        let other = || Error::Backend(format!("`{key}`: {dtype} of shape {shape:?} has other bytes"));
        Ok((key.clone(), Tensor::of_vec(bytes, dtype, &shape).ok_or_else(other)?))
    };
    Adapter::of_tensors(tensors.into_iter().map(tensor).collect::<Result<_>>()?, metadata)
}

/// Writes an adapter file, with its hashes.
fn write(path: &Path, tensors: Vec<Stored>, mut metadata: BTreeMap<String, String>) -> Result<()> {
    metadata.extend(hashes(&tensors, &metadata)?);
    let (header, bodies): (Vec<_>, Vec<_>) = tensors.into_iter().map(|(k, d, s, b)| ((k, d, s), b)).unzip();
    let mut writer = Writer::create(path, &header, &metadata)?;
    bodies.iter().try_for_each(|body| writer.write(body))?;
    writer.finish()
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
