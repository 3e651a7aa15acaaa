//! The door to the CUDA driver: devices, streams, memory, and the kernels that `build/kernels.rs` embedded. Knows nothing of adapters
//! and needs neither libtorch nor the CUDA toolkit: the driver's library is looked up at run time.
//!
//! The host (torch, mostly) owns the device. So: its primary context, pushed for the length of a call and popped again; its streams,
//! with all work ordered on them; no call that waits for the whole device ([`Gpu::synchronize`] alone does, and says so), and none that
//! allocates or frees in a way that does.
//!
//! Order between calls on different streams is kept by events ([`Gpu::on`]): a call's stream first waits for all that ended before
//! it, and leaves an event behind. Memory may therefore be dropped at any time: it is freed on a stream of this library's own, behind
//! those events, or where that would keep a caller waiting by a thread (`release.rs`).

mod images;
mod memory;
mod queue;
mod release;
#[cfg(test)]
mod tests;

pub use memory::{Buffer, Pinned, ALIGN};
pub use queue::{Arg, Launcher, Queue};

use crate::error::{Error, Result};
use cudarc::driver::sys;
use once_cell::sync::{Lazy, OnceCell};
use parking_lot::Mutex;
use std::ffi::{c_int, c_void, CStr};
use std::marker::PhantomData;

/// What the device's memory pool keeps for the next allocation instead of giving it back to the system: enough that a merge's tables
/// and factors cost no system call, too little for another program to miss.
const POOL_KEEPS: u64 = 64 << 20;

/// A `cudaStream_t` of the caller. NULL and `(void *)1` both mean the legacy default stream, and so does `Stream::default()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(usize);

/// CU_STREAM_LEGACY: what NULL means, whatever the process was compiled with.
const LEGACY: usize = 1;
/// CU_STREAM_PER_THREAD: another stream in every thread, so no other thread could order its work behind it.
const PER_THREAD: usize = 2;

impl Default for Stream {
    fn default() -> Self {
        Stream(LEGACY)
    }
}

impl Stream {
    /// The stream behind a handle of the host.
    ///
    /// # Safety
    /// `handle` is NULL, 1, or a stream that lives until the calls that it is passed to have returned.
    pub unsafe fn from_raw(handle: *mut c_void) -> Self {
        match handle as usize {
            0 => Stream::default(),
            other => Stream(other),
        }
    }

    fn raw(self) -> sys::CUstream {
        self.0 as sys::CUstream
    }
}

/// The number of devices, or why there are none: no driver, no device, or a library without kernels.
pub fn devices() -> Result<usize> {
    static DEVICES: Lazy<Result<usize, (String, &'static str)>> = Lazy::new(count);
    match &*DEVICES {
        Ok(n) => Ok(*n),
        Err((what, hint)) => Err(Error::Device { what: what.clone(), hint: (*hint).into() }),
    }
}

fn count() -> Result<usize, (String, &'static str)> {
    const DRIVER: &str = "install the GPU's driver, or merge on the CPU";
    // SAFETY: opens the driver's library by its names; its initialisers have no conditions. Everything else panics without it.
    if !unsafe { sys::is_culib_present() } {
        return Err(("no CUDA driver (libcuda.so.1) on this machine".into(), DRIVER));
    }
    let mut version: c_int = 0;
    // SAFETY: the pointer is to a live integer; this function may be called before cuInit.
    if failed(unsafe { sys::cuDriverGetVersion(&mut version) }) || version < 11_020 {
        let what = format!("the CUDA driver is too old: it serves CUDA {}", dotted(version));
        return Err((what, "update the GPU's driver: 11.2 is the least"));
    }
    let mut devices: c_int = 0;
    // SAFETY: cuInit takes no pointer and may be repeated; the pointer is to a live integer.
    let code = unsafe {
        match sys::cuInit(0) {
            sys::CUresult::CUDA_SUCCESS => sys::cuDeviceGetCount(&mut devices),
            code => code,
        }
    };
    if failed(code) {
        return Err((
            format!("the CUDA driver does not start: {}", describe(code)),
            "is CUDA_VISIBLE_DEVICES right?",
        ));
    }
    if devices < 1 {
        return Err(("the CUDA driver sees no device".into(), "is CUDA_VISIBLE_DEVICES right?"));
    }
    if images::IMAGES.is_empty() {
        let hint =
            "build it where NVRTC is found: put the Python that holds torch on the PATH, or set LYCORE_NVRTC";
        return Err(("this library was built without its CUDA kernels".into(), hint));
    }
    Ok(devices as usize)
}

/// The driver's 12040 as 12.4.
fn dotted(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

static GPUS: OnceCell<Vec<OnceCell<Gpu>>> = OnceCell::new();

/// Device `index` as the driver numbers them (torch's `cuda:index`). Opened on first use and kept for the life of the process.
pub fn gpu(index: usize) -> Result<&'static Gpu> {
    let devices = devices()?;
    let gpus = GPUS.get_or_init(|| (0..devices).map(|_| OnceCell::new()).collect());
    let slot = gpus.get(index).ok_or_else(|| Error::Device {
        what: format!("no device cuda:{index}: the CUDA driver sees {devices}"),
        hint: "is CUDA_VISIBLE_DEVICES right?".into(),
    })?;
    slot.get_or_try_init(|| Gpu::open(index))
}

/// The devices that have been opened so far.
fn opened() -> impl Iterator<Item = &'static Gpu> {
    GPUS.get().into_iter().flatten().filter_map(OnceCell::get)
}

