//! Primitives to weights: what to do (`ops`, `plan`), who does it (`cpu`, `torch`), and how to take it back (`restore`).

pub mod bypass;
pub mod checkpoint;
pub mod cpu;
pub mod gemm;
mod kernel;
pub mod ops;
pub mod plan;
pub mod restore;
pub mod stack;
#[cfg(feature = "torch")]
pub mod torch;
mod whole;

use crate::error::{Error, Result};
use crate::view::{Device, View};

/// Where prepared factors wait between two merges: on a device they are worth keeping, in host memory they are where the file is.
#[derive(Default)]
pub struct Prepared {
    #[cfg(feature = "torch")]
    torch: torch::Factors,
}

/// `out = base + sum of terms`, computed where `out` is.
pub fn merge(
    name: &str,
    base: &View,
    out: &View,
    terms: &[ops::Term<'_>],
    prepared: &mut Prepared,
) -> Result<()> {
    merge_on(out.device(), name, base, out, terms, prepared)
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

/// `out = base + sum of terms`, computed on `device`, wherever the two are.
pub fn merge_on(
    device: Device,
    name: &str,
    base: &View,
    out: &View,
    terms: &[ops::Term<'_>],
    prepared: &mut Prepared,
) -> Result<()> {
    check_target(name, out)?;
    match device {
        Device::Cpu => cpu::merge(name, base, out, &ops::Storage::default(), terms),
        #[cfg(feature = "torch")]
        Device::Cuda(index) => torch::merge(index, name, base, out, terms, &mut prepared.torch),
        #[cfg(not(feature = "torch"))]
        Device::Cuda(_) => {
            let _ = (base, out, terms, prepared);
            Err(no_cuda(name))
        }
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
        what: format!("`{name}` is in GPU memory, which this build of the library cannot reach"),
        hint: "use the build with libtorch, or move the tensor to the CPU".into(),
    }
}
