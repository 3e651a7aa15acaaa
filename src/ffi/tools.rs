//! Tools: resize, combine and extract, file to file.

use super::boundary::{self, c_text, Failure, Outcome};
use super::handle;
use super::progress::{self, lycore_progress};
use super::status::lycore_status::LYCORE_NULL_ARGUMENT;
use super::status::{lycore_error, lycore_status};
use crate::error::Result;
use crate::progress::Progress;
use crate::tools::{combine, extract, resize};
use serde_json::Value;
use std::ffi::c_char;
use std::path::Path;

/// Writes an adapter file with fewer ranks: every LoRA and LoCon becomes the nearest one of a lower rank, its scale stays. What would not
/// become smaller, and other algorithms, are copied bit for bit, so that the output is never larger than `source` (but for `convert`).
/// `output` appears whole or not at all and may be `source` itself. Progress counts modules.
///
/// `options` is JSON: {"rank": the most ranks of a module (needed by method fixed), "conv_rank": of a convolution (default: rank),
/// "method": "fixed" | "sv_ratio" | "sv_cumulative" | "sv_fro" (default fixed; the others are sd-scripts' dynamic methods),
/// "param": the number of a dynamic method, "dtype": "keep" | "fp32" | "fp16" | "bf16" (of the new factors; default keep),
/// "convert": true | false (LoHa and LoKr become LoRA, exact where the rank allows, else the nearest; default false)}.
/// `report` may be NULL; it becomes JSON {"source", "output", "method", "bytes": {"source", "output"}, "summary": {"modules", "resized",
/// "copied"}, "modules": [{"module", "algorithm", "status": "resized" | "converted" | "copied", "reason" (of a copy), "old_rank", "new_rank",
/// "new_alpha", "sum_retained", "fro_retained" (shares of the singular values' sum and of the Frobenius norm), "error" (relative Frobenius
/// distance of the old to the new delta, with its rounding into the dtype), "note"}]}, freed with lycore_text_free.
///
/// # Safety
/// The texts are NUL-terminated UTF-8; `progress` is NULL or as described; `report` and `error` are NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_resize(
    source: *const c_char,
    output: *const c_char,
    options: *const c_char,
    progress: *const lycore_progress,
    report: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises, here and below.
    unsafe {
        boundary::run(error, || {
            let (source, output) = (boundary::text(source, "source")?, boundary::text(output, "output")?);
            let options = resize::Options::parse(boundary::optional_text(options, "options")?.unwrap_or(""))?;
            told(progress, report, |progress| {
                resize::resize(Path::new(source), Path::new(output), &options, progress)
            })
        })
    }
}

