//! Tensors of the host, described as DLPack's `DLTensor` does, field for field.

use super::boundary::{self, Failure, Outcome};
use super::status::lycore_status::{LYCORE_BAD_ARGUMENT, LYCORE_NULL_ARGUMENT};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::view::{Device, Slice, View};
use std::ffi::c_void;

/// kDLCPU
pub const LYCORE_DEVICE_CPU: i32 = 1;
/// kDLCUDA
pub const LYCORE_DEVICE_CUDA: i32 = 2;
/// kDLInt
pub const LYCORE_DTYPE_INT: u8 = 0;
/// kDLUInt
pub const LYCORE_DTYPE_UINT: u8 = 1;
/// kDLFloat: 16, 32 or 64 bits, IEEE
pub const LYCORE_DTYPE_FLOAT: u8 = 2;
/// kDLBfloat: 16 bits
pub const LYCORE_DTYPE_BFLOAT: u8 = 4;
/// kDLFloat8_e4m3fn: 8 bits, without infinities, at most 448
pub const LYCORE_DTYPE_FLOAT8_E4M3FN: u8 = 10;
/// kDLFloat8_e5m2: 8 bits, at most 57344
pub const LYCORE_DTYPE_FLOAT8_E5M2: u8 = 12;
/// The most axes that a tensor may have.
pub const LYCORE_MAX_DIMS: i32 = 16;

/// DLDevice
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lycore_device {
    /// LYCORE_DEVICE_CPU or LYCORE_DEVICE_CUDA.
    pub device_type: i32,
    /// Index of the device; 0 for the CPU.
    pub device_id: i32,
}

/// DLDataType
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lycore_dtype {
    /// One of LYCORE_DTYPE_*.
    pub code: u8,
    /// Bits per element: 8, 16 or 32 for the floating-point weights that this version computes with.
    pub bits: u8,
    /// 1.
    pub lanes: u16,
}

/// DLTensor: a view of memory that the caller owns. The library reads or writes the elements that shape and strides reach and nothing
/// else. How long the memory must live is said by each call that takes one.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lycore_tensor {
    /// Address on `device`; may be NULL when a dimension is 0.
    pub data: *mut c_void,
    /// Where `data` is.
    pub device: lycore_device,
    /// Number of axes, 0 to LYCORE_MAX_DIMS.
    pub ndim: i32,
    /// Element type.
    pub dtype: lycore_dtype,
    /// `ndim` sizes. Not written.
    pub shape: *mut i64,
    /// `ndim` steps in elements, not negative; NULL means row-major. Not written.
    pub strides: *mut i64,
    /// Added to `data`.
    pub byte_offset: u64,
}

/// A range along one axis of a weight: where the q, k or v of an adapter lies in a fused one.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lycore_slice {
    /// 0 (rows) or 1 (columns, input channels).
    pub axis: u64,
    /// First index.
    pub start: u64,
    /// Number of indices.
    pub length: u64,
}

/// The slice behind a pointer that may be NULL.
///
/// # Safety
/// `slice` is NULL or points to a slice.
pub(super) unsafe fn slice(slice: *const lycore_slice) -> Option<Slice> {
    // SAFETY: the caller's promise.
    unsafe { slice.as_ref() }.map(|s| Slice {
        axis: s.axis as usize,
        start: s.start as usize,
        len: s.length as usize,
    })
}

/// The view behind a descriptor.
///
/// # Safety
/// `tensor` is NULL or points to a descriptor of memory that stays valid as the export's description says.
pub(super) unsafe fn view(tensor: *const lycore_tensor, name: &'static str) -> Outcome<View> {
    // SAFETY: the caller's promise.
    let tensor = unsafe { tensor.as_ref() }
        .ok_or_else(|| Failure::boundary(LYCORE_NULL_ARGUMENT, format!("`{name}` is NULL")))?;
    let bad = |why: String| Failure::boundary(LYCORE_BAD_ARGUMENT, format!("`{name}`: {why}"));
    if !(0..=LYCORE_MAX_DIMS).contains(&tensor.ndim) {
        return Err(bad(format!("ndim is {}, it must be 0 to {LYCORE_MAX_DIMS}", tensor.ndim)));
    }
    // SAFETY: the caller's promise: `ndim` sizes.
    let sizes = unsafe { boundary::array(tensor.shape, tensor.ndim as u64, "shape")? };
    let shape = shape(sizes, name)?;
    let strides = match tensor.strides.is_null() {
        true => None,
        // SAFETY: the caller's promise: `ndim` strides.
        false => Some(unsafe { boundary::array(tensor.strides, tensor.ndim as u64, "strides")? }),
    };
    let device = device(tensor.device, name)?;
    let dtype = match (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) {
        (LYCORE_DTYPE_FLOAT, 32, 1) => Dtype::F32,
        (LYCORE_DTYPE_FLOAT, 16, 1) => Dtype::F16,
        (LYCORE_DTYPE_BFLOAT, 16, 1) => Dtype::BF16,
        (LYCORE_DTYPE_FLOAT8_E4M3FN, 8, 1) => Dtype::F8_E4M3,
        (LYCORE_DTYPE_FLOAT8_E5M2, 8, 1) => Dtype::F8_E5M2,
        (code, bits, lanes) => {
            return Err(Failure::Error(Error::Dtype {
                tensor: name.to_owned(),
                got: format!("code {code}, {bits} bits, {lanes} lanes"),
                supported: "float 32, float 16, bfloat 16, float8 e4m3fn, float8 e5m2, one lane",
            }))
        }
    };
    let data = if tensor.data.is_null() {
        if !shape.contains(&0) {
            let message = format!("`{name}`: data is NULL for a tensor of shape {shape:?}");
            return Err(Failure::boundary(LYCORE_NULL_ARGUMENT, message));
        }
        std::ptr::null_mut()
    } else {
        let offset = usize::try_from(tensor.byte_offset).ok();
        let end = offset.and_then(|offset| (tensor.data as usize).checked_add(offset));
        end.ok_or_else(|| bad(format!("byte_offset {} leads around the end of memory", tensor.byte_offset)))?;
        tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize)
    };
    // SAFETY: the caller's promise about the memory.
    let view = unsafe { View::from_raw(data, device, dtype, &shape, strides) };
    view.map_err(|e| bad(e.to_string()))
}

