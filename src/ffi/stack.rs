//! Stack: weights of the host, adapters on them, strengths.

use super::adapter::{held, lycore_adapter};
use super::boundary::{self, c_text, Failure, Outcome};
use super::handle;
use super::progress::{self, lycore_progress};
use super::status::lycore_status::LYCORE_BAD_ARGUMENT;
use super::status::{lycore_error, lycore_status};
use super::tensor::{in_scope, lycore_slice, lycore_tensor, slice, view};
use crate::algo::{self, Group};
use crate::error::Error;
use crate::merge::bypass::Geometry;
use crate::merge::ops::{Op, Region, Storage, Term};
use crate::merge::plan::Strengths;
use crate::merge::restore::BackupPlace;
use crate::merge::stack::Stack;
use crate::merge::Work;
use crate::view::{Slice, Tensor};
use parking_lot::Mutex;
use std::ffi::{c_char, c_void};
use std::sync::Arc;

/// Weights of the host, adapters on them, strengths. One call at a time; a second thread gets LYCORE_BUSY. Freed with lycore_stack_free.
pub struct lycore_stack {
    _opaque: [u8; 0],
}

/// Keep the pristine weights on the weights' own device: fastest.
pub const LYCORE_BACKUP_DEVICE: i32 = 0;
/// Keep the pristine weights in host memory.
pub const LYCORE_BACKUP_HOST: i32 = 1;
/// Keep them on the device where there is room for them, else compactly, else in host memory; lycore_stack_info says which and why.
pub const LYCORE_BACKUP_AUTO: i32 = 2;
/// Keep no copies: fp16 and bf16 weights on a GPU are merged in place, and what rounding lost of them, a quarter of their size, is kept on their
/// device (more where an adapter changes them beyond recognition). lycore_stack_apply waits for the stream then. Weights that this cannot serve
/// (other dtypes, strides, adapters that read the weight) are copied to where there is room.
pub const LYCORE_BACKUP_COMPACT: i32 = 3;

/// The user's numbers for one adapter. 1 is the usual strength, 0 is none, negative ones are allowed.
#[repr(C)]
pub struct lycore_strengths {
    /// sizeof(lycore_strengths).
    pub struct_size: u64,
    /// For the modules of the U-Net (or of whatever denoises).
    pub unet: f64,
    /// For the modules of text encoders.
    pub text_encoder: f64,
    /// Number of entries in the two arrays below.
    pub module_count: u64,
    /// Names of modules as the file spells them; `*` stands for any text. The last match wins over the two numbers above. May be NULL when
    /// module_count is 0.
    pub module_patterns: *const *const c_char,
    /// Their strengths.
    pub module_strengths: *const f64,
}

/// What lycore_stack_apply did.
#[repr(C)]
pub struct lycore_applied {
    /// sizeof(lycore_applied), set by the caller.
    pub struct_size: u64,
    /// Weights written.
    pub changed: u64,
    /// Weights under adapters that already were as wanted.
    pub kept: u64,
}

/// How a convolution slides over its input. Each array has one value per spatial axis.
#[repr(C)]
pub struct lycore_geometry {
    /// sizeof(lycore_geometry).
    pub struct_size: u64,
    /// Number of spatial axes, 1 to 3.
    pub axes: u64,
    /// Steps; NULL: 1 everywhere.
    pub stride: *const i64,
    /// Zeros on both sides; NULL: 0 everywhere.
    pub padding: *const i64,
    /// Distances between taps; NULL: 1 everywhere.
    pub dilation: *const i64,
    /// Groups of channels; 0 or 1: one.
    pub groups: u64,
}

/// One module given by its tensors, at one strength, on all or a slice of a weight.
#[repr(C)]
pub struct lycore_patch {
    /// sizeof(lycore_patch).
    pub struct_size: u64,
    /// Number of entries in the two arrays below.
    pub count: u64,
    /// Canonical names, as lycore_adapter_tensor gives them: "lora_up.weight", "lora_down.weight", "alpha", "hada_w1_a", ..
    pub names: *const *const c_char,
    /// The tensors: row-major, in host memory or on the weight's device; numbers ("alpha", "on_input", "scalar", "reshape_weight") in host
    /// memory.
    pub tensors: *const lycore_tensor,
    /// The user's number.
    pub strength: f64,
    /// NULL: the whole weight.
    pub slice: *const lycore_slice,
}

