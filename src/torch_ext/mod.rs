//! What tch does not bind: exact fp32 products, the caller's stream, finding libtorch's CUDA half.

use crate::error::{Error, Result};
use once_cell::sync::OnceCell;
use std::ffi::{c_char, c_int, c_void, CStr, CString};

extern "C" {
    fn lycore_ext_libtorch_address() -> *mut c_void;
    fn lycore_ext_free_text(text: *mut c_char);
    fn lycore_ext_scope_open(device: c_int, stream: *mut c_void, out: *mut *mut c_void) -> *mut c_char;
    fn lycore_ext_scope_stream(scope: *mut c_void) -> *mut c_void;
    fn lycore_ext_scope_close(scope: *mut c_void);
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
        // SAFETY: `scope` is written on success; a returned text is ours to free.
        unsafe {
            let failure = lycore_ext_scope_open(device, handle, &mut scope);
            if !failure.is_null() {
                let text = CStr::from_ptr(failure).to_string_lossy().into_owned();
                lycore_ext_free_text(failure);
                return Err(Error::Backend(format!("libtorch: {text}")));
            }
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
