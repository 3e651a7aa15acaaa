//! Adapters: open, look at, take apart, save.

use super::boundary::{self, c_text, Failure, Outcome};
use super::handle;
use super::status::lycore_status::LYCORE_BAD_ARGUMENT;
use super::status::{lycore_error, lycore_status};
use super::tensor::{describe, lycore_tensor};
use crate::adapter::Adapter;
use crate::error::Error;
use crate::report;
use std::ffi::{c_char, CString};
use std::path::Path;
use std::sync::Arc;

/// One file's worth of modules. Never changed by being applied; may be used by any number of threads and stacks at once. Freed with
/// lycore_adapter_free; a stack keeps what it needs, so the handle may be freed right after it was added.
pub struct lycore_adapter {
    _opaque: [u8; 0],
}

/// One module of an adapter. The texts are valid until the adapter's handle is freed.
#[repr(C)]
pub struct lycore_module {
    /// sizeof(lycore_module), set by the caller.
    pub struct_size: u64,
    /// Its name as the file spells it.
    pub name: *const c_char,
    /// The algorithm's usual name, for example "LoRA".
    pub algorithm: *const c_char,
    /// Rank of the factors; 0 where the algorithm has none.
    pub rank: u64,
    /// alpha as the file gives it; the rank when it gives none.
    pub alpha: f64,
    /// How many tensors lycore_adapter_tensor gives.
    pub tensor_count: u64,
}

/// An adapter as the host holds it: with the texts and numbers that descriptors point to.
pub(super) struct Held {
    pub(super) adapter: Arc<Adapter>,
    modules: Vec<HeldModule>,
}

struct HeldModule {
    name: CString,
    algorithm: CString,
    tensors: Vec<HeldTensor>,
}

struct HeldTensor {
    slot: CString,
    descriptor: lycore_tensor,
    _numbers: (Box<[i64]>, Box<[i64]>),
}

// SAFETY: the pointers in a descriptor lead to the adapter's file and to the boxes beside it, which live as long and never change.
unsafe impl Send for HeldTensor {}
// SAFETY: as above.
unsafe impl Sync for HeldTensor {}

impl Held {
    pub(super) fn new(adapter: Arc<Adapter>) -> Self {
        let tensor = |(slot, tensor): (&'static str, &crate::view::Tensor)| {
            let mut numbers = (
                vec![0; tensor.shape().len()].into_boxed_slice(),
                vec![0; tensor.shape().len()].into_boxed_slice(),
            );
            let descriptor = describe(tensor.view(), &mut numbers.0, &mut numbers.1);
            HeldTensor { slot: c_text(slot), descriptor, _numbers: numbers }
        };
        // A descriptor that claims another element type would have its readers run past the end.
        let float = |(_, t): &(&str, &crate::view::Tensor)| crate::dtype::Float::wide(t.dtype()).is_some();
        let module = |m: &crate::adapter::Module| HeldModule {
            name: c_text(&m.name),
            algorithm: c_text(m.algorithm.name()),
            tensors: m.algorithm.tensors().into_iter().filter(float).map(tensor).collect(),
        };
        let modules = adapter.modules().iter().map(module).collect();
        Held { adapter, modules }
    }
}

pub(super) fn held(adapter: *const lycore_adapter) -> Outcome<Arc<Held>> {
    handle::get::<Held>(adapter.cast(), "adapter")
}

/// Opens an adapter: safetensors, or what torch.save writes (.pt, .ckpt, .bin) as far as it asks for nothing but tensors. The file stays mapped until the adapter is freed and no stack uses it: replace it by renaming another
/// over it, never by writing into it. For a PEFT file, `adapter_config.json` beside it gives the alphas.
/// A file in which no module can be used is LYCORE_FILE, LYCORE_KEY or LYCORE_UNSUPPORTED.
///
/// # Safety
/// `path` is a NUL-terminated UTF-8 string. `out` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_adapter_open(
    path: *const c_char,
    out: *mut *mut lycore_adapter,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (path, out) = (boundary::text(path, "path")?, boundary::out(out, "out")?);
            *out = handle::new(Held::new(Adapter::open(Path::new(path))?)).cast();
            Ok(())
        })
    }
}

/// Reads an adapter from the `size` bytes of a safetensors file in memory. The bytes are copied.
///
/// # Safety
/// `bytes` points to `size` bytes. `out` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_adapter_open_memory(
    bytes: *const u8,
    size: u64,
    out: *mut *mut lycore_adapter,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (bytes, out) = (boundary::array(bytes, size, "bytes")?, boundary::out(out, "out")?);
            *out = handle::new(Held::new(Adapter::from_bytes(bytes.to_vec())?)).cast();
            Ok(())
        })
    }
}

