//! The pristine copies of weights. Every change of strengths starts from them, so nothing accumulates and restore is exact to the bit.

use super::cuda;
use crate::cuda::{Buffer, Gpu, Pinned, Queue, Stream, ALIGN};
use crate::error::{Error, Result};
use crate::view::{Device, Rows, View};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// Where the copies are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupPlace {
    /// On the device where there is room, else compactly, else in host memory.
    Auto,
    /// Beside the weight: fastest, takes the size of the changed weights on the device.
    Device,
    /// In host memory.
    Host,
    /// Nowhere: weights are merged in place, and what rounding lost of them is kept on the device, a quarter of their size.
    Compact,
}

/// A packed, row-major copy of one weight.
pub struct Backup {
    view: View,
    number: u64,
    _own: Own,
}

#[allow(dead_code)] // the fields keep the memory that `view` shows
enum Own {
    Bytes(Vec<u8>),
    /// One piece for many copies that were taken together.
    Device(Arc<Buffer>),
    Pinned(Arc<Pinned>),
    #[cfg(feature = "torch")]
    Torch(super::torch::Owned),
}

impl Backup {
    fn new(view: View, own: Own) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Backup { view, number: NEXT.fetch_add(1, Ordering::Relaxed), _own: own }
    }

    /// The copy.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// A number that no other copy has.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Where copies of these weights go, all on one device, and why. `in_place`: they can do without.
    pub fn place(weights: &[(&str, &View)], wanted: BackupPlace, in_place: bool) -> (BackupPlace, String) {
        let bytes: usize = weights.iter().map(|(_, weight)| weight.byte_len()).sum();
        let gib = |bytes: usize| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
        let device = weights.first().map_or(Device::Cpu, |(_, weight)| weight.device());
        let Device::Cuda(index) = device else {
            return (BackupPlace::Host, "the weights are in host memory".into());
        };
        let fused = super::fused(index);
        match wanted {
            BackupPlace::Device | BackupPlace::Host => return (wanted, "as asked for".into()),
            BackupPlace::Compact if in_place && fused.is_ok() => return (wanted, "as asked for".into()),
            BackupPlace::Compact if fused.is_err() => {
                return (BackupPlace::Device, "the compact mode needs the library's own kernels".into())
            }
            BackupPlace::Compact | BackupPlace::Auto => {}
        }
        let Ok((free, total)) = fused.and_then(Gpu::memory) else {
            return (BackupPlace::Device, format!("{device} does not say how much memory is free"));
        };
        // A model that is about to run needs room too.
        let fits = |bytes: usize| bytes + (total / 16).max(1 << 30) <= free;
        let too_large =
            || format!("copies of {} leave too little of {} free on {device}", gib(bytes), gib(free));
        if fits(bytes) {
            (BackupPlace::Device, format!("copies of {} fit in {} free on {device}", gib(bytes), gib(free)))
        } else if in_place && fits(bytes / 4) {
            (BackupPlace::Compact, format!("{}, a quarter fits", too_large()))
        } else {
            (BackupPlace::Host, too_large())
        }
    }

    /// Copies weights that are all on one device. On a GPU the copies are enqueued on `stream`.
    pub fn take(weights: &[(&str, &View)], place: BackupPlace, stream: Stream) -> Result<Vec<Self>> {
        let Some((first, _)) = weights.first().map(|(name, view)| (view.device(), name)) else {
            return Ok(Vec::new());
        };
        match first {
            Device::Cpu => weights.iter().map(|(name, weight)| Backup::on_host(name, weight)).collect(),
            Device::Cuda(index) => match super::fused(index) {
                Ok(gpu) => gpu.on(stream, |queue| on_gpu(queue, weights, place)),
                #[cfg(feature = "torch")]
                Err(_) => weights
                    .iter()
                    .map(|(_, weight)| {
                        let (view, own) = super::torch::backup(weight, place)?;
                        Ok(Backup::new(view, Own::Torch(own)))
                    })
                    .collect(),
                #[cfg(not(feature = "torch"))]
                Err(e) => Err(e),
            },
        }
    }

    fn on_host(name: &str, weight: &View) -> Result<Self> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(weight.byte_len()).map_err(|_| {
            Error::Backend(format!("`{name}`: no memory for a backup of {} bytes", weight.byte_len()))
        })?;
        in_large_pages(&mut bytes);
        bytes.resize(weight.byte_len(), 0);
        // SAFETY: the view shows the vector's own buffer, which moves with it and is never resized.
        let view =
            unsafe { View::from_raw(bytes.as_mut_ptr(), Device::Cpu, weight.dtype(), weight.shape(), None)? };
        copy(name, weight, &view)?;
        Ok(Backup::new(view, Own::Bytes(bytes)))
    }

    /// Writes copies back, bit for bit; all weights are on one device. What can be written back is, also after an error.
    pub fn give_back(pairs: &[(&str, &Backup, &View)], stream: Stream) -> Result<()> {
        let Some(device) = pairs.first().map(|(_, _, weight)| weight.device()) else { return Ok(()) };
        match device {
            Device::Cpu => all(pairs.iter().map(|(name, backup, weight)| copy(name, &backup.view, weight))),
            Device::Cuda(index) => match super::fused(index) {
                Ok(gpu) => gpu.on(stream, |queue| {
                    let views: Vec<_> =
                        pairs.iter().map(|(name, b, weight)| (*name, &b.view, *weight)).collect();
                    cuda::copy(queue, &views)
                }),
                #[cfg(feature = "torch")]
                Err(_) => {
                    all(pairs.iter().map(|(_, backup, weight)| super::torch::copy(&backup.view, weight)))
                }
                #[cfg(not(feature = "torch"))]
                Err(e) => Err(e),
            },
        }
    }
}

