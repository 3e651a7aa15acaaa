//! Network: the library's half of training a host's model.
//!
//! Without libtorch every call here answers LYCORE_UNSUPPORTED, so that one header serves both builds.
#![cfg_attr(not(feature = "torch"), allow(unused_variables, unused_imports, dead_code))]

use super::boundary::{self, c_text, Failure, Outcome};
use super::handle;
use super::stack::{geometry, lycore_geometry};
use super::status::lycore_status::LYCORE_BAD_ARGUMENT;
use super::status::{lycore_error, lycore_status};
use super::tensor::{describe, in_scope, lycore_device, lycore_tensor, view};
use crate::dtype::{Dtype, Float};
#[cfg(not(feature = "torch"))]
use crate::error::Error;
use crate::view::{Device, View};
#[cfg(feature = "torch")]
use crate::{merge::torch::blob, train};
use parking_lot::Mutex;
use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::Arc;

/// A set of modules in training: parameters, gradients, optimizer, schedule, state and files. The host runs its model and calls forward
/// and backward per layer. One call at a time; a second thread gets LYCORE_BUSY. Freed with lycore_network_free.
pub struct lycore_network {
    _opaque: [u8; 0],
}

/// lycore_network_buffer: the fp32 parameters, flat.
pub const LYCORE_BUFFER_PARAMETERS: i32 = 0;
/// lycore_network_buffer: the fp32 gradients, flat, summed since the last update.
pub const LYCORE_BUFFER_GRADIENTS: i32 = 1;

/// What lycore_network_step did.
#[repr(C)]
pub struct lycore_step {
    /// sizeof(lycore_step), set by the caller.
    pub struct_size: u64,
    /// Updates done so far, this one included.
    pub step: u64,
    /// Learning rate of this update; in the middle of an accumulation, of the coming one.
    pub learning_rate: f64,
    /// Norm of all gradients, averaged over the accumulation, before clipping; 0 in the middle of an accumulation.
    pub gradient_norm: f64,
    /// False in the middle of a gradient accumulation: nothing was changed yet.
    pub updated: bool,
}

#[cfg(feature = "torch")]
type Held = Mutex<HeldNetwork>;

#[cfg(feature = "torch")]
struct HeldNetwork {
    network: train::Network,
    /// What `lycore_network_buffer` points to.
    shapes: [[i64; 1]; 2],
    strides: [[i64; 1]; 2],
    device: Device,
}

/// A body that exists in the build with libtorch only.
macro_rules! training {
    ($($body:tt)*) => {{
        #[cfg(feature = "torch")]
        {
            $($body)*
        }
        #[cfg(not(feature = "torch"))]
        {
            Err(Failure::Error(Error::Unsupported {
                what: "this build of the library has no training".into(),
                hint: "use the build with libtorch".into(),
            }))
        }
    }};
}

#[cfg(feature = "torch")]
fn on_network<T>(
    network: *const lycore_network,
    work: impl FnOnce(&mut HeldNetwork) -> Outcome<T>,
) -> Outcome<T> {
    let network: Arc<Held> = handle::get(network.cast(), "network")?;
    let mut network = handle::lock(&network, "network")?;
    work(&mut network)
}

/// A new network without modules. `config` is JSON with sd-scripts' names where it has them; lycore_network_schema tells all keys with
/// their defaults. All problems of a config are reported at once.
///
/// # Safety
/// `config` is a NUL-terminated UTF-8 string. `out` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_new(
    config: *const c_char,
    out: *mut *mut lycore_network,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (config, out) = (boundary::text(config, "config")?, boundary::out(out, "out")?);
            training! {
                let network = train::Network::new(train::Config::parse(config)?)?;
                let held = HeldNetwork { network, shapes: [[0]; 2], strides: [[1]; 2], device: Device::Cpu };
                *out = handle::new(Mutex::new(held)).cast();
                Ok(())
            }
        })
    }
}

/// The keys of a network's config with their defaults, one per line. `text` is freed with lycore_text_free.
///
/// # Safety
/// `text` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_schema(
    text: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let text = boundary::out(text, "text")?;
            training! {
                *text = handle::new_text(c_text(train::Config::schema()));
                Ok(())
            }
        })
    }
}