/// The load report as JSON: {"file", "metadata": {text: text}, "facts", "summary": {"keys", "modules", "readable", "unsupported",
/// "malformed"}, "modules": [{"module", "spelling", "algorithm", "rank", "alpha", "dtype", "bytes"}], "keys": [{"key", "status", "reason"?}]}.
/// "facts" is what the metadata says, in one form for all trainers; every field may be missing: {"title", "author", "description",
/// "license", "usage_hint", "comment", "tags", "date", "tool": {"name", "evidence", "version"}, "base": {"version", "model", "model_hash",
/// "vae", "architecture", "implementation", "prediction_type"}, "trigger": {"phrases": [text], "classes": [{"word", "repeats", "images"}],
/// "tags": [{"tag", "count"}], "distinct_tags"}, "training": {"module", "args": {}, "dim", "alpha", "dropout", "optimizer", "learning_rate",
/// "unet_lr", "text_encoder_lr", "scheduler", "warmup_steps", "steps", "max_steps", "epoch", "epochs", "images", "reg_images", "batch_size",
/// "gradient_accumulation_steps", "resolution", "bucket_count", "buckets": [{"resolution", "images"}], "clip_skip", "noise_offset",
/// "min_snr_gamma", "mixed_precision", "seed", "loss_type", "seconds"}, "hashes": {"model", "legacy", "sha256"},
/// "thumbnail": {"bytes", "type"}, "unreadable": [{"key", "reason"}]}. Of each list the first 24.
/// `json` becomes a text that the caller frees with lycore_text_free.
///
/// # Safety
/// `json` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_adapter_report(
    adapter: *const lycore_adapter,
    json: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (adapter, json) = (held(adapter)?, boundary::out(json, "json")?);
            *json = handle::new_text(c_text(&report::json(&adapter.adapter, None).to_string()));
            Ok(())
        })
    }
}

/// A report as plain text of at most 100 columns (longer only where a path or a module's name is): what lycore_adapter_report,
/// lycore_stack_report or lycore_checkpoint_merge gave as JSON. Unless `all` is non-zero, lists end after ten entries and say how many more
/// there are. `text` becomes a text that the caller frees with lycore_text_free.
///
/// # Safety
/// `json` is a NUL-terminated UTF-8 string. `text` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_report_text(
    json: *const c_char,
    all: i32,
    text: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (json, text) = (boundary::text(json, "json")?, boundary::out(text, "text")?);
            let wrong = |why: String| {
                Error::argument(format!("`json` is no report: {why}"), "pass what lycore_adapter_report gave")
            };
            let report: serde_json::Value = serde_json::from_str(json).map_err(|e| wrong(e.to_string()))?;
            if !["keys", "adapters"].iter().any(|name| report[*name].is_array()) {
                return Err(wrong("it has neither \"keys\" nor \"adapters\"".into()).into());
            }
            *text = handle::new_text(c_text(&report::text::text(&report, all != 0)));
            Ok(())
        })
    }
}

/// The number of modules that can be used; 0 when `adapter` is not a live adapter.
#[no_mangle]
pub extern "C" fn lycore_adapter_module_count(adapter: *const lycore_adapter) -> u64 {
    boundary::value(0, || Ok(held(adapter)?.modules.len() as u64))
}

fn module(held: &Held, index: u64) -> Outcome<&HeldModule> {
    let count = held.modules.len();
    held.modules.get(index as usize).ok_or_else(|| {
        Failure::boundary(LYCORE_BAD_ARGUMENT, format!("module {index} of an adapter with {count} modules"))
    })
}

/// Describes module `index`.
///
/// # Safety
/// `out` points to a lycore_module whose struct_size is set. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_adapter_module(
    adapter: *const lycore_adapter,
    index: u64,
    out: *mut lycore_module,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let held = held(adapter)?;
            boundary::sized(out, "out")?;
            let module = module(&held, index)?;
            let algorithm = &held.adapter.modules()[index as usize].algorithm;
            *boundary::out(out, "out")? = lycore_module {
                struct_size: std::mem::size_of::<lycore_module>() as u64,
                name: module.name.as_ptr(),
                algorithm: module.algorithm.as_ptr(),
                rank: algorithm.rank().unwrap_or(0) as u64,
                alpha: algorithm.alpha().map_or(algorithm.rank().unwrap_or(0) as f64, f64::from),
                tensor_count: module.tensors.len() as u64,
            };
            Ok(())
        })
    }
}

