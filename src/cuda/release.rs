//! Large memory on its way back to the driver. Unmapping and unlocking it takes milliseconds that no call shall wait for, so a thread of its own
//! does it as soon as the devices are through with what uses it. Until then it counts as free: who wants as much takes it as it is.

use super::queue::Queue;
use super::{opened, sys, Gpu};
use crate::error::Result;
use memmap2::MmapMut;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::mem::ManuallyDrop;
use std::time::Duration;

/// What is mapped and unmapped at once: the driver lets nobody else in meanwhile.
const CHUNK: usize = 1 << 30;
/// How often the thread looks whether the devices are through.
const LOOK: Duration = Duration::from_millis(1);
/// How long it stays away from the driver after every piece, so that whoever waits for it gets in.
const PAUSE: Duration = Duration::from_millis(2);

/// Memory that goes back to the driver through here.
pub(super) enum Large {
    /// Device memory outside the pool, mapped in chunks.
    Mapped { gpu: &'static Gpu, address: u64, bytes: usize },
    /// Page-locked host memory.
    Locked(ManuallyDrop<MmapMut>),
}

impl Large {
    /// Device memory of at least so many bytes. Not in a stream's order: it is there when this returns.
    pub fn map(gpu: &'static Gpu, bytes: usize) -> Result<Self> {
        use sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED as RECOMMENDED;
        let _current = gpu.enter()?;
        let location =
            sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: gpu.device };
        // SAFETY: plain numbers, for which 0 means: nothing special.
        let mut kind: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        kind.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        kind.location = location;
        let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = sys::CUmemAccessDesc { location, flags };
        let check = |code| gpu.check(code, || format!("mapping {bytes} bytes"));
        let (mut unit, mut address) = (0, 0);
        // SAFETY: the context is current; the pointers are to live values.
        unsafe {
            check(sys::cuMemGetAllocationGranularity(&mut unit, &kind, RECOMMENDED))?;
        }
        let bytes = bytes.next_multiple_of(unit.max(1));
        // SAFETY: likewise.
        check(unsafe { sys::cuMemAddressReserve(&mut address, bytes, 0, 0, 0) })?;
        let mapped = chunks(address, bytes).try_for_each(|(at, size)| {
            let mut handle = 0;
            // SAFETY: the part of the reserved addresses from `at` on, which holds nothing yet. What is mapped needs its handle no more.
            unsafe {
                check(sys::cuMemCreate(&mut handle, size, &kind, 0))?;
                let mapped = check(sys::cuMemMap(at, size, 0, handle, 0));
                sys::cuMemRelease(handle);
                mapped
            }
        });
        // SAFETY: all of the addresses are mapped.
        let open = || check(unsafe { sys::cuMemSetAccess(address, bytes, &access, 1) });
        let memory = Large::Mapped { gpu, address, bytes };
        match mapped.and_then(|()| open()) {
            Ok(()) => Ok(memory),
            Err(e) => {
                memory.free();
                Err(e)
            }
        }
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        match self {
            Large::Mapped { bytes, .. } => *bytes,
            Large::Locked(map) => map.len(),
        }
    }

    /// Nothing uses it any more. What fails here fails because the context is lost, and the memory with it.
    fn free(self) {
        match self {
            Large::Mapped { gpu, address, bytes } => {
                let Ok(_current) = gpu.enter() else { return };
                // SAFETY: mapped or at least reserved by `map`, in these chunks.
                unsafe {
                    for (at, size) in chunks(address, bytes) {
                        let _ = sys::cuMemUnmap(at, size);
                    }
                    sys::cuMemAddressFree(address, bytes);
                }
            }
            Large::Locked(map) => {
                let Some(Ok(_current)) = opened().next().map(Gpu::enter) else { return };
                // SAFETY: locked by `memory::lock_pages`.
                let code = unsafe { sys::cuMemHostUnregister(map.as_ptr().cast_mut().cast()) };
                if code == sys::CUresult::CUDA_SUCCESS {
                    drop(ManuallyDrop::into_inner(map));
                }
            }
        }
    }
}