/// One device.
pub struct Gpu {
    index: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// Where memory is freed.
    own: sys::CUstream,
    multiprocessors: usize,
    architecture: u32,
    shared_memory: usize,
    order: Mutex<queue::Order>,
    modules: Mutex<images::Modules>,
    staging: Mutex<memory::Staging>,
}

// SAFETY: the handles belong to the process, not to a thread, and the driver may be called from all; what this library changes about
// them lies in mutexes.
unsafe impl Send for Gpu {}
// SAFETY: likewise.
unsafe impl Sync for Gpu {}

impl Gpu {
    fn open(index: usize) -> Result<Self> {
        use sys::CUdevice_attribute::*;
        let check = |code, doing: &str| check(code, || format!("cuda:{index}: {doing}"));
        let mut device = 0;
        // SAFETY: the driver is initialised (`gpu` asked `devices`); the pointer is to a live integer.
        check(unsafe { sys::cuDeviceGet(&mut device, index as c_int) }, "opening the device")?;
        let ask = |attribute| {
            let mut value: c_int = 0;
            // SAFETY: likewise.
            let code = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
            check(code, "asking its properties")?;
            Ok::<_, Error>(value as u32)
        };
        let major = ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let architecture = major * 10 + ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let unusable = |what: &str, hint: &str| Error::Device {
            what: format!("cuda:{index} (sm_{architecture}) cannot be used: {what}"),
            hint: hint.into(),
        };
        if !images::IMAGES.iter().any(|image| image.serves(architecture)) {
            return Err(unusable(
                "no kernel in this library was compiled for it",
                "merge on the CPU or through libtorch",
            ));
        }
        if ask(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? == 0 {
            return Err(unusable("it has no memory pools", "update the driver; some virtual GPUs lack them"));
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: the pointer is to a live handle. Never released: the device stays open for the life of the process.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) }, "taking its primary context")?;
        let current = Current::push(context, index)?;
        let mut own = std::ptr::null_mut();
        // Non-blocking, or the legacy stream would wait for it and it for the legacy stream.
        let flag = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the pointer is to a live handle.
        check(unsafe { sys::cuStreamCreate(&mut own, flag) }, "making a stream")?;
        drop(current);
        let gpu = Gpu {
            index,
            device,
            context,
            own,
            multiprocessors: ask(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            architecture,
            shared_memory: ask(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
            order: Mutex::default(),
            modules: Mutex::default(),
            staging: Mutex::default(),
        };
        gpu.keep_some_memory()?;
        Ok(gpu)
    }

    /// Raises what the default pool keeps to [`POOL_KEEPS`]. Never lowers it: the pool may be the host's allocator, too.
    fn keep_some_memory(&self) -> Result<()> {
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let (mut pool, mut keeps) = (std::ptr::null_mut(), 0u64);
        // SAFETY: the pointers are to a live handle and to a live integer of the attribute's type, cuuint64_t.
        unsafe {
            self.check(sys::cuDeviceGetDefaultMemPool(&mut pool, self.device), || {
                "finding its memory pool".into()
            })?;
            let code = sys::cuMemPoolGetAttribute(pool, threshold, (&raw mut keeps).cast());
            self.check(code, || "asking its memory pool".into())?;
            if keeps < POOL_KEEPS {
                keeps = POOL_KEEPS;
                let code = sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut keeps).cast());
                self.check(code, || "setting up its memory pool".into())?;
            }
        }
        Ok(())
    }

    /// The number that it was opened by.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many multiprocessors it has.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Its compute capability, 90 for 9.0.
    pub fn architecture(&self) -> u32 {
        self.architecture
    }

    /// The most shared memory that a block can have, in bytes; what is over 48 KiB is asked for by [`Queue::launch`] itself.
    pub fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    /// Free and total bytes. What torch's allocator keeps for itself counts as used, what this library's pool keeps too; what is about to go
    /// back to the driver counts as free.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current; the pointers are to live integers.
        self.check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, || {
            "asking for free memory".into()
        })?;
        Ok((free + release::waiting_on(self), total))
    }

    /// Makes its context the calling thread's until the guard is dropped.
    fn enter(&self) -> Result<Current> {
        Current::push(self.context, self.index)
    }

    fn check(&self, code: sys::CUresult, doing: impl FnOnce() -> String) -> Result<()> {
        check(code, || format!("cuda:{}: {}", self.index, doing()))
    }
}