/// # Safety
/// `given` is NULL or points to a struct as described.
pub(super) unsafe fn strengths(given: *const lycore_strengths) -> Outcome<Strengths> {
    if given.is_null() {
        return Ok(Strengths::uniform(1.0));
    }
    // SAFETY: the caller's promises.
    unsafe {
        let given = boundary::sized(given, "strengths")?;
        let patterns = boundary::array(given.module_patterns, given.module_count, "module_patterns")?;
        let values = boundary::array(given.module_strengths, given.module_count, "module_strengths")?;
        let mut modules = Vec::with_capacity(patterns.len());
        for (pattern, value) in patterns.iter().zip(values) {
            modules.push((boundary::text(*pattern, "module_patterns")?.to_owned(), *value));
        }
        Ok(Strengths { unet: given.unet, text_encoder: given.text_encoder, modules })
    }
}

/// # Safety
/// `given` is NULL or points to a struct as described.
pub(super) unsafe fn geometry(given: *const lycore_geometry) -> Outcome<Geometry> {
    if given.is_null() {
        return Ok(Geometry::default());
    }
    // SAFETY: the caller's promises.
    unsafe {
        let given = boundary::sized(given, "geometry")?;
        if !(1..=3).contains(&given.axes) {
            let message = format!("`geometry`: axes is {}, it must be 1 to 3", given.axes);
            return Err(Failure::boundary(LYCORE_BAD_ARGUMENT, message));
        }
        let values = |data: *const i64, default: usize, name: &'static str| -> Outcome<Vec<usize>> {
            if data.is_null() {
                return Ok(vec![default]);
            }
            super::tensor::shape(boundary::array(data, given.axes, name)?, name)
        };
        Ok(Geometry {
            stride: values(given.stride, 1, "stride")?,
            padding: values(given.padding, 0, "padding")?,
            dilation: values(given.dilation, 1, "dilation")?,
            groups: (given.groups as usize).max(1),
        })
    }
}

/// Runs `work` on a stack, locked.
fn on_stack<T>(stack: *const lycore_stack, work: impl FnOnce(&mut Stack) -> Outcome<T>) -> Outcome<T> {
    let stack: Arc<Mutex<Stack>> = handle::get(stack.cast(), "stack")?;
    let mut stack = handle::lock(&stack, "stack")?;
    work(&mut stack)
}

/// A new stack without weights and adapters. `backup` is LYCORE_BACKUP_DEVICE, LYCORE_BACKUP_HOST, LYCORE_BACKUP_AUTO or
/// LYCORE_BACKUP_COMPACT.
///
/// # Safety
/// `out` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_new(
    backup: i32,
    out: *mut *mut lycore_stack,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let out = boundary::out(out, "out")?;
            let place = match backup {
                LYCORE_BACKUP_DEVICE => BackupPlace::Device,
                LYCORE_BACKUP_HOST => BackupPlace::Host,
                LYCORE_BACKUP_AUTO => BackupPlace::Auto,
                LYCORE_BACKUP_COMPACT => BackupPlace::Compact,
                other => {
                    let message = format!(
                        "`backup` is {other}, it must be LYCORE_BACKUP_DEVICE, LYCORE_BACKUP_HOST, LYCORE_BACKUP_AUTO or LYCORE_BACKUP_COMPACT"
                    );
                    return Err(Failure::boundary(LYCORE_BAD_ARGUMENT, message));
                }
            };
            *out = handle::new(Mutex::new(Stack::new(place))).cast();
            Ok(())
        })
    }
}

/// Registers a weight: fp32, fp16, bf16 or fp8 (see lycore_stack_set_scale), any strides, [out, in] or [out, in / groups, kernel..], under the host's own name (with or
/// without ".weight"); or a layer's bias [out], under a name that ends in ".bias"; or a norm's weight [channels]. All weights come before the first adapter. The memory must stay valid until the stack is freed; apply and restore
/// write it, and from the first apply until restore its content is the stack's: what the host writes meanwhile is lost. The same memory can be
/// registered once; ranges that overlap in part, and two stacks on one weight, are the caller's to avoid.
///
/// # Safety
/// `name` is a NUL-terminated UTF-8 string; `weight` describes memory as said. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_add_target(
    stack: *mut lycore_stack,
    name: *const c_char,
    weight: *const lycore_tensor,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (name, weight) = (boundary::text(name, "name")?, view(weight, "weight")?);
            on_stack(stack, |stack| Ok(stack.add_target(name, weight).map(drop)?))
        })
    }
}