/// Writes the weighted sum of `count` adapter files as one: dW = sum of weight * dW of each, whatever their algorithms and spellings; negative
/// weights subtract, files of weight 0 take no part. One file of weight 1 is copied byte for byte. `output` appears whole or not at all and
/// may be one of the files. Progress counts modules.
///
/// `options` is NULL or JSON: {"method": "concat" (default; exact, the ranks add up) | "svd" (the exact sum, cut to rank) | "linear" (PEFT's: factors
/// of equal ranks are added, with cross terms) | "ties" | "dare" | "magnitude_prune", "rank": of svd (needed) and of the last three (without it
/// they write whole differences), "conv_rank": of convolutions (default: rank), "density": the share of elements that the last three keep
/// (needed), "seed": of dare (default 0), "dtype": "keep" | "fp32" | "fp16" | "bf16" (of the new tensors; default keep: that of a module's parts,
/// fp32 where they differ)}.
/// Modules that depend on the weight that they change (DoRA, OFT, IA3, ..) are copied where they are alone at weight 1; else the call fails and
/// names the module.
/// `report` may be NULL; it becomes JSON {"output", "method", "bytes", "summary": {"modules", "shared" (of more than one file)}, "sources":
/// [{"file", "weight", "bytes", "modules", "left_out": keys that belong to no module}], "modules": [{"module", "from": numbers of the files,
/// "form": "copied" | "scaled" | "concatenated" | "linear" | "cut" | "whole" | "bias", "rank", "error" (of "cut": relative Frobenius
/// distance)}]}, freed with lycore_text_free.
///
/// # Safety
/// `sources` points to `count` texts; `weights` is NULL (1 everywhere) or points to `count` numbers; the rest as for lycore_resize.
#[no_mangle]
pub unsafe extern "C" fn lycore_combine(
    sources: *const *const c_char,
    weights: *const f64,
    count: u64,
    output: *const c_char,
    options: *const c_char,
    progress: *const lycore_progress,
    report: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let output = boundary::text(output, "output")?;
            let options =
                combine::Options::parse(boundary::optional_text(options, "options")?.unwrap_or(""))?;
            let sources = boundary::array(sources, count, "sources")?;
            let weights = match weights.is_null() {
                true => vec![1.0; sources.len()],
                false => boundary::array(weights, count, "weights")?.to_vec(),
            };
            let mut inputs = Vec::with_capacity(sources.len());
            for (source, weight) in sources.iter().zip(weights) {
                if source.is_null() {
                    let what = "one of `sources` is NULL".into();
                    return Err(Failure::boundary(LYCORE_NULL_ARGUMENT, what));
                }
                inputs.push((Path::new(boundary::text(*source, "sources")?), weight));
            }
            told(progress, report, |progress| {
                combine::combine(&inputs, Path::new(output), &options, progress)
            })
        })
    }
}

/// Writes what the checkpoint `tuned` has beyond `base` as a LoRA: the difference of every Linear and convolution weight that both have, of
/// the diffusion model and of text encoders, cut to a rank. `output` appears whole or not at all. Progress counts weights.
///
/// `options` is JSON: {"rank": the most ranks of a module, "conv_rank": of a convolution with a kernel above 1 (default: rank), "energy": 0 to 1 (the
/// smallest rank that keeps this share of a difference's squared norm is taken; default: the rank as given), "min_diff": weights of which
/// no value differs by more are left out (default 0), "dtype": "keep" | "fp32" | "fp16" | "bf16" (default keep: that of the tuned weight),
/// "norms": true | false (norms and biases too, as they are; default false), "spelling": "kohya" | "checkpoint" (names of the modules;
/// default kohya)}.
/// `report` may be NULL; it becomes JSON {"tuned", "base", "output", "bytes", "summary": {"weights", "modules", "unchanged", "skipped"}, "modules":
/// [{"module", "weight", "rank", "error" (relative Frobenius distance, with the rounding)}], "skipped": [{"weight", "reason"}]}, freed with
/// lycore_text_free.
///
/// # Safety
/// As for lycore_resize.
#[no_mangle]
pub unsafe extern "C" fn lycore_extract(
    tuned: *const c_char,
    base: *const c_char,
    output: *const c_char,
    options: *const c_char,
    progress: *const lycore_progress,
    report: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (tuned, base) = (boundary::text(tuned, "tuned")?, boundary::text(base, "base")?);
            let output = boundary::text(output, "output")?;
            let options =
                extract::Options::parse(boundary::optional_text(options, "options")?.unwrap_or(""))?;
            told(progress, report, |progress| {
                extract::extract(Path::new(tuned), Path::new(base), Path::new(output), &options, progress)
            })
        })
    }
}

/// Runs a tool under the caller's progress and gives its report.
///
/// # Safety
/// `progress` is NULL or as described; `report` is NULL or may be written.
unsafe fn told(
    progress: *const lycore_progress,
    report: *mut *mut c_char,
    tool: impl FnOnce(&mut Progress<'_>) -> Result<Value>,
) -> Outcome<()> {
    // SAFETY: the caller's promises.
    unsafe {
        let done = progress::with(progress, |progress| Ok(tool(progress)?))?;
        if let Some(report) = report.as_mut() {
            *report = handle::new_text(c_text(&done.to_string()));
        }
    }
    Ok(())
}
