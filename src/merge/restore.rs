//! The pristine copy of a weight. Every change of strengths starts from it, so nothing accumulates and restore is exact to the bit.

use crate::error::{Error, Result};
use crate::view::{Device, Rows, View};

/// Where the copies are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupPlace {
    /// Beside the weight: fastest, takes the size of the changed weights on the device.
    Device,
    /// In host memory.
    Host,
}

/// A packed, row-major copy of one weight.
pub struct Backup {
    view: View,
    _own: Own,
}

#[allow(dead_code)] // the fields keep the memory that `view` shows
enum Own {
    Bytes(Vec<u8>),
    #[cfg(feature = "torch")]
    Torch(super::torch::Owned),
}

impl Backup {
    /// Copies `weight`.
    pub fn of(name: &str, weight: &View, place: BackupPlace) -> Result<Self> {
        match weight.device() {
            Device::Cpu => {
                let mut bytes = Vec::new();
                bytes.try_reserve_exact(weight.byte_len()).map_err(|_| {
                    Error::Backend(format!("`{name}`: no memory for a backup of {} bytes", weight.byte_len()))
                })?;
                bytes.resize(weight.byte_len(), 0);
                // SAFETY: the view shows the vector's own buffer, which moves with it and is never resized.
                let view = unsafe {
                    View::from_raw(bytes.as_mut_ptr(), Device::Cpu, weight.dtype(), weight.shape(), None)?
                };
                copy(name, weight, &view)?;
                Ok(Backup { view, _own: Own::Bytes(bytes) })
            }
            #[cfg(feature = "torch")]
            Device::Cuda(_) => {
                let (view, own) = super::torch::backup(weight, place)?;
                Ok(Backup { view, _own: Own::Torch(own) })
            }
            #[cfg(not(feature = "torch"))]
            Device::Cuda(_) => {
                let _ = place;
                Err(super::no_cuda(name))
            }
        }
    }

    /// The copy.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Writes the copy back, bit for bit.
    pub fn write_back(&self, name: &str, weight: &View) -> Result<()> {
        match weight.device() {
            Device::Cpu => copy(name, &self.view, weight),
            #[cfg(feature = "torch")]
            Device::Cuda(_) => super::torch::copy(&self.view, weight),
            #[cfg(not(feature = "torch"))]
            Device::Cuda(_) => Err(super::no_cuda(name)),
        }
    }
}

/// Copies between host views of the same shape and dtype, bit for bit.
fn copy(name: &str, from: &View, to: &View) -> Result<()> {
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
