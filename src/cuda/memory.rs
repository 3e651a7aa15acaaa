//! Device memory, page-locked host memory, and the staging memory that uploads go through.

use super::{describe, opened, queue::Queue, sys, Gpu};
use crate::error::{Error, Result};
use once_cell::sync::Lazy;
use rayon::prelude::*;
use std::ffi::c_void;

/// Device memory. May be dropped at any time and on any thread, also while work on it is running: it is freed behind all work that was
/// enqueued before. Dropping does not wait.
pub struct Buffer {
    gpu: &'static Gpu,
    address: u64,
    bytes: usize,
}

impl Buffer {
    pub(super) fn new(gpu: &'static Gpu, address: u64, bytes: usize) -> Self {
        Buffer { gpu, address, bytes }
    }

    /// The device address; 0 when it is empty.
    pub fn ptr(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The device that it lies on.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // Fails only when the context is lost or the process is ending, and the memory with it.
            let _ = self.gpu.free(self.address);
        }
    }
}

/// Page-locked host memory, which every device reaches directly. Dropping waits for the work that was enqueued before, on every device
/// that is open, as a transfer may still be under way.
pub struct Pinned {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory that this value owns.
unsafe impl Send for Pinned {}
// SAFETY: likewise; shared access only reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Memory with arbitrary content. Slow (the system locks every page): allocate once, use often.
    pub fn new(gpu: &'static Gpu, bytes: usize) -> Result<Self> {
        let start = match bytes {
            0 => std::ptr::NonNull::dangling().as_ptr(),
            _ => lock_pages(gpu, bytes)?,
        };
        Ok(Pinned { start, bytes })
    }

    /// The content. Transfers into it must have ended (the contract of [`Queue::copy`]).
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory is ours and that long; the system hands its pages out zeroed, so every byte has a value.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// The content, to be written. No transfer may be under way (the contract of [`Queue::copy`]).
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: likewise, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    /// The address, the same for the host and for every device.
    pub fn ptr(&self) -> u64 {
        self.start as u64
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A device that cannot be waited for may still write: rather lose the memory than give it to somebody else.
        if self.bytes > 0 && opened().all(|gpu| gpu.settle().is_ok()) {
            // SAFETY: the memory came from cuMemHostAlloc and no transfer uses it any more.
            let _ = unsafe { sys::cuMemFreeHost(self.start.cast()) };
        }
    }
}

fn lock_pages(gpu: &Gpu, bytes: usize) -> Result<*mut u8> {
    let _current = gpu.enter()?;
    let mut start: *mut c_void = std::ptr::null_mut();
    // SAFETY: the context is current; the pointer is to a live pointer.
    let code = unsafe { sys::cuMemHostAlloc(&mut start, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
    if code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        return Err(Error::Device {
            what: format!(
                "cuda:{}: cannot lock {bytes} bytes of host memory: {}",
                gpu.index(),
                describe(code)
            ),
            hint: "free some host memory, or raise the limit of the container".into(),
        });
    }
    gpu.check(code, || format!("locking {bytes} bytes of host memory"))?;
    Ok(start.cast())
}

/// Bytes of a piece of staging memory: long enough that a transfer runs at full speed, short enough that the first begins early.
const PIECE: usize = 8 << 20;
/// Two would do (one is filled while one is sent); the third takes up what the host's copying is uneven by.
const PIECES: usize = 3;
/// Below this, copying on several threads costs more than it saves.
const WORTH_THREADS: usize = 1 << 20;

/// A ring of page-locked pieces: small uploads share a piece, large ones go through many. Kept for the life of the process.
#[derive(Default)]
pub(super) struct Staging {
    pieces: Vec<Piece>,
    current: usize,
}

struct Piece {
    start: *mut u8,
    used: usize,
    /// For each call that sent from it, the event behind its last transfer. Calls may be on different streams, so one event cannot
    /// stand for all.
    sent: Vec<(u64, sys::CUevent)>,
}

impl Staging {
    /// Copies the beginning of `bytes` into the ring and enqueues its transfer; says how many bytes that were.
    ///
    /// # Safety
    /// As [`Queue::upload`].
    pub(super) unsafe fn send(&mut self, queue: &Queue, bytes: &[u8], to: u64) -> Result<usize> {
        let gpu = queue.gpu();
        while self.pieces.len() < PIECES {
            self.pieces.push(Piece { start: lock_pages(gpu, PIECE)?, used: 0, sent: Vec::new() });
        }
        if self.pieces[self.current].used == PIECE {
            let next = (self.current + 1) % PIECES;
            let piece = &mut self.pieces[next];
            piece.sent.iter().try_for_each(|&(_, event)| gpu.wait_for(event))?;
            piece.sent.drain(..).for_each(|(_, event)| gpu.recycle(event));
            piece.used = 0;
            self.current = next;
        }
        let piece = &mut self.pieces[self.current];
        let size = bytes.len().min(PIECE - piece.used);
        let event = match piece.sent.iter().find(|(call, _)| *call == queue.call()) {
            Some(&(_, event)) => event,
            None => {
                let event = gpu.event()?;
                piece.sent.push((queue.call(), event));
                event
            }
        };
        // SAFETY: `used + size` is at most PIECE; transfers from this part have ended, as the piece was waited for when begun anew.
        let room = unsafe { std::slice::from_raw_parts_mut(piece.start.add(piece.used), size) };
        copy(&bytes[..size], room);
        // SAFETY: the caller's promise for `to`; this part of the ring is not written again before the event below has passed.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, room.as_ptr().cast(), size, queue.raw()) };
        // Transfers are fastest from whole cache lines.
        piece.used = (piece.used + size).next_multiple_of(256).min(PIECE);
        gpu.check(code, || format!("copying {size} bytes to the device"))?;
        gpu.record(event, queue.raw())?;
        Ok(size)
    }
}

/// Copies on several threads where that is faster.
fn copy(from: &[u8], to: &mut [u8]) {
    // Threads of their own, as the ring is locked meanwhile: those of the library's pool may be waiting for that very lock. For the
    // same reason a thread of any pool copies alone: waiting for others, it would pick up another task, which could want the lock.
    static COPIERS: Lazy<Option<rayon::ThreadPool>> = Lazy::new(|| {
        let threads = crate::merge::gemm::threads().min(8);
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
        builder.thread_name(|i| format!("lycore-copy-{i}")).build().ok()
    });
    if from.len() >= WORTH_THREADS && rayon::current_thread_index().is_none() {
        if let Some(pool) = &*COPIERS {
            let share = from.len().div_ceil(pool.current_num_threads()).next_multiple_of(4096);
            pool.install(|| {
                to.par_chunks_mut(share)
                    .zip(from.par_chunks(share))
                    .for_each(|(to, from)| to.copy_from_slice(from));
            });
            return;
        }
    }
    to.copy_from_slice(from);
}