/// Makes `spelling`, a module's name in adapter files, mean the registered weight `target`, or a slice of it (`slice` may be NULL).
/// Wins over the built-in rules.
///
/// # Safety
/// `spelling` and `target` are NUL-terminated UTF-8 strings; `slice` is NULL or points to a slice. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_add_alias(
    stack: *mut lycore_stack,
    spelling: *const c_char,
    target: *const c_char,
    slice: *const lycore_slice,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (spelling, target) =
                (boundary::text(spelling, "spelling")?, boundary::text(target, "target")?);
            let slice = self::slice(slice);
            on_stack(stack, |stack| Ok(stack.add_alias(spelling, target, slice)?))
        })
    }
}

/// Whether adapters made for another family of models (a Flux LoRA on SDXL) are taken as far as they fit (`allow` not 0), rather than refused
/// with LYCORE_KEY, which names both families; refused by default. An adapter that fits as a whole is never refused.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_allow_other_families(
    stack: *mut lycore_stack,
    allow: i32,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            on_stack(stack, |stack| {
                stack.allow_other_families(allow != 0);
                Ok(())
            })
        })
    }
}

/// Results are rounded to nearest even.
pub const LYCORE_ROUNDING_NEAREST: i32 = 0;
/// Results in weights of 8 bits are rounded up or down with the probability of the distance; others to nearest.
pub const LYCORE_ROUNDING_STOCHASTIC: i32 = 1;

/// How results are rounded into weights of 8 bits: LYCORE_ROUNDING_NEAREST (the default) or LYCORE_ROUNDING_STOCHASTIC. Either way what is
/// beyond the largest number of the dtype becomes that number, but for an infinity where the dtype has it. A weight's noise depends on `seed`, on its name and on nothing else: the same strengths give
/// the same bits. Comes before the first adapter.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_set_rounding(
    stack: *mut lycore_stack,
    rounding: i32,
    seed: u32,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let seed = match rounding {
                LYCORE_ROUNDING_NEAREST => None,
                LYCORE_ROUNDING_STOCHASTIC => Some(seed),
                other => {
                    let message = format!(
                        "`rounding` is {other}, it must be LYCORE_ROUNDING_NEAREST or LYCORE_ROUNDING_STOCHASTIC"
                    );
                    return Err(Failure::boundary(LYCORE_BAD_ARGUMENT, message));
                }
            };
            on_stack(stack, |stack| Ok(stack.set_rounding(seed)?))
        })
    }
}

/// The real weight `target`, of 8 bits, is `scale` times what is stored; so is what is written. 1 by default. Comes before the first adapter.
///
/// # Safety
/// `target` is a NUL-terminated UTF-8 string. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_set_scale(
    stack: *mut lycore_stack,
    target: *const c_char,
    scale: f32,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let target = boundary::text(target, "target")?;
            on_stack(stack, |stack| Ok(stack.set_scale(target, scale)?))
        })
    }
}

/// Whether every weight that gets its base back is compared with a checksum that was taken before it was first changed (`on` not 0; off by
/// default). A difference is LYCORE_BACKEND with the names: something else wrote the weight or its copy. Costs a read of every changed weight, and
/// the calls wait for it. Takes effect with the next copies.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_self_check(
    stack: *mut lycore_stack,
    on: i32,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            on_stack(stack, |stack| {
                stack.self_check(on != 0);
                Ok(())
            })
        })
    }
}

/// What the stack holds and how it works, as JSON: {"device": "cuda:0", "executor": "kernels", "libtorch" or "cpu", "targets": n, "adapters": n,
/// "backup": null before the first apply, else {"mode": "device", "host" or "compact", "why": text, "weights": n, "bytes": n}, "self_check": bool}.
/// `json` becomes a text that the caller frees with lycore_text_free.
///
/// # Safety
/// `json` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_info(
    stack: *mut lycore_stack,
    json: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let json = boundary::out(json, "json")?;
            let info = on_stack(stack, |stack| Ok(stack.info()))?;
            *json = handle::new_text(c_text(&info.to_string()));
            Ok(())
        })
    }
}

