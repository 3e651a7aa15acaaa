//! Files of a network: its adapter, its state, and when they are written.
#![cfg_attr(not(feature = "torch"), allow(unused_variables, unused_imports, dead_code))]

use super::adapter::{self, lycore_adapter};
use super::boundary::{self, c_text, Failure};
use super::handle;
#[cfg(feature = "torch")]
use super::network::on_network;
use super::network::{lycore_network, training, LYCORE_BUFFER_EMA, LYCORE_BUFFER_PARAMETERS};
use super::status::lycore_status::LYCORE_BAD_ARGUMENT;
use super::status::{lycore_error, lycore_status};
use super::tensor::in_scope;
use crate::dtype::Float;
#[cfg(feature = "torch")]
use crate::train;
use std::ffi::{c_char, c_void};
use std::path::Path;

/// lycore_network_checkpoint: after a call of lycore_network_step.
pub const LYCORE_MOMENT_STEP: i32 = 0;
/// lycore_network_checkpoint: after the last step of an epoch.
pub const LYCORE_MOMENT_EPOCH: i32 = 1;
/// lycore_network_checkpoint: after the last step of all.
pub const LYCORE_MOMENT_END: i32 = 2;

/// Writes the adapter as a kohya safetensors file with training metadata, whole or not at all. `which` is LYCORE_BUFFER_PARAMETERS or
/// LYCORE_BUFFER_EMA; `dtype` is NULL (the config's save_precision) or
/// "fp32", "fp16", "bf16"; `metadata` is NULL or a JSON object of texts to add. Two files of one state differ in their times only; the environment
/// variable SOURCE_DATE_EPOCH stands for the clock.
///
/// # Safety
/// The texts are NULL or NUL-terminated UTF-8, `path` is not NULL. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_save(
    network: *mut lycore_network,
    path: *const c_char,
    which: i32,
    dtype: *const c_char,
    metadata: *const c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let path = boundary::text(path, "path")?;
            let bad = |what: String| Failure::boundary(LYCORE_BAD_ARGUMENT, what);
            let word = boundary::optional_text(dtype, "dtype")?;
            let parse = |word| {
                Float::parse(word)
                    .ok_or_else(|| bad(format!("`dtype` is `{word}`, it must be fp32, fp16 or bf16")))
            };
            let dtype = word.map(parse).transpose()?;
            let ema = match which {
                LYCORE_BUFFER_PARAMETERS => false,
                LYCORE_BUFFER_EMA => true,
                other => return Err(bad(format!("`which` is {other}, no values that a file can have"))),
            };
            let metadata: std::collections::BTreeMap<String, String> =
                serde_json::from_str(boundary::optional_text(metadata, "metadata")?.unwrap_or("{}"))
                    .map_err(|e| bad(format!("`metadata` is not a JSON object of texts: {e}")))?;
            training! {
                on_network(network, |n| {
                    let dtype = dtype.unwrap_or(n.network.config().saving.precision);
                    Ok(n.network.save(Path::new(path), dtype, &metadata, ema)?)
                })
            }
        })
    }
}

/// Writes the files that the config's output_dir, save_every_n_steps and so on make due at this `moment` (LYCORE_MOMENT_*), whole or not at all,
/// and deletes those that they put out of date. Call it after each lycore_network_step, at the end of each epoch and at the end of all; the epochs
/// are counted by it. `value` is a loss or validation value of the parameters as they are, or NaN: the least so far is the best. Where several
/// processes train together, one of them calls it. Nothing is due without output_dir; then the end is LYCORE_TRAIN.
///
/// A file that cannot be written is LYCORE_FILE: older files stay, and training can go on. Only files are deleted that this run wrote, or the run
/// whose state it loaded. `report` may be NULL; it becomes JSON {"step", "epoch", "best": number or null, "written": [path], "deleted": [path],
/// "left": [{"file", "reason"}] (what should have been deleted but was not)}, freed with lycore_text_free.
///
/// # Safety
/// `report` and `error` are NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_checkpoint(
    network: *mut lycore_network,
    moment: i32,
    value: f64,
    stream: *mut c_void,
    report: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            training! {
                let moment = match moment {
                    LYCORE_MOMENT_STEP => train::Moment::Step,
                    LYCORE_MOMENT_EPOCH => train::Moment::Epoch,
                    LYCORE_MOMENT_END => train::Moment::End,
                    other => {
                        let message = format!("`moment` is {other}, it must be one of LYCORE_MOMENT_*");
                        return Err(Failure::boundary(LYCORE_BAD_ARGUMENT, message));
                    }
                };
                let done = on_network(network, |n| {
                    in_scope(n.device, stream, |_| {
                        let files = n.network.checkpoint(moment, value)?;
                        Ok(n.network.report(&files))
                    })
                })?;
                if let Some(report) = report.as_mut() {
                    *report = handle::new_text(c_text(&done.to_string()));
                }
                Ok(())
            }
        })
    }
}

/// The adapter as it is now, as lycore_network_save would write it, with its own memory: it stays while training goes on, and a stack takes it as
/// any other. Freed with lycore_adapter_free.
///
/// # Safety
/// `out` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_adapter(
    network: *mut lycore_network,
    stream: *mut c_void,
    out: *mut *mut lycore_adapter,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let out = boundary::out(out, "out")?;
            training! {
                let adapter = on_network(network, |n| in_scope(n.device, stream, |_| Ok(n.network.adapter()?)))?;
                *out = handle::new(adapter::Held::new(adapter)).cast();
                Ok(())
            }
        })
    }
}

/// Writes everything that a resumed run needs to go on bit for bit: parameters, optimizer state, step, accumulated gradients. Whole or not
/// at all. The order of the data is the host's.
///
/// # Safety
/// `path` is a NUL-terminated UTF-8 string. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_save_state(
    network: *mut lycore_network,
    path: *const c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let path = boundary::text(path, "path")?;
            training! { on_network(network, |n| Ok(n.network.save_state(Path::new(path))?)) }
        })
    }
}

/// Reads what lycore_network_save_state wrote, into a built network of the same modules and config; another one's state is refused.
///
/// # Safety
/// `path` is a NUL-terminated UTF-8 string. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_load_state(
    network: *mut lycore_network,
    path: *const c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let path = boundary::text(path, "path")?;
            training! { on_network(network, |n| Ok(n.network.load_state(Path::new(path))?)) }
        })
    }
}

/// Starts from an adapter file instead of a fresh initialisation; `loaded` (may be NULL) tells how many modules were found in it.
///
/// # Safety
/// `path` is a NUL-terminated UTF-8 string; `loaded` and `error` are NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_load_weights(
    network: *mut lycore_network,
    path: *const c_char,
    loaded: *mut u64,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let path = boundary::text(path, "path")?;
            training! {
                let count = on_network(network, |n| Ok(n.network.load_weights(Path::new(path))?))?;
                if let Some(loaded) = loaded.as_mut() {
                    *loaded = count as u64;
                }
                Ok(())
            }
        })
    }
}
