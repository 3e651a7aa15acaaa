//! Checkpoints, file to file: the base is streamed through, touched weights are merged on the way, everything else is copied as it is.
//!
//! Memory: the largest touched tensor, its factors, and a block of rows per thread, whatever the size of the file.

use super::ops::{Storage, Term};
use super::plan::{Binding, Bound, Rules, Strengths};
use super::{Prepared, Work};
use crate::adapter::safetensors::{Entry, File, Writer};
use crate::adapter::Adapter;
use crate::cuda::Stream;
use crate::dtype::{self, Dtype, Float};
use crate::error::{Error, Result};
use crate::names::Index;
use crate::progress::Progress;
use crate::report;
use crate::view::{Device, Slice, Tensor, View};
use serde_json::{json, Value};
use std::path::Path;
use std::sync::Arc;

/// What to merge into what.
pub struct Job<'a> {
    /// Any safetensors file.
    pub base: &'a Path,
    /// Adapters with their strengths.
    pub adapters: &'a [(Arc<Adapter>, Strengths)],
    /// Written whole or not at all; may be `base` itself.
    pub output: &'a Path,
    /// Dtype of the floating-point tensors in the output; `None` keeps each as it is.
    pub dtype: Option<Float>,
    /// Where to compute.
    pub device: Device,
    /// Whether adapters of another family of models are taken as far as they fit.
    pub other_families: bool,
}

/// Bytes copied between two looks at the cancel flag.
const BLOCK: usize = 8 << 20;

/// Runs the job and returns its report. Progress counts bytes of the output's tensors.
pub fn merge(job: &Job<'_>, progress: &mut Progress<'_>) -> Result<Value> {
    let base = File::open(job.base)?;
    // Only what can be computed is a target; the rest passes through.
    let targets: Vec<&Entry> = base.entries().iter().filter(|e| Float::wide(e.dtype).is_some()).collect();
    let shapes: Vec<(&str, &[usize])> = targets.iter().map(|e| (e.name.as_str(), &e.shape[..])).collect();
    let index = Index::new(&shapes);
    let rules = Rules { may_grow: true, other_families: job.other_families };
    let mut bindings = Vec::new();
    for (adapter, strengths) in job.adapters {
        strengths.check()?;
        bindings.push(Binding::new(adapter, &index, &shapes, rules)?);
    }
    // (binding, its module on a target, strength) of what is not switched off.
    let parts: Vec<(&Binding, &Bound, f64)> = bindings
        .iter()
        .zip(job.adapters)
        .flat_map(|(binding, (adapter, strengths))| {
            binding.bound.iter().map(move |bound| {
                let module = &adapter.modules()[bound.module].name;
                (binding, bound, strengths.of(module, bound.part))
            })
        })
        .filter(|(_, _, strength)| *strength != 0.0)
        .collect();
    let mut sizes: Vec<Vec<usize>> = targets.iter().map(|e| e.shape.clone()).collect();
    for (binding, bound, _) in &parts {
        let grown = binding.grown(bound.target).into_iter().flatten();
        sizes[bound.target].iter_mut().zip(grown).for_each(|(size, &to)| *size = to.max(*size));
    }
    let mut terms: Vec<Vec<Term<'_>>> = vec![Vec::new(); targets.len()];
    for (binding, bound, strength) in &parts {
        let (entry, size) = (targets[bound.target], &sizes[bound.target]);
        let own = binding.grown(bound.target).unwrap_or(&entry.shape);
        let slice = within(&entry.name, own, size, bound.slice)?;
        terms[bound.target].extend(bound.terms(*strength).map(|term| Term { slice, ..term }));
    }

    let out_dtype = |dtype: Dtype| match (job.dtype, Float::wide(dtype)) {
        (Some(wanted), Some(_)) => wanted.dtype(),
        _ => dtype,
    };
    let mut layout: Vec<(String, Dtype, Vec<usize>)> =
        base.entries().iter().map(|e| (e.name.clone(), out_dtype(e.dtype), e.shape.clone())).collect();
    let floats = layout.iter_mut().zip(base.entries()).filter(|(_, e)| Float::wide(e.dtype).is_some());
    floats.zip(&sizes).for_each(|(((_, _, shape), _), size)| shape.clone_from(size));
    let total: u64 = layout.iter().filter_map(|(_, d, s)| dtype::byte_len(*d, s)).map(|n| n as u64).sum();
    let mut metadata = base.metadata().clone();
    metadata.insert("lycore.merged".into(), recipe(metadata.get("lycore.merged"), job));

    let mut writer = Writer::create(job.output, &layout, &metadata)?;
    let (mut done, mut changed, mut next_target) = (0u64, 0usize, 0usize);
    let mut prepared = Prepared::default();
    let mut copied = Vec::new();
    progress.at(0, total)?;
    for (entry, (_, to, shape)) in base.entries().iter().zip(&layout) {
        let own_terms: &[Term<'_>] = if Float::wide(entry.dtype).is_some() {
            next_target += 1;
            &terms[next_target - 1]
        } else {
            &[]
        };
        if own_terms.is_empty() && *to == entry.dtype {
            copied.push(entry);
            for block in base.bytes(entry).chunks(BLOCK) {
                writer.write(block)?;
                done += block.len() as u64;
                progress.at(done, total)?;
            }
        } else {
            changed += usize::from(!own_terms.is_empty());
            let merged = merged(&base, entry, (*to, shape), own_terms, job.device, &mut prepared)?;
            for block in merged.chunks(BLOCK) {
                writer.write(block)?;
                done += block.len() as u64;
                progress.at(done, total)?;
            }
        }
        base.release(entry.begin, entry.end);
        // Nothing prepared for one weight serves another.
        prepared = Prepared::default();
    }
    writer.finish()?;
    let equal = prove_copies(&base, job.output, &copied)?;
    let reports: Vec<Value> =
        bindings.iter().zip(job.adapters).map(|(b, (a, _))| report::json(a, Some(b))).collect();
    Ok(json!({
        "base": job.base.display().to_string(),
        "output": job.output.display().to_string(),
        "device": job.device.to_string(),
        "tensors": {"changed": changed, "copied": layout.len() - changed},
        "bytes": total,
        "proven_equal": equal,
        "adapters": reports,
    }))
}