/// Adds a module for the layer with a weight of this shape, [out, in] or [out, in / groups, kernel..]; its number goes to `index`. `name` is
/// the layer's dotted path or a name as it shall stand in the file. `geometry` is NULL for Linear. Not after lycore_network_build.
///
/// # Safety
/// `name` is a NUL-terminated UTF-8 string; `shape` points to `ndim` sizes; `geometry` is NULL or as described; `index` may be written.
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_add_module(
    network: *mut lycore_network,
    name: *const c_char,
    shape: *const i64,
    ndim: u64,
    geometry: *const lycore_geometry,
    index: *mut u64,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (name, index) = (boundary::text(name, "name")?, boundary::out(index, "index")?);
            let shape = super::tensor::shape(boundary::array(shape, ndim, "shape")?, "shape")?;
            let geometry = self::geometry(geometry)?;
            training! {
                *index = on_network(network, |n| Ok(n.network.add_module(name, &shape, geometry)?))? as u64;
                Ok(())
            }
        })
    }
}

/// Allocates parameters, gradients and optimizer state on `device` and initialises them from the config's seed.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_build(
    network: *mut lycore_network,
    device: lycore_device,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            training! {
                let device = super::tensor::device(device, "device")?;
                on_network(network, |n| {
                    let place = match device {
                        Device::Cpu => tch::Device::Cpu,
                        Device::Cuda(index) => {
                            crate::torch_ext::require_cuda()?;
                            tch::Device::Cuda(index)
                        }
                    };
                    n.network.build(place)?;
                    n.device = device;
                    Ok(())
                })
            }
        })
    }
}

/// y += scale * up(down(x)) for module `index`. x and y as in lycore_stack_forward; fp32, fp16 or bf16. `stream` as in lycore_stack_apply.
///
/// # Safety
/// `x` and `y` describe memory that does not overlap. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_forward(
    network: *mut lycore_network,
    index: u64,
    x: *const lycore_tensor,
    y: *const lycore_tensor,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (x, y) = (view(x, "x")?, view(y, "y")?);
            training! {
                on_network(network, |n| {
                    in_scope(y.device(), stream, |_| Ok(n.network.forward(index as usize, &blob(&x)?, &blob(&y)?)?))
                })
            }
        })
    }
}

/// The backward of lycore_network_forward: adds the gradients of the module's parameters to the network's, and, unless it is NULL, the
/// gradient of x to `grad_x`. `x` is the forward's input, `grad_y` the gradient of its output.
///
/// # Safety
/// The tensors describe memory that does not overlap; `grad_x` may be NULL. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_backward(
    network: *mut lycore_network,
    index: u64,
    x: *const lycore_tensor,
    grad_y: *const lycore_tensor,
    grad_x: *const lycore_tensor,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (x, grad_y) = (view(x, "x")?, view(grad_y, "grad_y")?);
            let grad_x = match grad_x.is_null() {
                true => None,
                false => Some(view(grad_x, "grad_x")?),
            };
            training! {
                on_network(network, |n| {
                    in_scope(x.device(), stream, |_| {
                        let grad_x = grad_x.as_ref().map(blob).transpose()?;
                        Ok(n.network.backward(index as usize, &blob(&x)?, &blob(&grad_y)?, grad_x.as_ref())?)
                    })
                })
            }
        })
    }
}

/// One optimizer step from the gradients summed so far: clip, update, clear. In the middle of an accumulation it only counts.
/// A gradient that is not finite is LYCORE_TRAIN; parameters, state and step count are then as before. `out` may be NULL.
///
/// # Safety
/// `out` is NULL or points to a struct whose struct_size is set. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_step(
    network: *mut lycore_network,
    stream: *mut c_void,
    out: *mut lycore_step,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            if !out.is_null() {
                boundary::sized(out, "out")?;
            }
            training! {
                let step = on_network(network, |n| in_scope(n.device, stream, |_| Ok(n.network.step()?)))?;
                if let Some(out) = out.as_mut() {
                    out.step = step.step;
                    out.learning_rate = step.learning_rate;
                    out.gradient_norm = step.grad_norm;
                    out.updated = step.updated;
                }
                Ok(())
            }
        })
    }
}

/// Clears the gradients, for example after a batch that shall not count.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_zero_gradients(
    network: *mut lycore_network,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            training! {
                on_network(network, |n| in_scope(n.device, stream, |_| Ok(n.network.zero_gradients()?)))
            }
        })
    }
}