/// Puts an adapter on the stack and gives it a number in `id`. `strengths` may be NULL: 1 everywhere. Takes effect with the next apply.
/// An adapter of which no module finds its weight is LYCORE_KEY. The handle may be freed afterwards.
///
/// # Safety
/// `strengths` is NULL or points to a struct as described; `id` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_add_adapter(
    stack: *mut lycore_stack,
    adapter: *const lycore_adapter,
    strengths: *const lycore_strengths,
    id: *mut u64,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let id = boundary::out(id, "id")?;
            let (held, strengths) = (held(adapter)?, self::strengths(strengths)?);
            *id = on_stack(stack, |stack| Ok(stack.add_adapter(held.adapter.clone(), strengths)?))?;
            Ok(())
        })
    }
}

/// Sets the strengths of adapter `id`. Takes effect with the next apply.
///
/// # Safety
/// `strengths` is NULL (1 everywhere) or points to a struct as described. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_set_strengths(
    stack: *mut lycore_stack,
    id: u64,
    strengths: *const lycore_strengths,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let strengths = self::strengths(strengths)?;
            on_stack(stack, |stack| Ok(stack.set_strengths(id, strengths)?))
        })
    }
}

/// Takes adapter `id` off the stack. Takes effect with the next apply.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_remove_adapter(
    stack: *mut lycore_stack,
    id: u64,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe { boundary::run(error, || on_stack(stack, |stack| Ok(stack.remove_adapter(id)?))) }
}

/// Writes every weight whose adapters or strengths changed: W' = W + sum of strength * delta(W), from the pristine W, summed in fp32 and
/// rounded once. Progress counts weights. `stream` is a cudaStream_t for weights on a GPU (NULL and (void *)1: see the top of this file); the work
/// is enqueued there and not waited for, except where copies of weights go to host memory. `applied` may be NULL.
/// After an error or a cancel all weights are the base again.
///
/// # Safety
/// `progress` and `applied` are NULL or point to structs as described. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_apply(
    stack: *mut lycore_stack,
    stream: *mut c_void,
    progress: *const lycore_progress,
    applied: *mut lycore_applied,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            if !applied.is_null() {
                boundary::sized(applied, "applied")?;
            }
            let done = on_stack(stack, |stack| {
                progress::with(progress, |progress| {
                    in_scope(stack.device(), stream, |stream| Ok(stack.apply(stream, progress)?))
                })
            })?;
            if let Some(applied) = applied.as_mut() {
                applied.changed = done.changed as u64;
                applied.kept = done.kept as u64;
            }
            Ok(())
        })
    }
}

/// Gives every weight its base back, bit for bit, and frees the copies. Adapters and strengths stay on the stack. `stream` as in apply.
///
/// # Safety
/// `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_restore(
    stack: *mut lycore_stack,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            on_stack(stack, |stack| in_scope(stack.device(), stream, |stream| Ok(stack.restore(stream)?)))
        })
    }
}

/// The bypass: adds to `y` what the adapters add to the output of the layer with weight `target`, at the strengths as they are set, without
/// touching the weight. (If they are merged into it too, they count twice. What they do to the layer's bias is not part of it: merge that into
/// the bias.) Linear: x [.., in], y [.., out], `geometry` NULL. Convolution:
/// x [batch, in, spatial..], y [batch, out, spatial..].
/// Both row-major, on the same device. `stream` as in apply.
///
/// # Safety
/// `target` is a NUL-terminated UTF-8 string; `geometry` is NULL or points to a struct as described; `x` and `y` describe memory as said, which does
/// not overlap. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_forward(
    stack: *mut lycore_stack,
    target: *const c_char,
    geometry: *const lycore_geometry,
    x: *const lycore_tensor,
    y: *const lycore_tensor,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (target, geometry) = (boundary::text(target, "target")?, self::geometry(geometry)?);
            let (x, y) = (view(x, "x")?, view(y, "y")?);
            on_stack(stack, |stack| {
                in_scope(y.device(), stream, |_| Ok(stack.forward(target, &geometry, &x, &y)?))
            })
        })
    }
}