/// The calling thread's context; the one before comes back when this is dropped.
struct Current(PhantomData<*const ()>);

impl Current {
    fn push(context: sys::CUcontext, index: usize) -> Result<Self> {
        // SAFETY: the context is a retained primary context.
        let code = unsafe { sys::cuCtxPushCurrent_v2(context) };
        check(code, || format!("cuda:{index}: entering its context"))?;
        Ok(Current(PhantomData))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: undoes the push of this thread (`Current` is not Send); the pointer is to a live handle.
        unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
    }
}

fn failed(code: sys::CUresult) -> bool {
    code != sys::CUresult::CUDA_SUCCESS
}

/// `CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access was encountered`.
fn describe(code: sys::CUresult) -> String {
    let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
    // SAFETY: the pointers are to live pointers; the driver sets them to NULL or to text of its own that is never freed.
    let words = unsafe {
        sys::cuGetErrorName(code, &mut name);
        sys::cuGetErrorString(code, &mut text);
        [name, text].map(|p| if p.is_null() { "unknown".into() } else { CStr::from_ptr(p).to_string_lossy() })
    };
    format!("{} ({}): {}", words[0], code as u32, words[1])
}

/// The driver's answer as a `Result`; `doing` says what was tried, and where.
fn check(code: sys::CUresult, doing: impl FnOnce() -> String) -> Result<()> {
    if !failed(code) {
        return Ok(());
    }
    let what = format!("{}: {}", doing(), describe(code));
    let hint = match code as u32 {
        2 => "free some GPU memory (in Python: torch.cuda.empty_cache())".into(),
        // The image does not suit the device or the driver.
        200 | 209 | 218 | 222 | 223 => format!(
            "the kernels were compiled by NVRTC {}: update the GPU's driver to that CUDA, or build with an older NVRTC",
            images::NVRTC
        ),
        // The context is lost, by this library or by another: nothing works in this process any more.
        700 | 702 | 710 | 714..=719 => "restart the process; CUDA_LAUNCH_BLOCKING=1 shows which launch fails".into(),
        900..=908 => "while a CUDA graph is captured, call only what says that it can be captured".into(),
        _ => return Err(Error::Backend(what)),
    };
    Err(Error::Device { what, hint })
}
