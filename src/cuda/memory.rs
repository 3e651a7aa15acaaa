//! Device memory, page-locked host memory, and the staging memory that uploads go through.

use super::queue::Queue;
use super::release::{self, Large};
use super::{describe, opened, sys, Gpu};
use crate::error::{Error, Result};
use memmap2::MmapMut;
use once_cell::sync::Lazy;
use rayon::prelude::*;
use std::mem::ManuallyDrop;

/// Alignment of what lies side by side in one piece of memory: transfers are fastest from whole cache lines, kernels want 16 bytes.
pub const ALIGN: usize = 256;

/// Device memory. May be dropped at any time and on any thread, also while work on it is running: it is freed behind all work that was
/// enqueued before. Dropping does not wait.
pub struct Buffer {
    gpu: &'static Gpu,
    address: u64,
    bytes: usize,
    /// What is mapped, of memory outside the pool; else 0.
    mapped: usize,
}

impl Buffer {
    pub(super) fn new(gpu: &'static Gpu, address: u64, bytes: usize) -> Self {
        Buffer { gpu, address, bytes, mapped: 0 }
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
        let Buffer { gpu, address, mapped, .. } = *self;
        if mapped > 0 {
            release::later(Large::Mapped { gpu, address, bytes: mapped }, std::iter::once(gpu));
        } else if self.bytes > 0 {
            // Fails only when the context is lost or the process is ending, and the memory with it.
            let _ = self.gpu.free(self.address);
        }
    }
}

/// Bytes of device memory that are mapped apart: that takes a tenth of what the pool takes to grow, and giving them back a quarter of what it takes
/// to shrink, which it does in the host's next synchronisation.
const LARGE: usize = 128 << 20;

/// Page-locked host memory, which every device reaches directly. May be dropped at any time, as a [`Buffer`].
pub struct Pinned(ManuallyDrop<MmapMut>);

impl Pinned {
    /// The content. Transfers into it must have ended (the contract of [`Queue::copy`]).
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    /// The content, to be written. No transfer may be under way (the contract of [`Queue::copy`]).
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// The address, the same for the host and for every device.
    pub fn ptr(&self) -> u64 {
        self.0.as_ptr() as u64
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: `self` is not used again.
        let map = unsafe { ManuallyDrop::take(&mut self.0) };
        release::later(Large::Locked(ManuallyDrop::new(map)), opened());
    }
}

impl Queue {
    /// As [`Queue::alloc`], for what may be large: then it lies outside the pool, and goes back to the driver as soon as nothing uses it any more
    /// without anybody's waiting for that. Not for what is wanted again and again while the device is busy: it would be mapped each time.
    pub fn alloc_large(&self, bytes: usize) -> Result<Buffer> {
        if bytes < LARGE {
            return self.alloc(bytes);
        }
        let gpu = self.gpu();
        let suits = |memory: &Large| {
            let here = matches!(memory, Large::Mapped { gpu: other, .. } if std::ptr::eq(gpu, *other));
            here && (bytes..=bytes + bytes / 8).contains(&memory.len())
        };
        let memory = match release::reuse(self, suits)? {
            Some(memory) => Ok(memory),
            None => Large::map(gpu, bytes),
        };
        match memory {
            Ok(Large::Mapped { address, bytes: mapped, .. }) => Ok(Buffer { gpu, address, bytes, mapped }),
            // The pool may have what is left, or know a device that maps nothing; and its error is for people.
            _ => self.alloc(bytes),
        }
    }

    /// Page-locked memory with arbitrary content. It is there in the stream's order: the host has to wait for the stream before it touches it.
    pub fn lock(&self, bytes: usize) -> Result<Pinned> {
        let bytes = bytes.max(1);
        let locked = |memory: &Large| matches!(memory, Large::Locked(_));
        if let Some(Large::Locked(map)) =
            release::reuse(self, |memory| locked(memory) && memory.len() == bytes)?
        {
            return Ok(Pinned(map));
        }
        // Or there would be twice as much for a while.
        release::finish(locked);
        Ok(Pinned(ManuallyDrop::new(lock_pages(self.gpu(), bytes)?)))
    }
}

