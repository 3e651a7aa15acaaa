//! Work on a stream, and the order between streams.

use super::memory::{Buffer, Cursor};
use super::{release, sys, Current, Gpu, Stream, PER_THREAD};
use crate::error::{Error, Result};
use std::ffi::c_void;
use std::marker::PhantomData;

/// What later calls and frees must wait for.
#[derive(Default)]
pub(super) struct Order {
    /// One event per call that ended and that no later call has waited for. As every call waits for all of these and then replaces
    /// them by its own, there are never more of them than calls that overlapped.
    ended: Vec<(u64, sys::CUevent)>,
    /// The calls that are enqueuing right now.
    running: Vec<(u64, sys::CUstream)>,
    /// Events to use again. A wait means the record that was the last when it was enqueued, so a waiter does not hold an event up.
    spare: Vec<sys::CUevent>,
    /// The number of the next call.
    next: u64,
}

impl Order {
    /// An event. The context is current.
    fn event(&mut self, gpu: &Gpu) -> Result<sys::CUevent> {
        if let Some(event) = self.spare.pop() {
            return Ok(event);
        }
        let mut event = std::ptr::null_mut();
        let flag = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the context is current; the pointer is to a live handle.
        gpu.check(unsafe { sys::cuEventCreate(&mut event, flag) }, || "making an event".into())?;
        Ok(event)
    }

    /// Makes the device's own stream wait for all that has been enqueued so far, by ended and by running calls.
    fn join(&mut self, gpu: &Gpu) -> Result<()> {
        for &(_, event) in &self.ended {
            gpu.order_behind(gpu.own, event)?;
        }
        for at in 0..self.running.len() {
            let event = self.event(gpu)?;
            let waits = gpu.record(event, self.running[at].1).and_then(|()| gpu.order_behind(gpu.own, event));
            self.spare.push(event);
            waits?;
        }
        Ok(())
    }
}

impl Gpu {
    /// Runs `work`, which enqueues on `stream` through the [`Queue`] that it gets, with the device's context current. What calls that
    /// have ended left on any stream comes before it; what it enqueues comes before later calls' work. Calls that overlap are not
    /// ordered. Does not wait for the device.
    pub fn on<T>(&'static self, stream: Stream, work: impl FnOnce(&Queue) -> Result<T>) -> Result<T> {
        let queue = Queue::begin(self, stream)?;
        let result = work(&queue);
        let end = queue.end();
        let value = result?;
        end.map(|()| value)
    }

    /// Runs `work`, which launches kernels on `stream`, with the device's context current, and outside the order of calls: for memory that
    /// the host owns and whose use its streams order. The stream may be captured into a graph.
    pub fn beside<T>(&'static self, stream: Stream, work: impl FnOnce(&Launcher) -> Result<T>) -> Result<T> {
        let current = self.enter()?;
        work(&Launcher { gpu: self, stream: stream.raw(), _current: current })
    }