/// The flat buffer that `which` (LYCORE_BUFFER_*) names, fp32, one axis, on the network's device: for an all-reduce, or to look at. It is longer
/// than lycore_network_parameter_count: parameters begin at aligned offsets, with zeros between them. Valid until the network is freed; its
/// content changes with backward and step. After writing parameters call lycore_network_refresh.
///
/// # Safety
/// `out` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_buffer(
    network: *mut lycore_network,
    which: i32,
    out: *mut lycore_tensor,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let out = boundary::out(out, "out")?;
            training! {
                on_network(network, |n| {
                    let (at, buffer) = match which {
                        LYCORE_BUFFER_PARAMETERS => (0, n.network.parameters()?),
                        LYCORE_BUFFER_GRADIENTS => (1, n.network.gradients()?),
                        other => {
                            let message = format!("`which` is {other}, it must be one of LYCORE_BUFFER_*");
                            return Err(Failure::boundary(LYCORE_BAD_ARGUMENT, message));
                        }
                    };
                    let view = View::from_raw(buffer.data_ptr().cast(), n.device, Dtype::F32, &[buffer.numel()], None)?;
                    *out = describe(&view, &mut n.shapes[at], &mut n.strides[at]);
                    Ok(())
                })
            }
        })
    }
}

/// Makes forward and backward see what the host wrote into the parameters of lycore_network_buffer (a broadcast, an average): with
/// mixed_precision they read a copy in the compute dtype, which otherwise only a step refreshes.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_refresh(
    network: *mut lycore_network,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            training! {
                on_network(network, |n| in_scope(n.device, stream, |_| Ok(n.network.refresh()?)))
            }
        })
    }
}

/// How far the training is, for example after lycore_network_load_state: updates done, and calls of lycore_network_step since the last one
/// (more than 0 in the middle of a gradient accumulation).
///
/// # Safety
/// `steps` and `micro_steps` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_progress(
    network: *const lycore_network,
    steps: *mut u64,
    micro_steps: *mut u64,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (steps, micro_steps) =
                (boundary::out(steps, "steps")?, boundary::out(micro_steps, "micro_steps")?);
            training! {
                (*steps, *micro_steps) = on_network(network, |n| Ok(n.network.progress()))?;
                Ok(())
            }
        })
    }
}

/// Number of trainable parameters; 0 when `network` is not a live network.
#[no_mangle]
pub extern "C" fn lycore_network_parameter_count(network: *const lycore_network) -> u64 {
    boundary::value(0, || training! { on_network(network, |n| Ok(n.network.parameter_count() as u64)) })
}

/// Writes the adapter as a kohya safetensors file with training metadata, whole or not at all. `dtype` is NULL (fp32) or "fp32", "fp16", "bf16";
/// `metadata` is NULL or a JSON object of texts to add.
///
/// # Safety
/// The texts are NULL or NUL-terminated UTF-8, `path` is not NULL. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_save(
    network: *mut lycore_network,
    path: *const c_char,
    dtype: *const c_char,
    metadata: *const c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let path = boundary::text(path, "path")?;
            let bad = |what: String| Failure::boundary(LYCORE_BAD_ARGUMENT, what);
            let word = boundary::optional_text(dtype, "dtype")?.unwrap_or("fp32");
            let dtype = Float::parse(word)
                .ok_or_else(|| bad(format!("`dtype` is `{word}`, it must be fp32, fp16 or bf16")))?;
            let metadata: std::collections::BTreeMap<String, String> =
                serde_json::from_str(boundary::optional_text(metadata, "metadata")?.unwrap_or("{}"))
                    .map_err(|e| bad(format!("`metadata` is not a JSON object of texts: {e}")))?;
            training! {
                on_network(network, |n| Ok(n.network.save(Path::new(path), dtype, &metadata)?))
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

/// Frees the network; what was not saved is gone. NULL is accepted; a second free returns LYCORE_BAD_HANDLE and does nothing.
#[no_mangle]
pub extern "C" fn lycore_network_free(network: *mut lycore_network) -> lycore_status {
    #[cfg(feature = "torch")]
    return handle::free::<Held>(network.cast());
    #[cfg(not(feature = "torch"))]
    return if network.is_null() { lycore_status::LYCORE_OK } else { lycore_status::LYCORE_BAD_HANDLE };
}