/// Memory from the system in large pages, all there, then locked: seven times faster than the driver's own.
fn lock_pages(gpu: &Gpu, bytes: usize) -> Result<MmapMut> {
    let failed = |why: String| Error::Device {
        what: format!("cuda:{}: cannot lock {bytes} bytes of host memory: {why}", gpu.index()),
        hint: "free some host memory, or raise the limit of the container".into(),
    };
    let mut map = MmapMut::map_anon(bytes).map_err(|e| failed(e.to_string()))?;
    #[cfg(target_os = "linux")]
    {
        // A refusal does no harm: the pages are small, or shared with a child process until one of the two writes them.
        let _ = map.advise(memmap2::Advice::HugePage);
        let _ = map.advise(memmap2::Advice::DontFork);
    }
    let chunks: Vec<&mut [u8]> = map.chunks_mut(BLOCK).collect();
    each(bytes, chunks, |chunk| chunk.iter_mut().step_by(PAGE).for_each(|byte| *byte = 0));
    let _current = gpu.enter()?;
    // SAFETY: the context is current; whole pages that are ours, and unlocked before they are given back.
    let code = unsafe {
        sys::cuMemHostRegister_v2(map.as_mut_ptr().cast(), bytes, sys::CU_MEMHOSTREGISTER_PORTABLE)
    };
    if code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        return Err(failed(describe(code)));
    }
    gpu.check(code, || format!("locking {bytes} bytes of host memory"))?;
    Ok(map)
}

/// The smallest page that there is.
const PAGE: usize = 4096;
/// What one thread copies at once.
const BLOCK: usize = 256 << 10;
/// Bytes of a piece of staging memory: long enough that a transfer runs at full speed and that threads are worth their start, short enough that
/// the first begins early.
const PIECE: usize = 16 << 20;
/// Two would do (one is filled while one is sent); the third takes up what the host's copying is uneven by.
const PIECES: usize = 3;
/// Below this, copying on several threads costs more than it saves.
const WORTH_THREADS: usize = 1 << 20;

/// Does something with each of some parts, which have so many bytes together, on several threads where that is faster.
fn each<T: Send>(bytes: usize, parts: Vec<T>, work: impl Fn(T) + Sync + Send) {
    // Threads of their own, as the ring is locked meanwhile: those of the library's pool may be waiting for that very lock. For the
    // same reason a thread of any pool works alone: waiting for others, it would pick up another task, which could want the lock.
    static COPIERS: Lazy<Option<rayon::ThreadPool>> = Lazy::new(|| {
        let threads = crate::merge::gemm::threads().min(16);
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
        builder.thread_name(|i| format!("lycore-copy-{i}")).build().ok()
    });
    if bytes >= WORTH_THREADS && rayon::current_thread_index().is_none() {
        if let Some(pool) = &*COPIERS {
            return pool.install(|| parts.into_par_iter().for_each(work));
        }
    }
    parts.into_iter().for_each(work);
}

/// A ring of page-locked pieces: small uploads share a piece, large ones go through many. Kept for the life of the process.
#[derive(Default)]
pub(super) struct Staging {
    pieces: Vec<Piece>,
    current: usize,
}

struct Piece {
    memory: MmapMut,
    used: usize,
    /// For each call that sent from it, the event behind its last transfer. Calls may be on different streams, so one event cannot
    /// stand for all.
    sent: Vec<(u64, sys::CUevent)>,
}

/// How far an upload is.
#[derive(Clone, Copy, Default)]
pub(super) struct Cursor {
    /// Parts that are sent, and how much of the next.
    parts: usize,
    bytes: usize,
}

impl Cursor {
    /// Whether all of these are sent.
    pub fn is_over(&self, parts: &[(u64, &[u8])]) -> bool {
        self.parts == parts.len()
    }
}

/// One transfer: where it begins in a piece, its size, where it goes.
struct Transfer {
    at: usize,
    size: usize,
    to: u64,
}

impl Staging {
    /// Copies the next bytes of `parts` into the ring and enqueues their transfer.
    ///
    /// # Safety
    /// As [`Queue::upload_parts`].
    pub(super) unsafe fn send(
        &mut self,
        queue: &Queue,
        parts: &[(u64, &[u8])],
        cursor: &mut Cursor,
    ) -> Result<()> {
        let gpu = queue.gpu();
        let piece = self.begin(gpu)?;
        let event = match piece.sent.iter().find(|(call, _)| *call == queue.call()) {
            Some(&(_, event)) => event,
            None => {
                let event = gpu.event()?;
                piece.sent.push((queue.call(), event));
                event
            }
        };
        let (transfers, end) = fill(&mut piece.memory, piece.used, parts, cursor);
        piece.used = end;
        let start = piece.memory.as_ptr();
        let sent = transfers.iter().try_for_each(|&Transfer { at, size, to }| {
            // SAFETY: the caller's promise for `to`; this part of the ring is not written again before the event below has passed.
            let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, start.add(at).cast(), size, queue.raw()) };
            gpu.check(code, || format!("copying {size} bytes to the device"))
        });
        sent.and(gpu.record(event, queue.raw()))
    }

    /// A piece with room: the current one, or the next, waited for.
    fn begin(&mut self, gpu: &Gpu) -> Result<&mut Piece> {
        if self.pieces.get(self.current).is_none_or(|piece| piece.used == PIECE) {
            let next = if self.pieces.is_empty() { 0 } else { (self.current + 1) % PIECES };
            if next == self.pieces.len() {
                self.pieces.push(Piece { memory: lock_pages(gpu, PIECE)?, used: 0, sent: Vec::new() });
            }
            let piece = &mut self.pieces[next];
            piece.sent.iter().try_for_each(|&(_, event)| gpu.wait_for(event))?;
            piece.sent.drain(..).for_each(|(_, event)| gpu.recycle(event));
            piece.used = 0;
            self.current = next;
        }
        Ok(&mut self.pieces[self.current])
    }
}

