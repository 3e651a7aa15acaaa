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
use crate::dtype::Dtype;
use crate::view::{Device, View};
#[cfg(feature = "torch")]
use crate::{
    algo::training::{Form, Layer},
    merge::bypass::Geometry,
    merge::torch::blob,
    train,
};
use parking_lot::Mutex;
use std::ffi::{c_char, c_void};
use std::sync::Arc;

/// A set of modules in training: parameters, gradients, optimizer, schedule, state and files. The host runs its model and calls forward
/// and backward per layer. One call at a time; a second thread gets LYCORE_BUSY. Freed with lycore_network_free.
pub struct lycore_network {
    _opaque: [u8; 0],
}

/// lycore_layer: a Linear layer or a convolution, as the shape of its weight says.
pub const LYCORE_LAYER_SLIDING: i32 = 0;
/// lycore_layer: a LayerNorm over the last axes, those of its weight.
pub const LYCORE_LAYER_LAYER_NORM: i32 = 1;
/// lycore_layer: an RMSNorm over the last axes, those of its weight.
pub const LYCORE_LAYER_RMS_NORM: i32 = 2;
/// lycore_layer: a GroupNorm, with a weight of one value per channel.
pub const LYCORE_LAYER_GROUP_NORM: i32 = 3;

/// The number of a module that does not exist.
pub const LYCORE_NO_MODULE: u64 = 0xffff_ffff;

/// A layer of the host's model, on which a module is put.
#[repr(C)]
pub struct lycore_layer {
    /// sizeof(lycore_layer).
    pub struct_size: u64,
    /// One of LYCORE_LAYER_*.
    pub form: i32,
    /// Whether it has a bias.
    pub has_bias: bool,
    /// Shape of its weight: [out, in], [out, in / groups, kernel..], or a norm's.
    pub shape: *const i64,
    /// Number of axes of the weight.
    pub ndim: u64,
    /// How a convolution slides; NULL: a Linear layer, or 1 everywhere.
    pub geometry: *const lycore_geometry,
    /// Groups of channels of a GroupNorm.
    pub groups: u64,
    /// What a norm adds to the variance.
    pub eps: f64,
    /// The layer's weight, fp32, fp16 or bf16, for algorithms that start from it (DoRA, T-LoRA); NULL where the host has none at hand. Not
    /// used after the call.
    pub weight: *const lycore_tensor,
}

/// lycore_network_buffer: the fp32 parameters, flat.
pub const LYCORE_BUFFER_PARAMETERS: i32 = 0;
/// lycore_network_buffer: the fp32 gradients, flat, summed since the last update.
pub const LYCORE_BUFFER_GRADIENTS: i32 = 1;
/// lycore_network_buffer: the average of the parameters that ema_decay keeps, fp32, flat. It starts where they are in the first step.
pub const LYCORE_BUFFER_EMA: i32 = 2;

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
    /// Steps that nobody waited for and that were left out, as their gradient was not finite, since this was last told.
    pub skipped: u64,
}

#[cfg(feature = "torch")]
impl lycore_step {
    fn tell(&mut self, step: train::Step) {
        self.step = step.step;
        self.learning_rate = step.learning_rate;
        self.gradient_norm = step.grad_norm;
        self.updated = step.updated;
        self.skipped = step.skipped;
    }
}

#[cfg(feature = "torch")]
type Held = Mutex<HeldNetwork>;

#[cfg(feature = "torch")]
pub(super) struct HeldNetwork {
    pub(super) network: train::Network,
    /// What `lycore_network_buffer` points to.
    shapes: [[i64; 1]; 3],
    strides: [[i64; 1]; 3],
    pub(super) device: Device,
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
            Err($crate::ffi::boundary::Failure::Error($crate::error::Error::Unsupported {
                what: "this build of the library has no training".into(),
                hint: "use the build with libtorch".into(),
            }))
        }
    }};
}
pub(super) use training;

#[cfg(feature = "torch")]
pub(super) fn on_network<T>(
    network: *const lycore_network,
    work: impl FnOnce(&mut HeldNetwork) -> Outcome<T>,
) -> Outcome<T> {
    let network: Arc<Held> = handle::get(network.cast(), "network")?;
    let mut network = handle::lock(&network, "network")?;
    work(&mut network)
}

