//! What tch does not bind: exact fp32 products, the caller's stream, finding libtorch's CUDA half, products in place, an operator for a
//! module in libtorch's graph.

use crate::cuda::{self, Gpu, Launcher};
use crate::error::{Error, Result};
use once_cell::sync::OnceCell;
use std::ffi::{c_char, c_int, c_void, CStr, CString};

extern "C" {
    fn lycore_ext_libtorch_address() -> *mut c_void;
    fn lycore_ext_free_text(text: *mut c_char);
    fn lycore_ext_scope_open(device: c_int, stream: *mut c_void, out: *mut *mut c_void) -> *mut c_char;
    fn lycore_ext_current_stream(device: c_int, out: *mut *mut c_void) -> *mut c_char;
    fn lycore_ext_scope_stream(scope: *mut c_void) -> *mut c_void;
    fn lycore_ext_scope_close(scope: *mut c_void);
    fn lycore_ext_product(
        out: *mut c_void,
        a: *const c_void,
        turn_a: bool,
        b: *const c_void,
        turn_b: bool,
        beta: f64,
        alpha: f64,
    ) -> *mut c_char;
    fn lycore_ext_multiply(
        a: *const c_void,
        turn_a: bool,
        b: *const c_void,
        turn_b: bool,
        out: *mut *mut c_void,
    ) -> *mut c_char;
    fn lycore_ext_register(name: *const c_char, calls: Calls) -> *mut c_char;
}

/// What libtorch's operator for a module calls; texts are errors, of `CString::into_raw`. Tensors are libtorch's, only borrowed but for
/// what `grad_x` is set to.
#[repr(C)]
pub struct Calls {
    /// Adds the module's output for x to y.
    pub forward: unsafe extern "C" fn(i64, i64, *mut c_void, *mut c_void, *mut c_void) -> *mut c_char,
    /// Adds to the network's gradients, and gives that of the input where it is wanted.
    pub backward: unsafe extern "C" fn(
        i64,
        i64,
        *mut c_void,
        *mut c_void,
        *mut c_void,
        bool,
        *mut *mut c_void,
    ) -> *mut c_char,
    /// Frees a text of the two.
    pub free_text: unsafe extern "C" fn(*mut c_char),
}

/// The name under which libtorch knows the operator of a module in training, `NAMESPACE::module`: another one for every copy of this library
/// in a process.
pub fn operator(calls: Calls) -> Result<&'static str> {
    static NAME: OnceCell<String> = OnceCell::new();
    NAME.get_or_try_init(|| {
        let space = format!("lycore_{:x}", std::ptr::addr_of!(NAME) as usize);
        let text = CString::new(space.as_str()).unwrap_or_default();
        // SAFETY: a C string; the calls keep what `Calls` says.
        failed(unsafe { lycore_ext_register(text.as_ptr(), calls) })?;
        Ok(format!("{space}::module"))
    })
    .map(String::as_str)
}

/// An error's text, taken over.
fn failed(text: *mut c_char) -> Result<()> {
    if text.is_null() {
        return Ok(());
    }
    // SAFETY: a C string that is ours to free.
    let what = unsafe {
        let what = CStr::from_ptr(text).to_string_lossy().into_owned();
        lycore_ext_free_text(text);
        what
    };
    Err(Error::Backend(format!("libtorch: {what}")))
}

/// A matrix of a product: the last axis as columns, all others as rows; or turned.
#[derive(Clone, Copy)]
pub struct Factor<'a>(pub &'a tch::Tensor, pub bool);

/// `out = beta * out + alpha * a @ b`, in place, without recording a graph. `out` may be fp32 beside factors of 16 bits: then it is summed and
/// kept in fp32.
pub fn product(out: &tch::Tensor, a: Factor, b: Factor, beta: f64, alpha: f64) -> Result<()> {
    let mut out = out.shallow_clone();
    // SAFETY: tch's tensors are pointers to libtorch's.
    failed(unsafe {
        lycore_ext_product(
            out.as_mut_ptr().cast(),
            a.0.as_ptr().cast(),
            a.1,
            b.0.as_ptr().cast(),
            b.1,
            beta,
            alpha,
        )
    })
}