/// Compares weights with their checksums from before they were changed, where those were taken; waits for the stream.
pub fn prove(weights: &[(&str, Option<u64>, &View)], stream: Stream) -> Result<()> {
    let known: Vec<(&str, &View)> = weights.iter().map(|&(name, _, weight)| (name, weight)).collect();
    let sums = super::checksum::of(&known, stream)?;
    let differs = weights.iter().zip(sums).filter(|((_, before, _), sum)| before.is_some_and(|b| b != *sum));
    let names: Vec<&str> = differs.map(|((name, ..), _)| *name).collect();
    match names.first() {
        None => Ok(()),
        Some(first) => Err(Error::Backend(format!(
            "{} of {} restored weights are not the base, the first `{first}`: something else wrote them or their copies; load the model anew",
            names.len(),
            weights.len()
        ))),
    }
}

/// Does all, whatever becomes of one; the first error.
fn all(work: impl Iterator<Item = Result<()>>) -> Result<()> {
    let mut result = Ok(());
    for one in work {
        result = result.and(one);
    }
    result
}

/// Host memory that is locked at once: while one piece is copied down, the next is locked.
const PIECE: usize = 256 << 20;

/// Copies of GPU weights, in one piece of device memory or in pieces of page-locked host memory.
fn on_gpu(queue: &Queue, weights: &[(&str, &View)], place: BackupPlace) -> Result<Vec<Backup>> {
    let size = |weight: &View| weight.byte_len().next_multiple_of(ALIGN);
    let mut backups = Vec::with_capacity(weights.len());
    let mut rest = weights;
    while !rest.is_empty() {
        let mut total = 0;
        let mut fits = |&(_, weight): &(&str, &View)| {
            total += size(weight);
            place != BackupPlace::Host || total <= PIECE
        };
        let count = rest.iter().position(|weight| !fits(weight)).unwrap_or(rest.len()).max(1);
        let (some, others) = rest.split_at(count);
        let total = some.iter().map(|(_, weight)| size(weight)).sum();
        let (mut at, device, own): (u64, Device, Box<dyn Fn() -> Own>) = match place {
            BackupPlace::Device | BackupPlace::Auto | BackupPlace::Compact => {
                let memory = Arc::new(queue.alloc_large(total)?);
                let device = Device::Cuda(queue.gpu().index());
                (memory.ptr(), device, Box::new(move || Own::Device(memory.clone())))
            }
            BackupPlace::Host => {
                let memory = Arc::new(queue.lock(total)?);
                (memory.ptr(), Device::Cpu, Box::new(move || Own::Pinned(memory.clone())))
            }
        };
        for (_, weight) in some {
            // SAFETY: a part of the memory that `own` keeps.
            let view =
                unsafe { View::from_raw(at as *mut u8, device, weight.dtype(), weight.shape(), None)? };
            backups.push(Backup::new(view, own()));
            at += size(weight) as u64;
        }
        let copies = &backups[backups.len() - count..];
        let views: Vec<_> =
            some.iter().zip(copies).map(|((name, weight), b)| (*name, *weight, &b.view)).collect();
        cuda::copy(queue, &views)?;
        rest = others;
    }
    if place == BackupPlace::Host {
        // From here on the CPU reads them too.
        queue.wait()?;
    }
    Ok(backups)
}

