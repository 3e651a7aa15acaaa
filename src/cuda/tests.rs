//! Without a GPU: clear answers and no panic. With one: that what is embedded runs, and that order holds.

use super::*;

/// The first device; without one, why not.
fn device() -> Option<&'static Gpu> {
    match gpu(0) {
        Ok(gpu) => Some(gpu),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

#[test]
fn without_a_device_every_door_says_why() {
    match devices() {
        Ok(n) => {
            assert!(n > 0);
            assert!(matches!(gpu(n), Err(Error::Device { .. })));
        }
        Err(e) => {
            let text = e.to_string();
            assert!(matches!(e, Error::Device { .. }), "{text}");
            assert!(text.contains("CUDA") && !e.hint().is_empty(), "{text}");
            assert_eq!(gpu(0).err().map(|e| e.to_string()), Some(text));
        }
    }
}

#[test]
fn null_and_one_are_the_legacy_stream() {
    // SAFETY: all three are values that `from_raw` allows; none is used.
    let made = [0usize, 1, 4096].map(|p| unsafe { Stream::from_raw(p as *mut c_void) });
    assert_eq!(made[0], Stream::default());
    assert_eq!(made[1], Stream::default());
    assert_ne!(made[2], Stream::default());
    assert_eq!(Stream::default().raw() as usize, LEGACY);
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Axpy {
    x: u64,
    y: u64,
    n: u32,
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// A stream of a host, never destroyed.
fn stream(gpu: &Gpu) -> Stream {
    let _current = gpu.enter().unwrap();
    let mut raw = std::ptr::null_mut();
    // SAFETY: the context is current; the pointer is to a live handle.
    assert!(!failed(unsafe {
        sys::cuStreamCreate(&mut raw, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32)
    }));
    Stream(raw as usize)
}

#[test]
fn kernels_run_with_structs_scalars_and_much_shared_memory() {
    let Some(gpu) = device() else { return };
    let values: Vec<f32> = (0..24_000).map(|i| i as f32).collect();
    let n = values.len() as u32;
    for stream in [Stream::default(), stream(gpu)] {
        let mut got = vec![0; values.len() * 4];
        gpu.on(stream, |queue| {
            let x = queue.upload_new(&bytes(&values))?;
            let y = queue.alloc(x.len())?;
            let axpy = Axpy { x: x.ptr(), y: y.ptr(), n };
            // SAFETY: both buffers hold n floats; `reverse` gets the shared memory that its words need (over 48 KiB).
            unsafe {
                queue.zero(y.ptr(), y.len())?;
                queue.launch(
                    "self_test",
                    "axpy",
                    [n.div_ceil(256), 1, 1],
                    256,
                    0,
                    &[Arg::plain(&axpy), 2f32.into()],
                )?;
                queue.launch("self_test", "axpy", [0, 1, 1], 256, 0, &[Arg::plain(&axpy), 2f32.into()])?;
                let words = n / 2;
                queue.launch(
                    "self_test",
                    "reverse",
                    [2, 1, 1],
                    256,
                    words as usize * 4,
                    &[(&y).into(), words.into()],
                )?;
                queue.download(y.ptr(), &mut got)
            }
        })
        .unwrap();
        let expected: Vec<f32> =
            values.chunks(values.len() / 2).flat_map(|c| c.iter().rev().map(|v| 2.0 * v)).collect();
        assert_eq!(floats(&got), expected);
    }
}

#[test]
fn later_calls_on_other_streams_see_earlier_work_and_memory_may_go_early() {
    let Some(gpu) = device() else { return };
    let streams: Vec<_> = (0..4).map(|_| stream(gpu)).chain([Stream::default()]).collect();
    let large = vec![1f32; 16 << 20];
    let n = large.len() as u32;
    let y = gpu.on(streams[0], |queue| queue.upload_new(&bytes(&large))).unwrap();
    let mut pinned = gpu.on(streams[0], |queue| queue.lock(y.len())).unwrap();
    for round in 0..20 {
        gpu.on(streams[round % streams.len()], |queue| {
            // Dropped while the kernel that reads it is running, and allocated anew at once.
            let x = queue.upload_new(&bytes(&large))?;
            let axpy = Axpy { x: x.ptr(), y: y.ptr(), n };
            // SAFETY: both buffers hold n floats.
            unsafe {
                queue.launch(
                    "self_test",
                    "axpy",
                    [n.div_ceil(256), 1, 1],
                    256,
                    0,
                    &[Arg::plain(&axpy), 1f32.into()],
                )
            }
        })
        .unwrap();
    }
    gpu.on(streams[2], |queue| {
        // SAFETY: both are that long; the host looks only after the wait.
        unsafe { queue.copy(y.ptr(), pinned.ptr(), y.len()) }?;
        queue.wait()
    })
    .unwrap();
    drop(y);
    assert!(floats(pinned.as_slice()).iter().all(|&v| v == 21.0));
    // Dropped with a transfer under way.
    pinned.as_mut_slice().fill(7);
    gpu.on(streams[1], |queue| {
        let to = queue.alloc(pinned.as_slice().len())?;
        // SAFETY: both are that long and freed behind the transfer.
        unsafe { queue.copy(pinned.ptr(), to.ptr(), to.len()) }
    })
    .unwrap();
    drop(pinned);
}

#[test]
fn large_memory_is_given_back_by_itself_or_taken_again() {
    let Some(gpu) = device() else { return };
    let streams = [stream(gpu), stream(gpu), Stream::default()];
    let size = 300 << 20;
    let everything = vec![0x5a; size];
    for round in 0..12 {
        // Dropped while it is written, and wanted at once: what comes later in time comes later on the device, too.
        gpu.on(streams[round % 3], |queue| {
            let (first, mut locked) = (queue.alloc_large(size)?, queue.lock(size)?);
            queue.wait()?;
            locked.as_mut_slice().fill(7);
            // SAFETY: all are that long; the host touches nothing again.
            unsafe {
                queue.zero(first.ptr(), size)?;
                queue.copy(locked.ptr(), first.ptr(), size)
            }
        })
        .unwrap();
        let mut got = vec![0; size];
        gpu.on(streams[(round + 1) % 3], |queue| {
            let (second, mut locked) = (queue.alloc_large(size)?, queue.lock(size)?);
            // SAFETY: all are that long. What the transfer above reads is read by now, or is not what this call got.
            unsafe {
                queue.upload(&everything, second.ptr())?;
                queue.copy(second.ptr(), locked.ptr(), size)?;
                queue.wait()?;
                got.copy_from_slice(locked.as_mut_slice());
                Ok(())
            }
        })
        .unwrap();
        assert!(got == everything, "round {round}");
    }
    release::finish(|_| true);
    assert_eq!(release::waiting_on(gpu), 0);
}

#[test]
fn threads_upload_at_once() {
    let Some(gpu) = device() else { return };
    let streams: Vec<_> = (0..8).map(|_| stream(gpu)).collect();
    std::thread::scope(|scope| {
        for (i, &stream) in streams.iter().enumerate() {
            scope.spawn(move || {
                for round in 0..20 {
                    let size = [1000, 3 << 20, 20 << 20][(i + round) % 3] + i;
                    let sent: Vec<u8> = (0..size).map(|b| (b * 7 + i + round) as u8).collect();
                    let mut got = vec![0; size];
                    gpu.on(stream, |queue| {
                        let buffer = queue.upload_new(&sent)?;
                        // SAFETY: the buffer is that long.
                        unsafe { queue.download(buffer.ptr(), &mut got) }
                    })
                    .unwrap();
                    assert!(sent == got, "thread {i}, round {round}");
                }
            });
        }
    });
}

#[test]
fn faults_of_the_caller_are_errors() {
    let Some(gpu) = device() else { return };
    let (free, total) = gpu.memory().unwrap();
    assert!(free <= total && gpu.architecture() >= 75 && gpu.multiprocessors() > 0);
    let e = gpu.on(Stream::default(), |queue| queue.alloc(total * 4)).err().unwrap();
    assert!(e.to_string().contains(&(total * 4).to_string()) && e.hint().contains("empty_cache"), "{e}");
    assert!(gpu.on(Stream(PER_THREAD), |queue| queue.wait()).is_err());
    for (file, kernel, shared) in
        [("nothing", "axpy", 0), ("self_test", "nothing", 0), ("self_test", "axpy", 1 << 20)]
    {
        // SAFETY: nothing is launched.
        let e =
            gpu.on(Stream::default(), |queue| unsafe { queue.launch(file, kernel, [1; 3], 1, shared, &[]) });
        assert!(e.unwrap_err().to_string().contains(if file == "nothing" { file } else { kernel }));
    }
    // The device is as good as before.
    gpu.on(Stream::default(), |queue| queue.alloc(1 << 20).map(drop).and_then(|()| queue.wait())).unwrap();
}