/// The load report of adapter `id` as JSON: as lycore_adapter_report, with "matched" and "unmatched" in the summary, "target" in every
/// module (null when it found none; a list when the model keeps apart what the module has in one; "slice": {"axis", "start", "length"} when it is
/// a part), "bias" and "bias_slice" likewise where the module changes the layer's bias, and "nearest" beside unmatched keys. `json` becomes a
/// text that the caller frees with lycore_text_free.
///
/// # Safety
/// `json` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_stack_report(
    stack: *mut lycore_stack,
    id: u64,
    json: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let json = boundary::out(json, "json")?;
            let report = on_stack(stack, |stack| Ok(stack.report(id)?))?;
            *json = handle::new_text(c_text(&report.to_string()));
            Ok(())
        })
    }
}

/// Frees the stack and its copies of weights; does not touch the weights, so restore first if they shall be the base. NULL is accepted; a
/// second free returns LYCORE_BAD_HANDLE and does nothing.
#[no_mangle]
pub extern "C" fn lycore_stack_free(stack: *mut lycore_stack) -> lycore_status {
    handle::free::<Mutex<Stack>>(stack.cast())
}

/// Merges patches into one weight, in place, in one pass: for hosts that do their own bookkeeping of weights. `name` is used in errors; one that
/// ends in ".bias" says that the weight is a layer's bias, and the patches do to it what they do to a bias.
/// `stream` as in lycore_stack_apply. The patches' memory is not used after the call (on a GPU: after the enqueued work).
///
/// # Safety
/// `name` is a NUL-terminated UTF-8 string; `weight` describes memory that may be written; `patches` points to `count` structs as
/// described. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_weight_merge(
    name: *const c_char,
    weight: *const lycore_tensor,
    patches: *const lycore_patch,
    count: u64,
    stream: *mut c_void,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let (name, weight) = (boundary::text(name, "name")?, view(weight, "weight")?);
            let mut ready: Vec<(Vec<Op>, f64, Option<Slice>)> = Vec::new();
            for patch in boundary::array(patches, count, "patches")? {
                let patch = boundary::sized(patch, "patches")?;
                ready.push(lower(name, weight.shape(), patch)?);
            }
            let terms: Vec<Term<'_>> = ready
                .iter()
                .flat_map(|(ops, strength, slice)| {
                    ops.iter().map(|op| Term { op, strength: *strength, slice: *slice })
                })
                .collect();
            in_scope(weight.device(), stream, |stream| {
                let (base, out, storage) = (&weight, &weight, Storage::default());
                let job = Work { name, base, out, storage, terms: &terms, pristine: None };
                Ok(crate::merge::merge(stream, &job, &mut Default::default())?)
            })
        })
    }
}

/// # Safety
/// The patch's pointers are as its description says.
unsafe fn lower(name: &str, shape: &[usize], patch: &lycore_patch) -> Outcome<(Vec<Op>, f64, Option<Slice>)> {
    // SAFETY: the caller's promises; the tensors are used within the call only, so nothing has to keep them.
    unsafe {
        let names = boundary::array(patch.names, patch.count, "patch.names")?;
        let tensors = boundary::array(patch.tensors, patch.count, "patch.tensors")?;
        let mut group = Group::default();
        for (slot, tensor) in names.iter().zip(tensors) {
            let slot = boundary::text(*slot, "patch.names")?;
            let Some(slot) = algo::known(slot) else {
                return Err(Error::Unsupported {
                    what: format!("`{name}`: no algorithm has a tensor `{slot}`"),
                    hint: String::new(),
                }
                .into());
            };
            if group.get(slot).is_some() {
                return Err(Failure::boundary(
                    LYCORE_BAD_ARGUMENT,
                    format!("`{name}`: `{slot}` is given twice"),
                ));
            }
            group.tensors.push((slot, Tensor::new(view(tensor, "patch.tensors")?, Arc::new(()))));
        }
        let slice = slice(patch.slice);
        let region = Region::of(name, shape, slice)?;
        if !patch.strength.is_finite() {
            return Err(Failure::boundary(
                LYCORE_BAD_ARGUMENT,
                format!("`{name}`: strength is {}", patch.strength),
            ));
        }
        let module = algo::read(name, group)?;
        let ops = match name.ends_with(".bias") {
            true => module.lower_bias(name, &region.shape)?,
            false => module.lower(name, &region.shape)?,
        };
        Ok((ops, patch.strength, slice))
    }
}