/// The device behind its numbers.
pub(super) fn device(given: lycore_device, name: &str) -> Outcome<Device> {
    match (given.device_type, usize::try_from(given.device_id)) {
        (LYCORE_DEVICE_CPU, _) => Ok(Device::Cpu),
        (LYCORE_DEVICE_CUDA, Ok(index)) => Ok(Device::Cuda(index)),
        (kind, _) => {
            let id = given.device_id;
            let message = format!(
                "`{name}`: device type {kind}, id {id} is neither LYCORE_DEVICE_CPU nor LYCORE_DEVICE_CUDA"
            );
            Err(Failure::boundary(LYCORE_BAD_ARGUMENT, message))
        }
    }
}

/// Sizes from the caller.
pub(super) fn shape(sizes: &[i64], name: &str) -> Outcome<Vec<usize>> {
    let size = |&s: &i64| {
        usize::try_from(s)
            .map_err(|_| Failure::boundary(LYCORE_BAD_ARGUMENT, format!("`{name}`: size {s} is negative")))
    };
    sizes.iter().map(size).collect()
}

/// A descriptor of a view; `shape` and `strides` keep the numbers that it points to.
pub(super) fn describe(view: &View, shape: &mut [i64], strides: &mut [i64]) -> lycore_tensor {
    shape.iter_mut().zip(view.shape()).for_each(|(to, &from)| *to = from as i64);
    strides.iter_mut().zip(view.strides()).for_each(|(to, &from)| *to = from as i64);
    let (device_type, device_id) = match view.device() {
        Device::Cpu => (LYCORE_DEVICE_CPU, 0),
        Device::Cuda(index) => (LYCORE_DEVICE_CUDA, index as i32),
    };
    // Only floats are handed out (`Held::new`).
    let (code, bits) = match view.dtype() {
        Dtype::BF16 => (LYCORE_DTYPE_BFLOAT, 16),
        Dtype::F16 => (LYCORE_DTYPE_FLOAT, 16),
        Dtype::F8_E4M3 => (LYCORE_DTYPE_FLOAT8_E4M3FN, 8),
        Dtype::F8_E5M2 => (LYCORE_DTYPE_FLOAT8_E5M2, 8),
        _ => (LYCORE_DTYPE_FLOAT, 32),
    };
    lycore_tensor {
        data: view.data().cast(),
        device: lycore_device { device_type, device_id },
        ndim: view.shape().len() as i32,
        dtype: lycore_dtype { code, bits, lanes: 1 },
        shape: shape.as_mut_ptr(),
        strides: strides.as_mut_ptr(),
        byte_offset: 0,
    }
}

/// Runs `work` in the libtorch state that this library's promises need (exact fp32 products, no autocast, the caller's stream) and with the
/// stream that work on a GPU goes to: the caller's, or for NULL libtorch's current one; without libtorch the legacy default stream.
pub(super) fn in_scope<T>(
    device: Device,
    stream: *mut c_void,
    work: impl FnOnce(crate::cuda::Stream) -> Outcome<T>,
) -> Outcome<T> {
    #[cfg(feature = "torch")]
    let (_scope, stream) = {
        use crate::torch_ext::{Scope, Stream};
        match device {
            Device::Cuda(device) => {
                let scope = Scope::open(Some(Stream { device, handle: stream }))?;
                let stream = scope.stream();
                (scope, stream)
            }
            Device::Cpu => (Scope::open(None)?, stream),
        }
    };
    let _ = device;
    // SAFETY: the caller's stream, which it keeps at least until the call has returned.
    work(unsafe { crate::cuda::Stream::from_raw(stream) })
}