/// A new network without modules. `config` is a JSON object, or TOML, with sd-scripts' names where it has them; lycore_network_schema tells
/// all keys with their defaults. All problems of a config are reported at once.
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
                let held = HeldNetwork { network, shapes: [[0]; 3], strides: [[1]; 3], device: Device::Cpu };
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

/// The network's options as a JSON object, those that were not given with their defaults. `json` is freed with lycore_text_free.
///
/// # Safety
/// `json` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_config(
    network: *const lycore_network,
    json: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let json = boundary::out(json, "json")?;
            training! {
                let config = on_network(network, |n| Ok(n.network.config().to_json().to_string()))?;
                *json = handle::new_text(c_text(&config));
                Ok(())
            }
        })
    }
}

/// The qualified name, "namespace::module", of an operator of libtorch, for hosts that have libtorch's graph:
/// `module(Tensor anchor, Tensor x, Tensor base, Tensor? weight, int network, int index, int axes, bool fresh) -> Tensor` gives
/// base + what module `index` adds for x, and calls lycore_network_backward's work in the graph's backward. `anchor` is any tensor that requires a
/// gradient; `base` is the layer's output; `weight` as in lycore_network_forward; `network` the lycore_network's address, alive until backward;
/// `axes` the number of a convolution's spatial axes, else 0; `fresh` whether nobody else reads base, so that the result may take its memory.
/// `text` is freed with lycore_text_free.
///
/// # Safety
/// `text` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_operator(
    text: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let text = boundary::out(text, "text")?;
            training! {
                *text = handle::new_text(c_text(super::operator::name()?));
                Ok(())
            }
        })
    }
}

/// Adds a module for a layer; its number goes to `index`: LYCORE_NO_MODULE where the config leaves the layer out. `name` is the layer's dotted
/// path or a name as it shall stand in the file. Not after lycore_network_build.
///
/// # Safety
/// `name` is a NUL-terminated UTF-8 string; `layer` points to a struct as described; `index` may be written. `error` is NULL or may be
/// written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_add_layer(
    network: *mut lycore_network,
    name: *const c_char,
    layer: *const lycore_layer,
    index: *mut u64,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (name, index) = (boundary::text(name, "name")?, boundary::out(index, "index")?);
            let given = boundary::sized(layer, "layer")?;
            let shape = super::tensor::shape(boundary::array(given.shape, given.ndim, "shape")?, "shape")?;
            let weight = optional(given.weight, "weight")?;
            training! {
                let (layer, geometry) = described(name, given, &shape)?;
                let weight = weight.as_ref().map(blob).transpose()?;
                let added = on_network(network, |n| Ok(n.network.add_layer(layer, geometry, weight.as_ref())?))?;
                *index = added.map_or(LYCORE_NO_MODULE, |index| index as u64);
                Ok(())
            }
        })
    }
}

/// The layer that a host describes, and how it slides; a norm does not.
///
/// # Safety
/// `given.geometry` is NULL or points to a struct as described.
#[cfg(feature = "torch")]
unsafe fn described(name: &str, given: &lycore_layer, shape: &[usize]) -> Outcome<(Layer, Option<Geometry>)> {
    let bad = |what: String| Err(Failure::boundary(LYCORE_BAD_ARGUMENT, format!("`{name}`: {what}")));
    let eps = given.eps;
    let form = match given.form {
        LYCORE_LAYER_SLIDING => {
            // SAFETY: the caller's promises.
            let geometry = unsafe { self::geometry(given.geometry) }?;
            return Ok((Layer::sliding(name, shape, &geometry, given.has_bias)?, Some(geometry)));
        }
        LYCORE_LAYER_LAYER_NORM => Form::LayerNorm { eps },
        LYCORE_LAYER_RMS_NORM => Form::RmsNorm { eps },
        LYCORE_LAYER_GROUP_NORM => Form::GroupNorm { groups: given.groups as i64, eps },
        other => return bad(format!("`form` is {other}, it must be one of LYCORE_LAYER_*")),
    };
    if shape.is_empty() || shape.contains(&0) || !(0.0..1.0).contains(&eps) {
        return bad(format!("no norm has a weight of shape {shape:?} and an eps of {eps}"));
    }
    let grouped = matches!(form, Form::GroupNorm { .. });
    if grouped && (shape.len() != 1 || given.groups == 0 || shape[0] as u64 % given.groups != 0) {
        return bad(format!("{} groups do not fit a norm of {shape:?} channels", given.groups));
    }
    Ok((Layer { name: name.to_owned(), weight: shape.to_vec(), form, bias: given.has_bias }, None))
}