/// Copies what has room into a piece of staging memory from `used` on. Parts whose targets lie closer together than [`ALIGN`] are as far apart here,
/// so that one transfer takes them. The transfers, and how much of the piece is used then.
fn fill(
    piece: &mut [u8],
    used: usize,
    parts: &[(u64, &[u8])],
    cursor: &mut Cursor,
) -> (Vec<Transfer>, usize) {
    let length = piece.len();
    let (mut transfers, mut blocks) = (Vec::<Transfer>::new(), Vec::new());
    let (mut room, mut end, mut total) = (&mut piece[used..], used, 0);
    while let Some(&(to, bytes)) = parts.get(cursor.parts) {
        let (to, rest) = (to + cursor.bytes as u64, &bytes[cursor.bytes..]);
        if rest.is_empty() {
            *cursor = Cursor { parts: cursor.parts + 1, bytes: 0 };
            continue;
        }
        let gap = transfers.last().and_then(|last| to.checked_sub(last.to + last.size as u64));
        let gap = gap.filter(|&gap| gap < ALIGN as u64).map(|gap| gap as usize);
        let start = gap.map_or(end.next_multiple_of(ALIGN), |gap| end + gap);
        if start >= length {
            end = length;
            break;
        }
        let size = rest.len().min(length - start);
        let (_, after) = room.split_at_mut(start - end);
        let (own, after) = after.split_at_mut(size);
        room = after;
        blocks.extend(own.chunks_mut(BLOCK).zip(rest[..size].chunks(BLOCK)));
        match transfers.last_mut().zip(gap) {
            Some((last, gap)) => last.size += gap + size,
            None => transfers.push(Transfer { at: start, size, to }),
        }
        (end, total) = (start + size, total + size);
        cursor.bytes += size;
    }
    each(total, blocks, |(to, from)| to.copy_from_slice(from));
    (transfers, end.next_multiple_of(ALIGN).min(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_arrive_whole_through_pieces_of_any_size() {
        let sizes = [0, 1, 255, 256, 257, 3000, 0, 700, 12, 600_000];
        let sources: Vec<Vec<u8>> = (0u8..)
            .zip(sizes)
            .map(|(i, n)| (0..n).map(|b| (b as u8).wrapping_mul(7) ^ i).collect())
            .collect();
        for (gap, piece) in
            [(0, 4096), (100, 1024), (255, 512), (256, 4096), (5000, 768), (0, 1 << 20), (300, 1 << 20)]
        {
            let mut at = 0x1000;
            let mut parts: Vec<(u64, &[u8])> = Vec::new();
            for source in &sources {
                parts.push((at, source));
                at += (source.len() + gap) as u64;
            }
            let mut device = vec![0xeeu8; at as usize];
            let (mut cursor, mut used, mut transfers) = (Cursor::default(), 300, 0);
            let mut memory = vec![0u8; piece];
            while !cursor.is_over(&parts) {
                let (sent, end) = fill(&mut memory, used, &parts, &mut cursor);
                assert!(end > used && end <= piece, "it goes on");
                for Transfer { at, size, to } in &sent {
                    device[*to as usize..][..*size].copy_from_slice(&memory[*at..][..*size]);
                }
                used = if end == piece { 0 } else { end };
                transfers += sent.len();
            }
            for &(to, bytes) in &parts {
                assert_eq!(&device[to as usize..][..bytes.len()], bytes, "gap {gap}");
            }
            if piece > device.len() {
                assert_eq!(transfers, if gap < ALIGN { 1 } else { 8 }, "gap {gap}");
            }
        }
    }
}
