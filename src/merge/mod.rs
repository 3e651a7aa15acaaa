//! Primitives to weights: what to do (`ops`, `plan`), who does it (`cpu`, `cuda`, `torch`), and how to take it back (`restore`).

pub mod bypass;
pub mod checkpoint;
mod checksum;
pub mod cpu;
pub mod cuda;
pub mod gemm;
mod kernel;
pub mod ops;
pub mod plan;
pub mod restore;
pub mod stack;
#[cfg(feature = "torch")]
pub mod torch;
mod whole;

use crate::cuda::{Gpu, Stream};
use crate::error::{Error, Result};
use crate::view::{Device, View};

/// Where prepared factors wait between two merges: on a device they are worth keeping, in host memory they are where the file is.
#[derive(Default)]
pub struct Prepared {
    cuda: cuda::Kept,
    #[cfg(feature = "torch")]
    torch: torch::Factors,
}

/// One weight to merge: `out = base + sum of terms`.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// For errors.
    pub name: &'a str,
    /// The pristine weight.
    pub base: &'a View,
    /// Where the result goes: the same shape; the same memory, or none of it.
    pub out: &'a View,
    /// How it lies in memory.
    pub storage: ops::Storage,
    /// What to add.
    pub terms: &'a [ops::Term<'a>],
    /// Names the content of `base`: what is computed from it is kept for as long as the number is the same. `None`: it is not kept.
    pub pristine: Option<u64>,
}

/// `out = base + sum of terms` for every job, computed on `device`, wherever the two are. On a GPU the work is enqueued on `stream`.
/// `between` hears, now and then and at first, how many jobs are done; its error stops the work. Every `out` has passed [`check_target`].
pub fn merge_all(
    device: Device,
    stream: Stream,
    jobs: &[Work<'_>],
    prepared: &mut Prepared,
    between: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<()> {
    let Device::Cuda(index) = device else { return cpu::merge_all(jobs, between) };
    match fused(index) {
        #[cfg(feature = "torch")]
        Ok(gpu) if jobs.iter().all(|job| cuda::has_kernels(gpu, job)) => {
            gpu.on(stream, |queue| cuda::merge_from_anywhere(queue, jobs, &mut prepared.cuda, between))
        }
        #[cfg(feature = "torch")]
        Ok(gpu) => {
            // libtorch turns on the GPU what the kernels would leave to the CPU.
            let (own, others): (Vec<Work<'_>>, Vec<Work<'_>>) =
                jobs.iter().copied().partition(|job| cuda::has_kernels(gpu, job));
            for (done, job) in others.iter().enumerate() {
                between(done)?;
                torch::merge(index, job.name, job.base, job.out, job.terms, &mut prepared.torch)?;
            }
            gpu.on(stream, |queue| {
                cuda::merge_from_anywhere(queue, &own, &mut prepared.cuda, &mut |n| between(others.len() + n))
            })
        }
        #[cfg(not(feature = "torch"))]
        Ok(gpu) => {
            gpu.on(stream, |queue| cuda::merge_from_anywhere(queue, jobs, &mut prepared.cuda, between))
        }
        #[cfg(feature = "torch")]
        Err(_) => jobs.iter().enumerate().try_for_each(|(done, job)| {
            between(done)?;
            torch::merge(index, job.name, job.base, job.out, job.terms, &mut prepared.torch)
        }),
        #[cfg(not(feature = "torch"))]
        Err(e) => Err(e),
    }
}

/// As [`merge_all`], for weights of a GPU that `compact` takes, in place: `compact` keeps what that loses of them. Waits for the stream.
pub fn merge_in_place(
    index: usize,
    stream: Stream,
    jobs: &[Work<'_>],
    prepared: &mut Prepared,
    compact: &mut cuda::Compact,
) -> Result<()> {
    fused(index)?.on(stream, |queue| compact.merge(queue, jobs, &mut prepared.cuda))
}

/// Gives weights of a GPU that were merged in place their base back.
pub fn restore_in_place(
    index: usize,
    stream: Stream,
    weights: &[&View],
    compact: &mut cuda::Compact,
) -> Result<()> {
    fused(index)?.on(stream, |queue| compact.restore(queue, weights))
}

/// As [`merge_all`] for one job, where its result is.
pub fn merge(stream: Stream, job: &Work<'_>, prepared: &mut Prepared) -> Result<()> {
    check_target(job.name, job.out)?;
    merge_all(job.out.device(), stream, std::slice::from_ref(job), prepared, &mut |_| Ok(()))
}

/// The device, if this library has kernels for it; else why not. With libtorch, that is asked instead.
pub fn fused(index: usize) -> Result<&'static Gpu> {
    crate::cuda::devices()?;
    crate::cuda::gpu(index)
}

/// A weight that can be written: two threads would meet in an element that two indices reach.
pub fn check_target(name: &str, weight: &View) -> Result<()> {
    match weight.repeats_elements() {
        false => Ok(()),
        true => Err(Error::argument(
            format!("`{name}` is an expanded tensor: strides {:?} repeat elements", weight.strides()),
            "call .contiguous() on it, and use the result in the model",
        )),
    }
}

/// `y += sum of terms applied to x` by the executor that can reach `y`. `base` is the pristine weight; only terms that multiply it read it.
pub fn forward(
    name: &str,
    base: &View,
    geometry: &bypass::Geometry,
    x: &View,
    y: &View,
    terms: &[ops::Term<'_>],
    prepared: &mut Prepared,
) -> Result<()> {
    match y.device() {
        Device::Cpu => bypass::forward(name, base, geometry, x, y, terms),
        #[cfg(feature = "torch")]
        Device::Cuda(_) => torch::forward(name, base, geometry, x, y, terms, &mut prepared.torch),
        #[cfg(not(feature = "torch"))]
        Device::Cuda(_) => {
            let _ = (base, geometry, x, terms, prepared);
            Err(no_cuda(name))
        }
    }
}

#[cfg(not(feature = "torch"))]
fn no_cuda(name: &str) -> Error {
    Error::Device {
        what: format!(
            "`{name}` is in GPU memory, where this build of the library can merge but run no layer"
        ),
        hint: "use the build with libtorch, or merge instead of the bypass".into(),
    }
}