/// (address, size) of what is mapped together.
fn chunks(address: u64, bytes: usize) -> impl Iterator<Item = (u64, usize)> {
    (0..bytes).step_by(CHUNK).map(move |at| (address + at as u64, CHUNK.min(bytes - at)))
}

struct Waiting {
    memory: Large,
    /// What the devices have to pass before.
    behind: Vec<(&'static Gpu, sys::CUevent)>,
}

// SAFETY: memory that this value owns, and events that nobody else has; the driver may be called from all threads.
unsafe impl Send for Waiting {}

impl Waiting {
    fn is_over(&self) -> bool {
        self.behind.iter().all(|&(gpu, event)| gpu.has_passed(event))
    }

    fn take(self) -> Large {
        self.behind.into_iter().for_each(|(gpu, event)| gpu.recycle(event));
        self.memory
    }
}

#[derive(Default)]
struct State {
    waiting: Vec<Waiting>,
    started: bool,
    /// The process ends: the driver is not called any more.
    ended: bool,
}

static STATE: Mutex<State> = Mutex::new(State { waiting: Vec::new(), started: false, ended: false });
static CHANGED: Condvar = Condvar::new();

/// Frees memory when these devices are through with all that has been enqueued so far.
pub(super) fn later(memory: Large, devices: impl Iterator<Item = &'static Gpu>) {
    let behind: Result<Vec<_>> = devices.map(|gpu| Ok((gpu, gpu.mark()?))).collect();
    // A device that cannot be waited for may still use it: rather lose the memory than give it to somebody else.
    let Ok(behind) = behind else { return };
    let mut state = STATE.lock();
    state.waiting.push(Waiting { memory, behind });
    if !state.started {
        state.started = std::thread::Builder::new().name("lycore-release".into()).spawn(run).is_ok();
        if state.started {
            // SAFETY: a plain function. It comes before the driver's own, which was registered earlier.
            unsafe { libc::atexit(end) };
        }
    }
    CHANGED.notify_all();
}

/// Memory that waits and suits; what is enqueued on the queue's stream from here on comes after what used it before.
pub(super) fn reuse(queue: &Queue, suits: impl Fn(&Large) -> bool) -> Result<Option<Large>> {
    let mut state = STATE.lock();
    let Some(at) = state.waiting.iter().position(|waiting| suits(&waiting.memory)) else { return Ok(None) };
    for &(_, event) in &state.waiting[at].behind {
        queue.wait_behind(event)?;
    }
    Ok(Some(state.waiting.swap_remove(at).take()))
}

/// Bytes of device memory that wait.
pub(super) fn waiting_on(gpu: &Gpu) -> usize {
    let state = STATE.lock();
    let here =
        |w: &&Waiting| matches!(w.memory, Large::Mapped { gpu: other, .. } if std::ptr::eq(gpu, other));
    state.waiting.iter().filter(here).map(|w| w.memory.len()).sum()
}

/// Waits until all that suits has been freed; whether there was any.
pub(super) fn finish(suits: impl Fn(&Large) -> bool) -> bool {
    let mut state = STATE.lock();
    let mut any = false;
    while state.started && !state.ended && state.waiting.iter().any(|waiting| suits(&waiting.memory)) {
        any = true;
        CHANGED.wait_for(&mut state, LOOK);
    }
    any
}

fn run() {
    let mut state = STATE.lock();
    while !state.ended {
        match state.waiting.iter().position(Waiting::is_over) {
            Some(at) => {
                // Under the lock, so that the end of the process waits for it.
                state.waiting.swap_remove(at).take().free();
                CHANGED.notify_all();
                MutexGuard::unlocked(&mut state, || std::thread::sleep(PAUSE));
            }
            None if state.waiting.is_empty() => CHANGED.wait(&mut state),
            None => {
                CHANGED.wait_for(&mut state, LOOK);
            }
        }
    }
}

extern "C" fn end() {
    STATE.lock().ended = true;
}
