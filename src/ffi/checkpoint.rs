//! Checkpoints, file to file.

use super::adapter::{held, lycore_adapter};
use super::boundary::{self, c_text, Failure, Outcome};
use super::handle;
use super::progress::{self, lycore_progress};
use super::stack::{lycore_strengths, strengths};
use super::status::lycore_status::LYCORE_BAD_ARGUMENT;
use super::status::{lycore_error, lycore_status};
use super::tensor::in_scope;
use crate::dtype::Float;
use crate::merge::checkpoint::{self, Job};
use crate::view::Device;
use serde_json::Value;
use std::ffi::c_char;
use std::path::Path;

/// Merges adapters into a safetensors file and writes another, streaming: memory is bounded by the largest touched tensor, untouched
/// tensors are the same bytes, metadata is kept and extended. `output` appears whole or not at all and may be `base` itself. Progress counts
/// bytes.
///
/// `options` is NULL or JSON: {"dtype": "keep" | "fp32" | "fp16" | "bf16" (of every fp32, fp16 and bf16 tensor; others pass through; default keep),
/// "device": "cpu" | "cuda" | "cuda:N" (where to compute; default cpu), "other_families": bool (take adapters made for another family of models as
/// far as they fit, rather than refuse them with LYCORE_KEY; default false)}.
/// `report` may be NULL; it becomes JSON {"base", "output", "device", "bytes", "tensors": {"changed", "copied"}, "proven_equal": number of tensors that were read back and
/// are the base's bit for bit, "adapters":
/// [load report as of lycore_stack_report]}, freed with lycore_text_free.
///
/// # Safety
/// The texts are NUL-terminated UTF-8; `adapters` points to `count` handles; `adapter_strengths` is NULL (1 everywhere) or points to `count`
/// structs; `progress` is NULL or as described; `report` and `error` are NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_checkpoint_merge(
    base: *const c_char,
    adapters: *const *const lycore_adapter,
    adapter_strengths: *const lycore_strengths,
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
            let (base, output) = (boundary::text(base, "base")?, boundary::text(output, "output")?);
            let (dtype, device, other_families) =
                self::options(boundary::optional_text(options, "options")?.unwrap_or("{}"))?;
            let mut list = Vec::new();
            for (i, adapter) in boundary::array(adapters, count, "adapters")?.iter().enumerate() {
                let given = match adapter_strengths.is_null() {
                    true => adapter_strengths,
                    false => adapter_strengths.add(i),
                };
                list.push((held(*adapter)?.adapter.clone(), strengths(given)?));
            }
            let (base, output) = (Path::new(base), Path::new(output));
            let job = Job { base, adapters: &list, output, dtype, device, other_families };
            let done = progress::with(progress, |progress| {
                in_scope(device, std::ptr::null_mut(), |_| Ok(checkpoint::merge(&job, progress)?))
            })?;
            if let Some(report) = report.as_mut() {
                *report = handle::new_text(c_text(&done.to_string()));
            }
            Ok(())
        })
    }
}

fn options(text: &str) -> Outcome<(Option<Float>, Device, bool)> {
    let bad = |what: String| Failure::boundary(LYCORE_BAD_ARGUMENT, format!("`options`: {what}"));
    let json: Value = serde_json::from_str(text).map_err(|e| bad(format!("not JSON: {e}")))?;
    let map = json.as_object().ok_or_else(|| bad("not a JSON object".into()))?;
    let (mut dtype, mut device, mut other_families, mut problems) = (None, Device::Cpu, false, Vec::new());
    for (key, value) in map {
        match (key.as_str(), value.as_str()) {
            ("dtype", Some("keep")) => {}
            ("dtype", Some(text)) if Float::parse(text).is_some() => dtype = Float::parse(text),
            ("dtype", _) => problems.push(format!("dtype is {value}, it must be keep, fp32, fp16 or bf16")),
            ("device", Some("cpu")) => {}
            ("device", Some("cuda")) => device = Device::Cuda(0),
            ("device", Some(text))
                if text.strip_prefix("cuda:").is_some_and(|n| n.parse::<usize>().is_ok()) =>
            {
                device = Device::Cuda(text[5..].parse().unwrap_or(0));
            }
            ("device", _) => problems.push(format!("device is {value}, it must be cpu, cuda or cuda:N")),
            ("other_families", _) => match value.as_bool() {
                Some(allow) => other_families = allow,
                None => problems.push(format!("other_families is {value}, it must be true or false")),
            },
            _ => problems.push(format!("unknown key `{key}`; the keys are dtype, device and other_families")),
        }
    }
    if problems.is_empty() {
        Ok((dtype, device, other_families))
    } else {
        Err(bad(problems.join("; ")))
    }
}