/// Reads the tensors that should be the base's from the output and compares every byte; their number.
fn prove_copies(base: &File, output: &Path, copied: &[&Entry]) -> Result<usize> {
    let written = File::open(output)?;
    for entry in copied {
        let same = written.get(&entry.name).is_some_and(|other| {
            let same = base.bytes(entry) == written.bytes(other);
            written.release(other.begin, other.end);
            same
        });
        if !same {
            let what =
                format!("{}: `{}` was copied and reads back differently", output.display(), entry.name);
            return Err(Error::Backend(what));
        }
        base.release(entry.begin, entry.end);
    }
    Ok(copied.len())
}

fn merged(
    base: &File,
    entry: &Entry,
    (to, shape): (Dtype, &[usize]),
    terms: &[Term<'_>],
    device: Device,
    prepared: &mut Prepared,
) -> Result<Vec<u8>> {
    let impossible = || Error::Backend(format!("`{}`: no memory for the merged tensor", entry.name));
    let size = dtype::byte_len(to, shape).ok_or_else(impossible)?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(size).map_err(|_| impossible())?;
    bytes.resize(size, 0u8);
    let from = base.tensor(entry).ok_or_else(impossible)?;
    let from = if shape == entry.shape { from } else { padded(&from, shape).ok_or_else(impossible)? };
    // SAFETY: the view shows `bytes`, which is neither moved nor touched until the merge is done.
    let out = unsafe { View::from_raw(bytes.as_mut_ptr(), Device::Cpu, to, shape, None)? };
    let job = Work {
        name: &entry.name,
        base: &from,
        out: &out,
        storage: Storage::default(),
        terms,
        pristine: None,
    };
    super::merge_all(device, Stream::default(), &[job], prepared, &mut |_| Ok(()))?;
    Ok(bytes)
}

/// Where in a weight grown to `to` lies what was made for it at the size `own`.
fn within(name: &str, own: &[usize], to: &[usize], slice: Option<Slice>) -> Result<Option<Slice>> {
    let mut axes = (0..to.len()).filter(|&axis| own[axis] != to[axis]);
    match (axes.next(), axes.next(), slice) {
        (None, ..) => Ok(slice),
        (Some(axis @ 0..=1), None, None) => Ok(Some(Slice { axis, start: 0, len: own[axis] })),
        (Some(axis), None, Some(s)) if s.axis == axis => Ok(slice),
        _ => Err(Error::argument(
            format!("`{name}`: one adapter is made for {own:?}, another lets it grow to {to:?}"),
            "merge one of them",
        )),
    }
}

/// The tensor with zeros at the end of its axes up to `shape`.
fn padded(from: &Tensor, shape: &[usize]) -> Option<Tensor> {
    let (bytes, size) = (from.bytes()?, dtype::byte_len(from.dtype(), &[1])?);
    let (&own, &wide) = (from.shape().last()?, shape.last()?);
    let mut out = Vec::new();
    out.try_reserve_exact(dtype::byte_len(from.dtype(), shape)?).ok()?;
    out.resize(dtype::byte_len(from.dtype(), shape)?, 0u8);
    // Rows along the last axis lie together in both; the other axes tell where.
    for (i, row) in bytes.chunks_exact((own * size).max(1)).enumerate() {
        let (mut rest, mut at, mut step) = (i, 0, wide * size);
        for axis in (0..shape.len() - 1).rev() {
            at += rest % from.shape()[axis] * step;
            rest /= from.shape()[axis];
            step *= shape[axis];
        }
        out[at..at + row.len()].copy_from_slice(row);
    }
    Tensor::of_vec(out, from.dtype(), shape)
}

/// What was merged, for the output's metadata; earlier merges stay listed.
fn recipe(earlier: Option<&String>, job: &Job<'_>) -> String {
    let mut list: Vec<Value> = earlier.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    for (adapter, strengths) in job.adapters {
        let name = adapter.path().file_name().map(|n| n.to_string_lossy().into_owned());
        let mut entry =
            json!({"adapter": name, "unet": strengths.unet, "text_encoder": strengths.text_encoder});
        if !strengths.modules.is_empty() {
            entry["modules"] = strengths
                .modules
                .iter()
                .map(|(k, v)| (k.clone(), json!(v)))
                .collect::<serde_json::Map<_, _>>()
                .into();
        }
        list.push(entry);
    }
    Value::from(list).to_string()
}