    /// Waits for everything on the device.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the context is current.
        self.check(unsafe { sys::cuCtxSynchronize() }, || "waiting for the device".into())
    }

    /// [`Queue::launch`]; the context is current.
    ///
    /// # Safety
    /// As there; the stream is alive.
    #[allow(clippy::too_many_arguments)] // The driver's own, in one place.
    unsafe fn launch(
        &self,
        stream: sys::CUstream,
        file: &str,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        shared: usize,
        args: &[Arg<'_>],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let function = self.function(file, kernel, shared)?;
        let mut pointers: Vec<*mut c_void> = args.iter().map(Arg::pointer).collect();
        let [x, y, z] = grid;
        let (params, extra) = (pointers.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: the caller's promise; the driver reads the parameters before it returns.
        let code = unsafe {
            sys::cuLaunchKernel(function, x, y, z, threads, 1, 1, shared as u32, stream, params, extra)
        };
        self.check(code, || {
            format!("launching {file}::{kernel} (grid {grid:?}, {threads} threads, {shared} bytes of shared memory)")
        })
    }

    /// Frees device memory behind all that has been enqueued so far.
    pub(super) fn free(&self, address: u64) -> Result<()> {
        let _current = self.enter()?;
        let mut order = self.order.lock();
        order.join(self)?;
        // SAFETY: the address came from cuMemAllocAsync; the stream waits for all work that could use it. The lock keeps others from
        // putting something between the two.
        self.check(unsafe { sys::cuMemFreeAsync(address, self.own) }, || "freeing memory".into())
    }

    /// An event behind all that has been enqueued through this library so far, and behind no other work on the device.
    pub(super) fn mark(&self) -> Result<sys::CUevent> {
        let _current = self.enter()?;
        let mut order = self.order.lock();
        order.join(self)?;
        let event = order.event(self)?;
        self.record(event, self.own).inspect_err(|_| order.spare.push(event))?;
        Ok(event)
    }

    /// Whether the device is past an event; not where that cannot be told.
    pub(super) fn has_passed(&self, event: sys::CUevent) -> bool {
        let Ok(_current) = self.enter() else { return false };
        // SAFETY: the event is never destroyed.
        unsafe { sys::cuEventQuery(event) == sys::CUresult::CUDA_SUCCESS }
    }

    /// An event that no one else records.
    pub(super) fn event(&self) -> Result<sys::CUevent> {
        self.order.lock().event(self)
    }

    /// Takes an event back.
    pub(super) fn recycle(&self, event: sys::CUevent) {
        self.order.lock().spare.push(event);
    }

    pub(super) fn record(&self, event: sys::CUevent, stream: sys::CUstream) -> Result<()> {
        // SAFETY: the event is never destroyed; the stream is alive: ours, or that of a call that has not ended.
        self.check(unsafe { sys::cuEventRecord(event, stream) }, || "recording an event".into())
    }

    /// The host waits.
    pub(super) fn wait_for(&self, event: sys::CUevent) -> Result<()> {
        // SAFETY: the event is never destroyed.
        self.check(unsafe { sys::cuEventSynchronize(event) }, || "waiting for earlier work".into())
    }

    /// The stream waits.
    fn order_behind(&self, stream: sys::CUstream, event: sys::CUevent) -> Result<()> {
        // SAFETY: as in `record`.
        self.check(unsafe { sys::cuStreamWaitEvent(stream, event, 0) }, || "ordering two streams".into())
    }

    /// Whether what is enqueued on the stream goes into a graph instead of being run. The context is current.
    fn is_capturing(&self, stream: sys::CUstream) -> Result<bool> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream is alive; the pointer is to a live value.
        let code = unsafe { sys::cuStreamIsCapturing(stream, &mut status) };
        self.check(code, || "looking at the stream".into())?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Whether the stream can take work: it is this device's and is not being captured.
    fn accepts(&self, stream: Stream) -> Result<()> {
        if stream.0 == PER_THREAD {
            return Err(Error::argument(
                "the per-thread default stream cannot be ordered against other threads",
                "pass a stream of your own, or NULL",
            ));
        }
        let raw = stream.raw();
        if self.is_capturing(raw)? {
            return Err(Error::Device {
                what: format!("cuda:{}: the stream is being captured into a CUDA graph", self.index),
                hint: "while a CUDA graph is captured, call only what says that it can be captured".into(),
            });
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: `Stream::from_raw` was promised a live stream; the pointer is to a live value.
        let code = unsafe { sys::cuStreamGetCtx(raw, &mut context) };
        self.check(code, || "looking at the stream".into())?;
        if context == self.context {
            return Ok(());
        }
        // Another context of the same device (a green one) shares its memory and kernels; a stream of another device is a mistake.
        let mut device = -1;
        let there = Current::push(context, self.index)?;
        // SAFETY: the pointer is to a live integer; the stream's context is current.
        self.check(unsafe { sys::cuCtxGetDevice(&mut device) }, || "looking at the stream".into())?;
        drop(there);
        if device != self.device {
            let what = format!("cuda:{}: the stream belongs to another device", self.index);
            return Err(Error::argument(what, "pass a stream of the device that the tensors are on"));
        }
        Ok(())
    }
}

/// A stream that takes work, for the length of one [`Gpu::on`]. Everything is enqueued and nothing waited for, except where said.
pub struct Queue {
    gpu: &'static Gpu,
    stream: sys::CUstream,
    call: u64,
    /// The ended calls that this one's stream waits for.
    behind: Vec<u64>,
    ended: bool,
    // Last: the context is left after `drop` has used it.
    _current: Current,
}

impl Queue {
    fn begin(gpu: &'static Gpu, stream: Stream) -> Result<Self> {
        let current = gpu.enter()?;
        gpu.accepts(stream)?;
        let stream = stream.raw();
        let mut order = gpu.order.lock();
        // Also those on the same handle: it may be a new stream that got an old one's address.
        for &(_, event) in &order.ended {
            gpu.order_behind(stream, event)?;
        }
        let behind = order.ended.iter().map(|&(call, _)| call).collect();
        let call = order.next;
        order.next += 1;
        order.running.push((call, stream));
        Ok(Queue { gpu, stream, call, behind, ended: false, _current: current })
    }

    fn end(mut self) -> Result<()> {
        self.finish()
    }

    fn finish(&mut self) -> Result<()> {
        self.ended = true;
        let mut order = self.gpu.order.lock();
        order.running.retain(|&(call, _)| call != self.call);
        let event = order.event(self.gpu)?;
        if let Err(e) = self.gpu.record(event, self.stream) {
            order.spare.push(event);
            return Err(e);
        }
        // Whoever waits for this call waits for those too.
        let (covered, mut left): (Vec<_>, Vec<_>) =
            order.ended.drain(..).partition(|(call, _)| self.behind.contains(call));
        order.spare.extend(covered.into_iter().map(|(_, event)| event));
        left.push((self.call, event));
        order.ended = left;
        Ok(())
    }

    /// The device.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream
    }

    /// A number that no other call has.
    pub(super) fn call(&self) -> u64 {
        self.call
    }

    /// Uninitialised device memory, usable from here on in the stream's order.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: the pointer is to a live integer; the stream is alive.
            let mut alloc = || unsafe { sys::cuMemAllocAsync(&mut address, bytes, self.stream) };
            let mut code = alloc();
            // Better late than not at all.
            if code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY && release::finish(|_| true) {
                code = alloc();
            }
            self.gpu.check(code, || {
                let free =
                    self.gpu.memory().map_or("an unknown number of".into(), |(free, _)| free.to_string());
                format!("allocating {bytes} bytes ({free} bytes are free)")
            })?;
        }
        Ok(Buffer::new(self.gpu, address, bytes))
    }

    /// Sets `bytes` bytes at `at` to zero.
    ///
    /// # Safety
    /// `at` is the address of that many bytes of device memory, alive until the stream has passed here.
    pub unsafe fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuMemsetD8Async(at, 0, bytes, self.stream) };
        self.gpu.check(code, || format!("zeroing {bytes} bytes"))
    }

    /// Copies host memory to `to`. `bytes` may be freed when this returns; waits only where all of the staging memory is still on its
    /// way, and not for the last part.
    ///
    /// # Safety
    /// `to` is the address of as many bytes of device memory, alive until the stream has passed here.
    pub unsafe fn upload(&self, bytes: &[u8], to: u64) -> Result<()> {
        match bytes {
            [] => Ok(()),
            // SAFETY: the caller's promise.
            _ => unsafe { self.upload_parts(&[(to, bytes)]) },
        }
    }

    /// As [`Queue::upload`], for many parts at once: (to, bytes). What lies between two neighbours less than [`ALIGN`](super::ALIGN) apart is
    /// overwritten.
    ///
    /// # Safety
    /// Each `to` is the address of as many bytes of device memory, and what lies between two neighbours less than that apart is device memory, too,
    /// that holds nothing; alive until the stream has passed here.
    pub unsafe fn upload_parts(&self, parts: &[(u64, &[u8])]) -> Result<()> {
        let mut cursor = Cursor::default();
        while !cursor.is_over(parts) {
            // The lock is per piece, so that a large upload does not keep others waiting for its end.
            let mut staging = self.gpu.staging.lock();
            // SAFETY: the caller's promise.
            unsafe { staging.send(self, parts, &mut cursor) }?;
        }
        Ok(())
    }

    /// What is enqueued from here on comes after an event of any device.
    pub(super) fn wait_behind(&self, event: sys::CUevent) -> Result<()> {
        self.gpu.order_behind(self.stream, event)
    }

    /// A new buffer with these bytes; see [`Queue::upload`].
    pub fn upload_new(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.alloc(bytes.len())?;
        // SAFETY: the buffer is that long, and freed behind this call's work.
        unsafe { self.upload(bytes, buffer.ptr()) }?;
        Ok(buffer)
    }

    /// Copies device memory at `from` into `into`, and waits for the stream, and only for it.
    ///
    /// # Safety
    /// `from` is the address of as many bytes of device memory.
    pub unsafe fn download(&self, from: u64, into: &mut [u8]) -> Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's promise for `from`; `into` is borrowed until the wait below has returned.
        let code =
            unsafe { sys::cuMemcpyDtoHAsync_v2(into.as_mut_ptr().cast(), from, into.len(), self.stream) };
        self.gpu.check(code, || format!("copying {} bytes to the host", into.len()))?;
        self.wait()
    }

    /// Copies between any two of: this device's memory, another's, page-locked host memory.
    ///
    /// # Safety
    /// Both are addresses of that many bytes, which do not overlap and live until the stream has passed here; until then nobody else
    /// writes either or reads the target.
    pub unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuMemcpyAsync(to, from, bytes, self.stream) };
        self.gpu.check(code, || format!("copying {bytes} bytes"))
    }

    /// Launches `kernel` of `kernels/<file>.cu` on `grid` blocks of `threads` threads with `shared` bytes of dynamic shared memory. A
    /// grid without blocks is no work.
    ///
    /// # Safety
    /// `args` are the kernel's parameters in number, order and type, and what the kernel does with the addresses among them is sound
    /// until the stream has passed here.
    pub unsafe fn launch(
        &self,
        file: &str,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        shared: usize,
        args: &[Arg<'_>],
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(self.stream, file, kernel, grid, threads, shared, args) }
    }

    /// Waits for this stream, and only for it.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        self.gpu.check(unsafe { sys::cuStreamSynchronize(self.stream) }, || "waiting for the stream".into())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if !self.ended {
            // `work` panicked: what it enqueued is ordered all the same, and the panic says more than an error here could.
            let _ = self.finish();
        }
    }
}

