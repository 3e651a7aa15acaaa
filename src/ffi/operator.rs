//! Modules as an operator of libtorch, for hosts whose graph is libtorch's own: forward and backward without a call through the host's
//! language. Exists in the build with libtorch only.

use super::boundary::{self, Failure, Outcome};
use super::network::{lycore_network, on_network};
use crate::torch_ext::{self, Calls, Scope, Stream};
use std::ffi::{c_char, c_void, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};
use tch::{Device, Tensor};

/// The qualified name, registered at the first call.
pub(super) fn name() -> Outcome<&'static str> {
    Ok(torch_ext::operator(Calls { forward, backward, free_text })?)
}

unsafe extern "C" fn forward(
    network: i64,
    index: i64,
    x: *mut c_void,
    weight: *mut c_void,
    y: *mut c_void,
) -> *mut c_char {
    told(|| {
        // SAFETY: libtorch's tensors, alive during the call.
        let (x, weight, y) = unsafe { (borrowed(x), optional(weight), borrowed(y)) };
        let _scope = scope(&x)?;
        on_network(network as *const lycore_network, |n| {
            Ok(n.network.forward(index as usize, &x, weight.as_ref(), &y)?)
        })
    })
}

unsafe extern "C" fn backward(
    network: i64,
    index: i64,
    x: *mut c_void,
    weight: *mut c_void,
    grad_y: *mut c_void,
    want_input: bool,
    grad_x: *mut *mut c_void,
) -> *mut c_char {
    told(|| {
        // SAFETY: libtorch's tensors, alive during the call.
        let (x, weight, grad_y) = unsafe { (borrowed(x), optional(weight), borrowed(grad_y)) };
        let _scope = scope(&x)?;
        let gradient = on_network(network as *const lycore_network, |n| {
            Ok(n.network.backward(index as usize, &x, weight.as_ref(), &grad_y, want_input)?)
        })?;
        if let Some(gradient) = gradient {
            let mut gradient = std::mem::ManuallyDrop::new(gradient);
            // SAFETY: the caller gave the place, and takes the tensor over.
            unsafe { *grad_x = gradient.as_mut_ptr().cast() };
        }
        Ok(())
    })
}

unsafe extern "C" fn free_text(text: *mut c_char) {
    // SAFETY: made by `told`.
    drop(unsafe { CString::from_raw(text) });
}

/// # Safety
/// `tensor` points to a tensor of libtorch.
unsafe fn borrowed(tensor: *mut c_void) -> Tensor {
    // SAFETY: the caller's promise; the clone shares the memory and is freed alone.
    unsafe { Tensor::clone_from_ptr(tensor.cast()) }
}

/// # Safety
/// `tensor` is NULL or points to a tensor of libtorch.
unsafe fn optional(tensor: *mut c_void) -> Option<Tensor> {
    // SAFETY: the caller's promise.
    (!tensor.is_null()).then(|| unsafe { borrowed(tensor) })
}

/// On the stream that libtorch is on.
fn scope(x: &Tensor) -> Outcome<Scope> {
    Ok(match x.device() {
        Device::Cuda(device) => Scope::open(Some(Stream { device, handle: std::ptr::null_mut() }))?,
        _ => Scope::open(None)?,
    })
}

/// A failure as a text that names its status, which is all that passes through libtorch; NULL for none.
fn told(work: impl FnOnce() -> Outcome<()>) -> *mut c_char {
    let failure = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return std::ptr::null_mut(),
        Ok(Err(failure)) => failure,
        Err(panic) => boundary::panicked(&*panic),
    };
    let hint = match &failure {
        Failure::Error(error) => error.hint(),
        Failure::Boundary { .. } => "",
    };
    let text = format!("LyCore: {} [hint: {hint}] [status {}]", failure.message(), failure.status() as i32);
    CString::new(text.replace('\0', " ")).unwrap_or_default().into_raw()
}