/// A tensor that may be left out.
///
/// # Safety
/// `tensor` is NULL or describes memory.
unsafe fn optional(tensor: *const lycore_tensor, name: &'static str) -> Outcome<Option<View>> {
    if tensor.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promises.
    unsafe { view(tensor, name) }.map(Some)
}

/// Whether module `index` computes with its layer's own weight (`needs` becomes true): then forward and backward must be given it.
///
/// # Safety
/// `needs` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_needs_weight(
    network: *const lycore_network,
    index: u64,
    needs: *mut bool,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let needs = boundary::out(needs, "needs")?;
            training! {
                *needs = on_network(network, |n| Ok(n.network.needs_weight(index as usize)?))?;
                Ok(())
            }
        })
    }
}

/// From here on T-LoRA computes with the first `share` of its ranks, above 0 and up to 1, in forward and backward: few for a noisy timestep,
/// all at its end. Other algorithms do not look at it. The number lies on the device: a CUDA graph that was captured after the first call sees
/// the later ones. After lycore_network_build.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_set_ranks(
    network: *mut lycore_network,
    share: f64,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            training! {
                on_network(network, |n| in_scope(n.device, stream, |_| Ok(n.network.set_ranks(share)?)))
            }
        })
    }
}

/// With `evaluating`, forward and backward leave nothing to chance (dropout, DyLoRA's choice of ranks) until they are told otherwise.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_evaluate(
    network: *mut lycore_network,
    evaluating: bool,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            training! {
                on_network(network, |n| {
                    n.network.evaluate(evaluating);
                    Ok(())
                })
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

/// y += what module `index` adds to its layer's output for x. x and y as in lycore_stack_forward, but of any strides (a norm: both as its
/// input); fp32, fp16 or bf16. `weight` is the layer's own weight, or NULL where lycore_network_needs_weight says no. `stream` as in lycore_stack_apply.
///
/// # Safety
/// `x` and `y` describe memory that does not overlap; `weight` is NULL or describes memory. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_forward(
    network: *mut lycore_network,
    index: u64,
    x: *const lycore_tensor,
    weight: *const lycore_tensor,
    y: *const lycore_tensor,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (x, y, weight) = (view(x, "x")?, view(y, "y")?, optional(weight, "weight")?);
            training! {
                on_network(network, |n| {
                    in_scope(y.device(), stream, |_| {
                        let weight = weight.as_ref().map(blob).transpose()?;
                        Ok(n.network.forward(index as usize, &blob(&x)?, weight.as_ref(), &blob(&y)?)?)
                    })
                })
            }
        })
    }
}

/// The backward of lycore_network_forward: adds the gradients of the module's parameters to the network's, and, unless it is NULL, the
/// gradient of x to `grad_x`. `x` and `weight` are the forward's, `grad_y` the gradient of its output; any strides.
///
/// # Safety
/// The tensors describe memory that does not overlap; `weight` and `grad_x` may be NULL. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_backward(
    network: *mut lycore_network,
    index: u64,
    x: *const lycore_tensor,
    weight: *const lycore_tensor,
    grad_y: *const lycore_tensor,
    grad_x: *const lycore_tensor,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (x, grad_y) = (view(x, "x")?, view(grad_y, "grad_y")?);
            let (weight, grad_x) = (optional(weight, "weight")?, optional(grad_x, "grad_x")?);
            training! {
                on_network(network, |n| {
                    in_scope(x.device(), stream, |_| {
                        let weight = weight.as_ref().map(blob).transpose()?;
                        let grad_x = grad_x.as_ref().map(blob).transpose()?;
                        let (x, grad_y) = (blob(&x)?, blob(&grad_y)?);
                        let gradient =
                            n.network.backward(index as usize, &x, weight.as_ref(), &grad_y, grad_x.is_some())?;
                        if let (Some(to), Some(gradient)) = (grad_x, gradient) {
                            n.network.add_input(index as usize, &to, &gradient, &grad_y)?;
                        }
                        Ok(())
                    })
                })
            }
        })
    }
}