/// A stream that takes kernels, for the length of one [`Gpu::beside`].
pub struct Launcher {
    gpu: &'static Gpu,
    stream: sys::CUstream,
    _current: Current,
}

impl Launcher {
    /// Whether what is launched goes into a graph instead of being run.
    pub fn is_capturing(&self) -> Result<bool> {
        self.gpu.is_capturing(self.stream)
    }

    /// As [`Queue::launch`], without dynamic shared memory.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn launch(
        &self,
        file: &str,
        kernel: &str,
        blocks: u32,
        threads: u32,
        args: &[Arg<'_>],
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(self.stream, file, kernel, [blocks, 1, 1], threads, 0, args) }
    }
}

/// A kernel's parameter.
#[derive(Clone, Copy)]
pub struct Arg<'a>(Value<'a>);

#[derive(Clone, Copy)]
enum Value<'a> {
    U64(u64),
    U32(u32),
    I32(i32),
    F32(f32),
    Plain(*const c_void, PhantomData<&'a ()>),
}

impl<'a> Arg<'a> {
    /// A `#[repr(C)]` struct that the kernel takes by value.
    pub fn plain<T: Copy>(value: &'a T) -> Self {
        Arg(Value::Plain(std::ptr::from_ref(value).cast(), PhantomData))
    }

    fn pointer(&self) -> *mut c_void {
        // The driver only reads, for all its `void **`.
        match &self.0 {
            Value::U64(v) => std::ptr::from_ref(v).cast_mut().cast(),
            Value::U32(v) => std::ptr::from_ref(v).cast_mut().cast(),
            Value::I32(v) => std::ptr::from_ref(v).cast_mut().cast(),
            Value::F32(v) => std::ptr::from_ref(v).cast_mut().cast(),
            Value::Plain(p, _) => p.cast_mut(),
        }
    }
}

macro_rules! arg_from {
    ($($variant:ident $t:ty),*) => {$(
        impl From<$t> for Arg<'_> {
            fn from(v: $t) -> Self {
                Arg(Value::$variant(v))
            }
        }
    )*};
}

arg_from!(U64 u64, U32 u32, I32 i32, F32 f32);

impl<'a> From<&'a Buffer> for Arg<'a> {
    fn from(buffer: &'a Buffer) -> Self {
        Arg(Value::U64(buffer.ptr()))
    }
}