/// `a @ b`.
pub fn multiply(a: Factor, b: Factor) -> Result<tch::Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: tch's tensors are pointers to libtorch's; on success `out` is one that is ours.
    unsafe {
        failed(lycore_ext_multiply(a.0.as_ptr().cast(), a.1, b.0.as_ptr().cast(), b.1, &mut out))?;
        Ok(tch::Tensor::from_ptr(out.cast()))
    }
}

/// Runs `work`, which launches kernels where libtorch's work of this thread on that device goes.
pub fn on_current_stream<T>(gpu: &'static Gpu, work: impl FnOnce(&Launcher) -> Result<T>) -> Result<T> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: `stream` is written on success: the thread's current one, which is alive.
    let stream = unsafe {
        failed(lycore_ext_current_stream(gpu.index() as c_int, &mut stream))?;
        cuda::Stream::from_raw(stream)
    };
    gpu.beside(stream, work)
}

/// A CUDA device and, unless it is NULL, a stream of the caller on it (`cudaStream_t`).
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// CUDA device index.
    pub device: usize,
    /// The handle.
    pub handle: *mut c_void,
}

/// While it lives, this thread's fp32 products are computed in fp32 and autocast is off, whatever the host set, and work goes to the
/// caller's stream, if one is given. For convolutions on a GPU, libtorch knows only a process-wide switch: meanwhile they are exact on the
/// host's other threads too.
pub struct Scope(*mut c_void);

impl Scope {
    /// Opens the scope on the calling thread, which also has to drop it.
    pub fn open(stream: Option<Stream>) -> Result<Self> {
        let (device, handle) = stream.map_or((-1, std::ptr::null_mut()), |s| (s.device as c_int, s.handle));
        if device >= 0 {
            require_cuda()?;
        }
        let mut scope = std::ptr::null_mut();
        // SAFETY: `scope` is written on success.
        unsafe {
            failed(lycore_ext_scope_open(device, handle, &mut scope))?;
        }
        Ok(Scope(scope))
    }

    /// The stream that libtorch's work goes to meanwhile (`cudaStream_t`; NULL: the legacy default stream, or a scope without a device).
    pub fn stream(&self) -> *mut c_void {
        // SAFETY: an open scope.
        unsafe { lycore_ext_scope_stream(self.0) }
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: opened by `open`, closed once.
            unsafe { lycore_ext_scope_close(self.0) }
        }
    }
}

/// Makes sure that libtorch's CUDA half is loaded and sees a device.
///
/// A linker drops `libtorch_cuda` from a program that names none of its symbols, and a host without Python never imports torch; so it is
/// opened by name from the folder of the libtorch that is loaded.
pub fn require_cuda() -> Result<()> {
    static LOADED: OnceCell<bool> = OnceCell::new();
    // The order matters: libtorch looks for its CUDA half at the first question and remembers the answer.
    let available = *LOADED.get_or_init(|| {
        open_cuda_half();
        tch::Cuda::is_available()
    });
    if available {
        return Ok(());
    }
    Err(Error::Device {
        what: "libtorch finds no CUDA device".into(),
        hint: "install a torch built for CUDA and check that `nvidia-smi` lists the card".into(),
    })
}

/// Without success where this libtorch has no CUDA half.
fn open_cuda_half() {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::uninit();
    // SAFETY: any address is a valid question to dladdr; the answer is read only if it succeeded, and its name is a C string that lives
    // as long as the library.
    let library = unsafe {
        if libc::dladdr(lycore_ext_libtorch_address(), info.as_mut_ptr()) == 0 {
            return;
        }
        CStr::from_ptr(info.assume_init().dli_fname).to_string_lossy().into_owned()
    };
    let cuda = std::path::Path::new(&library).with_file_name("libtorch_cuda.so");
    let Ok(path) = CString::new(cuda.to_string_lossy().into_owned()) else { return };
    // SAFETY: loading libtorch's own second half from beside the first.
    unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
}