/// Asks for large pages: a copy of a model in small ones costs more page faults than copying.
fn in_large_pages(bytes: &mut Vec<u8>) {
    #[cfg(target_os = "linux")]
    {
        let spare = bytes.spare_capacity_mut();
        let page = 4096 - 1;
        let start = (spare.as_ptr() as usize + page) & !page;
        let end = (spare.as_ptr() as usize + spare.len()) & !page;
        if end.saturating_sub(start) >= 4 << 20 {
            // SAFETY: whole pages inside memory that the vector owns; the advice changes no content, and a refusal does no harm.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = bytes;
}

/// Copies between host views of the same shape and dtype, bit for bit.
pub(super) fn copy(name: &str, from: &View, to: &View) -> Result<()> {
    use rayon::prelude::*;
    let (from, to) = (Rows::of(from, name)?, Rows::of(to, name)?);
    super::gemm::on_pool(|| {
        (0..from.rows).into_par_iter().with_min_len(64).for_each(|r| {
            // SAFETY: each row is one task's.
            unsafe { to.copy_row(&from, r) }
        });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    fn view(values: &mut [f32]) -> View {
        // SAFETY: the slice outlives the views of the tests below.
        unsafe {
            View::from_raw(values.as_mut_ptr().cast(), Device::Cpu, Dtype::F32, &[values.len()], None)
                .unwrap()
        }
    }

    #[test]
    fn a_weight_that_is_not_the_base_is_named() {
        let stream = Stream::default();
        let (mut one, mut two) = (vec![1.0f32, -0.0, 3.0], vec![4.0f32; 5]);
        let (first, second) = (view(&mut one), view(&mut two));
        let weights = [("one", &first), ("two", &second)];
        let backups = Backup::take(&weights, BackupPlace::Auto, stream).unwrap();
        let sums = crate::merge::checksum::of(&weights, stream).unwrap();
        let known = [("one", Some(sums[0]), &first), ("two", Some(sums[1]), &second)];
        (one[1], two[4]) = (0.0, 4.5);
        let text = prove(&known, stream).unwrap_err().to_string();
        assert!(text.contains("2 of 2") && text.contains("`one`"), "{text}");
        Backup::give_back(&[("one", &backups[0], &first), ("two", &backups[1], &second)], stream).unwrap();
        prove(&known, stream).unwrap();
        assert!(one[1].is_sign_negative() && two == [4.0; 5]);
    }

    #[test]
    fn what_is_asked_for_is_where_the_weights_are() {
        let mut values = vec![0f32; 4];
        let weight = view(&mut values);
        for wanted in [BackupPlace::Auto, BackupPlace::Compact] {
            let (place, why) = Backup::place(&[("w", &weight)], wanted, true);
            assert_eq!((place, &why[..]), (BackupPlace::Host, "the weights are in host memory"));
        }
    }
}