/// Tensor `tensor` of module `index`: its canonical name (for example "lora_up.weight"; static while the adapter lives) and a read-only
/// view of it in host memory, valid until the adapter's handle is freed.
///
/// # Safety
/// `name` and `out` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_adapter_tensor(
    adapter: *const lycore_adapter,
    index: u64,
    tensor: u64,
    name: *mut *const c_char,
    out: *mut lycore_tensor,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let held = held(adapter)?;
            let (name, out) = (boundary::out(name, "name")?, boundary::out(out, "out")?);
            let module = module(&held, index)?;
            let count = module.tensors.len();
            let tensor = module.tensors.get(tensor as usize).ok_or_else(|| {
                Failure::boundary(
                    LYCORE_BAD_ARGUMENT,
                    format!("tensor {tensor} of a module with {count} tensors"),
                )
            })?;
            *name = tensor.slot.as_ptr();
            *out = tensor.descriptor;
            Ok(())
        })
    }
}

/// Writes the adapter's modules to a safetensors file in the spelling that it was read in; whole or not at all.
///
/// # Safety
/// `path` is a NUL-terminated UTF-8 string. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_adapter_save(
    adapter: *const lycore_adapter,
    path: *const c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (adapter, path) = (held(adapter)?, boundary::text(path, "path")?);
            Ok(adapter.adapter.save(Path::new(path))?)
        })
    }
}

/// A new adapter whose modules are cut to their first `rank` ranks (at least 1; modules of a lower rank stay whole), in `out`, freed with
/// lycore_adapter_free. For adapters trained so that every prefix works: DyLoRA (alpha stays, so the scale becomes alpha / rank, as the paper and
/// sd-scripts have it) and T-LoRA (the scale stays, as under its mask). LYCORE_UNSUPPORTED when no module has nested ranks; modules without them,
/// beside others, stay as they are.
///
/// # Safety
/// `out` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_adapter_prefix(
    adapter: *const lycore_adapter,
    rank: u64,
    out: *mut *mut lycore_adapter,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (adapter, out) = (held(adapter)?, boundary::out(out, "out")?);
            let prefix = adapter.adapter.prefix(usize::try_from(rank).unwrap_or(usize::MAX))?;
            *out = handle::new(Held::new(prefix)).cast();
            Ok(())
        })
    }
}

/// Frees the handle. NULL is accepted; a second free returns LYCORE_BAD_HANDLE and does nothing. Stacks that use the adapter keep it.
#[no_mangle]
pub extern "C" fn lycore_adapter_free(adapter: *mut lycore_adapter) -> lycore_status {
    handle::free::<Held>(adapter.cast())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::status::lycore_status::{LYCORE_NULL_ARGUMENT, LYCORE_OK};
    use std::ffi::CStr;
    use std::ptr::null_mut;

    fn text_of(json: &CStr, all: i32) -> Result<String, lycore_status> {
        let mut text = null_mut();
        // SAFETY: a C string, and a place for the text.
        match unsafe { lycore_report_text(json.as_ptr(), all, &mut text, null_mut()) } {
            LYCORE_OK => {
                // SAFETY: the library's own text, not yet freed.
                let copy = unsafe { CStr::from_ptr(text) }.to_str().unwrap().to_owned();
                assert_eq!(handle::free_text(text), LYCORE_OK);
                Ok(copy)
            }
            status => Err(status),
        }
    }

    #[test]
    fn a_report_becomes_text() {
        let keys: Vec<String> =
            (0..12).map(|i| format!(r#"{{"key": "k{i}", "status": "unsupported"}}"#)).collect();
        let json = CString::new(format!(r#"{{"file": "x", "keys": [{}]}}"#, keys.join(","))).unwrap();
        let short = text_of(&json, 0).unwrap();
        assert!(short.starts_with("file       x\n") && short.ends_with("  k9\n  and 2 more\n"), "{short}");
        assert!(text_of(&json, 1).unwrap().ends_with("  k10\n  k11\n"));
        for nonsense in [c"", c"{", c"[]", c"3", c"{\"keys\": 1}"] {
            assert_eq!(text_of(nonsense, 0), Err(LYCORE_BAD_ARGUMENT), "{nonsense:?}");
        }
        let mut text = null_mut();
        // SAFETY: NULL is what the call must refuse.
        let statuses = unsafe {
            [
                lycore_report_text(std::ptr::null(), 0, &mut text, null_mut()),
                lycore_report_text(c"{}".as_ptr(), 0, null_mut(), null_mut()),
            ]
        };
        assert_eq!(statuses, [LYCORE_NULL_ARGUMENT; 2]);
    }
}