/// One optimizer step from the gradients summed so far: clip, update, clear. In the middle of an accumulation it only counts.
///
/// With `out` it waits for the device and tells what it did. A gradient that is not finite is LYCORE_TRAIN; parameters, state and step count
/// are then as before. With `out` NULL it tells nothing: such a gradient is cleared, nothing else changes, and lycore_network_results tells
/// of it later. It does not wait then (optimizers other than those that lycore_network_hold takes do, for the norm).
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
                on_network(network, |n| {
                    in_scope(n.device, stream, |_| match out.as_mut() {
                        None => Ok(n.network.step_ahead()?),
                        Some(out) => {
                            out.tell(n.network.step()?);
                            Ok(())
                        }
                    })
                })
            }
        })
    }
}

/// What the last step did, and how many were left out since this was last told, by it or by lycore_network_step. Waits for all work on the
/// device. `updated` is whether that step changed the parameters.
///
/// # Safety
/// `out` points to a struct whose struct_size is set. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_results(
    network: *mut lycore_network,
    out: *mut lycore_step,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            boundary::sized(out, "out")?;
            training! {
                (*out).tell(on_network(network, |n| Ok(n.network.results()?))?);
                Ok(())
            }
        })
    }
}

/// While a network is held, steps change nothing but the gradients, which they clear. For CUDA graphs:
///
/// A whole step (forward, backward, lycore_network_step with `out` NULL on the capturing stream, once per micro-batch of the accumulation) can be
/// captured, with every optimizer but Prodigy with a first beta of 0, on a GPU that the library has kernels for;
/// LYCORE_UNSUPPORTED otherwise. The count of steps, the learning rate and whether a gradient is finite are kept on the device, so a
/// replay is a step like any other. In this order: hold; run the step once or more, so that all that is made on first use is there; let go;
/// capture; then before each launch lycore_network_prepare_replay, and lycore_network_results whenever something is to be told. Saving and
/// loading may come between replays. The graph must not be launched once the network is freed.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_hold(
    network: *mut lycore_network,
    held: bool,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            training! { on_network(network, |n| in_scope(n.device, stream, |_| Ok(n.network.hold(held)?))) }
        })
    }
}

/// Tells that a captured graph in which the network does `updates` updates (at most 4096) is about to be launched on `stream`: makes sure that
/// their learning rates are on the device. Waits for the stream once in some thousand updates. A replay that comes without it is left out once
/// the rates are used up, and lycore_network_results says so.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_network_prepare_replay(
    network: *mut lycore_network,
    updates: u64,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            training! {
                on_network(network, |n| in_scope(n.device, stream, |_| Ok(n.network.prepare_replay(updates)?)))
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
                        LYCORE_BUFFER_EMA => (2, n.network.ema()?),
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
/// (more than 0 in the middle of a gradient accumulation). Waits for the device if there were steps that nobody waited for.
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
                (*steps, *micro_steps) = on_network(network, |n| Ok(n.network.progress()?))?;
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

/// Ends of epochs told to lycore_network_checkpoint, those before lycore_network_load_state too: a run that was stopped between the last step of an
/// epoch and its end has one less than its steps say. 0 when `network` is not a live network.
#[no_mangle]
pub extern "C" fn lycore_network_epochs(network: *const lycore_network) -> u64 {
    boundary::value(0, || training! { on_network(network, |n| Ok(n.network.epochs())) })
}

/// Frees the network; what was not saved is gone. NULL is accepted; a second free returns LYCORE_BAD_HANDLE and does nothing.
#[no_mangle]
pub extern "C" fn lycore_network_free(network: *mut lycore_network) -> lycore_status {
    #[cfg(feature = "torch")]
    return handle::free::<Held>(network.cast());
    #[cfg(not(feature = "torch"))]
    return if network.is_null() { lycore_status::LYCORE_OK } else { lycore_status::LYCORE_BAD_HANDLE };
}
