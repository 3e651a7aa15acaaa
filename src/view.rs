//! Borrowed, strided views of tensors in host or device memory, and tensors that are shared with what keeps them alive.
//!
//! This is the one place where raw pointers from outside become something checked: everything that can be proven
//! without touching the memory (sizes, strides, axis bounds) is proven when a view is made.

use crate::dtype::{self, Dtype, Float, Rounding};
use crate::error::{Error, Result};
use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// Where a tensor's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// Memory of the CUDA device with this index.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// One range along one axis of a target: how an adapter's q, k or v lands in a fused weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slice {
    /// The axis.
    pub axis: usize,
    /// First index.
    pub start: usize,
    /// Number of indices.
    pub len: usize,
}

/// A strided view of memory that somebody else owns. Strides count elements and are never negative.
#[derive(Clone, Debug)]
pub struct View {
    data: *mut u8,
    device: Device,
    dtype: Dtype,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

// SAFETY: a view is an address and numbers. Who makes one promises (`View::from_raw`) that the memory may be used from
// any thread and that writes through it do not overlap with other accesses.
unsafe impl Send for View {}
// SAFETY: as above; shared access only reads the fields.
unsafe impl Sync for View {}

impl View {
    /// A view of `shape` elements of `dtype` at `data`. `strides` counts elements; `None` means row-major.
    ///
    /// # Safety
    /// `data` must point to memory of `device` that holds every element that shape and strides reach, for as long as the view or a
    /// view made from it is used, from any thread; and nobody else may write it meanwhile, or read it while it is written through the view.
    pub unsafe fn from_raw(
        data: *mut u8,
        device: Device,
        dtype: Dtype,
        shape: &[usize],
        strides: Option<&[i64]>,
    ) -> Result<Self> {
        let too_large = || Error::argument(format!("a tensor of shape {shape:?} does not fit in memory"), "");
        let count = dtype::element_count(shape).ok_or_else(too_large)?;
        dtype::byte_len(dtype, shape).filter(|&n| n <= isize::MAX as usize).ok_or_else(too_large)?;
        if data.is_null() && count > 0 {
            return Err(Error::argument(format!("NULL data for a tensor of shape {shape:?}"), ""));
        }
        let strides = match strides {
            None => row_major(shape),
            Some(given) if given.len() != shape.len() => {
                let what = format!("{} strides for {} axes", given.len(), shape.len());
                return Err(Error::argument(what, "pass one stride per axis, or NULL for row-major"));
            }
            Some(given) => {
                let mut reach = 0usize;
                let mut out = Vec::with_capacity(given.len());
                for (&stride, &dim) in given.iter().zip(shape) {
                    let stride = usize::try_from(stride).map_err(|_| {
                        Error::argument(format!("stride {stride} is negative"), "flip the tensor first")
                    })?;
                    let span = stride.checked_mul(dim.saturating_sub(1)).ok_or_else(too_large)?;
                    reach = reach.checked_add(span).ok_or_else(too_large)?;
                    out.push(stride);
                }
                dtype::byte_len(dtype, &[reach.saturating_add(1)])
                    .filter(|&n| n <= isize::MAX as usize)
                    .ok_or_else(too_large)?;
                out
            }
        };
        Ok(View { data, device, dtype, shape: shape.to_vec(), strides })
    }

    /// A row-major view of bytes in host memory; `None` when their number does not fit the shape.
    fn of_bytes(bytes: &[u8], dtype: Dtype, shape: &[usize]) -> Option<Self> {
        (dtype::byte_len(dtype, shape)? == bytes.len()).then(|| View {
            data: bytes.as_ptr().cast_mut(),
            device: Device::Cpu,
            dtype,
            shape: shape.to_vec(),
            strides: row_major(shape),
        })
    }

    /// Size along each axis.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Distance between neighbours along each axis, in elements.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Where the memory is.
    pub fn device(&self) -> Device {
        self.device
    }

    /// First element's address, on [`View::device`].
    pub fn data(&self) -> *mut u8 {
        self.data
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// The part of a view that these rows and columns of its matrix are; `None` when the columns are no range of the second axis.
    pub fn region(&self, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Option<View> {
        let mut part = self.clone();
        let mut offset = 0;
        let taps: usize = self.shape.iter().skip(2).product();
        for (axis, range) in [(0, rows), (1, cols.start / taps.max(1)..cols.end / taps.max(1))] {
            let Some(&size) = self.shape.get(axis) else { continue };
            if range.start > range.end || range.end > size {
                return None;
            }
            offset += range.start * self.strides[axis];
            part.shape[axis] = range.len();
        }
        let offset = dtype::byte_len(self.dtype, &[offset])?;
        if part.count() > 0 {
            // SAFETY: the first element of the part is one that shape and strides reach.
            part.data = unsafe { self.data.add(offset) };
        }
        Some(part)
    }

    /// Bytes that the elements take when packed.
    pub fn byte_len(&self) -> usize {
        dtype::byte_len(self.dtype, &self.shape).unwrap_or(0)
    }

    /// Whether the elements lie row-major without holes.
    pub fn is_contiguous(&self) -> bool {
        let mut packed = 1usize;
        let in_place = |(&size, &stride): (&usize, &usize)| {
            let fits = size == 1 || stride == packed;
            packed = packed.saturating_mul(size);
            fits
        };
        self.count() == 0 || self.shape.iter().zip(&self.strides).rev().all(in_place)
    }

    /// Whether several indices may reach the same element, as in an expanded tensor. Sure where it says no.
    pub fn repeats_elements(&self) -> bool {
        if self.is_contiguous() {
            return false;
        }
        let mut axes: Vec<_> = self.strides.iter().zip(&self.shape).filter(|(_, &size)| size > 1).collect();
        axes.sort();
        let mut reach = 0usize;
        axes.into_iter().any(|(&stride, &size)| {
            let inside = stride <= reach;
            reach = reach.saturating_add(stride.saturating_mul(size - 1));
            inside
        })
    }

    /// The bytes of a row-major host view.
    pub fn bytes(&self) -> Option<&[u8]> {
        if self.device != Device::Cpu || !self.is_contiguous() {
            return None;
        }
        if self.count() == 0 {
            return Some(&[]);
        }
        // SAFETY: host memory, contiguous, and `from_raw`'s caller promised that it holds every element.
        Some(unsafe { std::slice::from_raw_parts(self.data, self.byte_len()) })
    }

    /// The value of a host view with one element, of any number type: programs write `alpha` as they please.
    pub fn scalar(&self) -> Option<f64> {
        let bytes = self.bytes().filter(|_| self.count() == 1)?;
        macro_rules! read {
            ($number:ty) => {
                Some(<$number>::from_le_bytes(bytes.try_into().ok()?) as f64)
            };
        }
        match self.dtype {
            Dtype::F64 => read!(f64),
            Dtype::I64 => read!(i64),
            Dtype::U64 => read!(u64),
            Dtype::I32 => read!(i32),
            Dtype::U32 => read!(u32),
            Dtype::I16 => read!(i16),
            Dtype::U16 => read!(u16),
            Dtype::I8 => read!(i8),
            Dtype::U8 | Dtype::BOOL => read!(u8),
            dtype => {
                let mut value = [0f32];
                Float::of(dtype)?.read(bytes, &mut value);
                Some(f64::from(value[0]))
            }
        }
    }

    /// All elements, row-major, as f32 in host memory.
    pub fn to_f32(&self, name: &str) -> Result<Vec<f32>> {
        #[cfg(feature = "torch")]
        if self.device != Device::Cpu {
            // Only small factors come this way, when an algorithm folds them before the merge.
            return crate::merge::torch::to_host(self);
        }
        let rows = Rows::of(self, name)?;
        let mut out = vec![0.0; rows.rows * rows.cols];
        if rows.cols > 0 {
            for (i, row) in out.chunks_exact_mut(rows.cols).enumerate() {
                rows.read(i, row);
            }
        }
        Ok(out)
    }
}

/// A host view seen as a matrix: the first axis are the rows, all others flattened the columns.
///
/// Rows may have any stride. When the columns do not lie side by side (channels-last, transposed) their offsets are tabulated once.
pub struct Rows {
    data: *mut u8,
    float: Float,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    row_stride: usize,
    offsets: Option<Vec<usize>>,
    scale: f32,
}

// SAFETY: as `View`: an address and numbers; rows are disjoint, and `write` takes care that each is written by one thread.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// The matrix of `view`; an error when it is not in host memory or not of a dtype that can be computed.
    pub fn of(view: &View, name: &str) -> Result<Self> {
        if view.device != Device::Cpu {
            return Err(Error::Device {
                what: format!("`{name}` is on {}, this operation needs host memory", view.device),
                hint: "use the build with libtorch for tensors on a GPU".into(),
            });
        }
        let float = Float::require(view.dtype, name)?;
        let rows = view.shape.first().copied().unwrap_or(1);
        let inner = view.shape.get(1..).unwrap_or(&[]);
        let cols: usize = inner.iter().product();
        let row_stride = view.strides.first().copied().unwrap_or(0);
        let strides = view.strides.get(1..).unwrap_or(&[]);
        let packed = inner.iter().zip(strides).zip(row_major(inner)).all(|((&d, &s), r)| d == 1 || s == r);
        let offsets = (!packed && cols > 0).then(|| {
            let mut offsets = vec![0usize];
            for (&dim, &stride) in inner.iter().zip(strides) {
                offsets = offsets.iter().flat_map(|&o| (0..dim).map(move |i| o + i * stride)).collect();
            }
            offsets
        });
        Ok(Rows { data: view.data, float, rows, cols, row_stride, offsets, scale: 1.0 })
    }

    /// The matrix whose real values are `scale` times the stored ones.
    pub fn scaled(self, scale: f32) -> Self {
        Rows { scale, ..self }
    }

    /// Element type.
    pub fn float(&self) -> Float {
        self.float
    }

    /// The first element and the distance between rows, when a row is f32 side by side. The address may be unaligned.
    pub fn as_f32(&self) -> Option<(*mut f32, usize)> {
        (self.float == Float::F32 && self.offsets.is_none()).then(|| (self.data.cast(), self.row_stride))
    }

    fn row(&self, row: usize) -> *mut u8 {
        assert!(row < self.rows);
        // SAFETY: `row` is in range, so the address is one that the view reaches.
        unsafe { self.data.add(row * self.row_stride * self.float.size()) }
    }

    /// Reads the real values of row `row` as f32.
    pub fn read(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols);
        self.read_stored(row, 0, out);
        if self.scale != 1.0 {
            out.iter_mut().for_each(|v| *v *= self.scale);
        }
    }

    /// Reads the stored numbers of row `row` as f32, from column `first` on.
    pub fn read_stored(&self, row: usize, first: usize, out: &mut [f32]) {
        assert!(first <= self.cols && out.len() <= self.cols - first);
        let (start, size) = (self.row(row), self.float.size());
        match &self.offsets {
            None => {
                // SAFETY: inside a packed row of `cols` elements that the view reaches.
                let bytes = unsafe { std::slice::from_raw_parts(start.add(first * size), out.len() * size) };
                self.float.read(bytes, out);
            }
            Some(offsets) => {
                for (o, &offset) in out.iter_mut().zip(&offsets[first..]) {
                    // SAFETY: every offset is one that shape and strides reach.
                    let element = unsafe { std::slice::from_raw_parts(start.add(offset * size), size) };
                    self.float.read(element, std::slice::from_mut(o));
                }
            }
        }
    }

    /// Writes stored numbers into row `row`, rounded to nearest even.
    ///
    /// # Safety
    /// No other thread may access this row at the same time.
    pub unsafe fn write(&self, row: usize, values: &[f32]) {
        assert_eq!(values.len(), self.cols);
        // SAFETY: the caller's promise.
        unsafe { self.write_part(row, 0, values, Rounding::Nearest) }
    }

    /// Writes stored numbers into row `row`, from column `first` on.
    ///
    /// # Safety
    /// No other thread may access this part of the row at the same time.
    pub unsafe fn write_part(&self, row: usize, first: usize, values: &[f32], rounding: Rounding) {
        assert!(first <= self.cols && values.len() <= self.cols - first);
        let (start, size) = (self.row(row), self.float.size());
        let index = row as u64 * self.cols as u64 + first as u64;
        match &self.offsets {
            None => {
                // SAFETY: inside a packed row of `cols` elements that the view reaches; the caller is alone on it.
                let bytes =
                    unsafe { std::slice::from_raw_parts_mut(start.add(first * size), values.len() * size) };
                self.float.write_rounded(values, bytes, rounding, index);
            }
            Some(offsets) => {
                for ((v, &offset), index) in values.iter().zip(&offsets[first..]).zip(index..) {
                    // SAFETY: every offset is one that shape and strides reach; the caller is alone on the row.
                    let element = unsafe { std::slice::from_raw_parts_mut(start.add(offset * size), size) };
                    self.float.write_rounded(std::slice::from_ref(v), element, rounding, index);
                }
            }
        }
    }

    /// Copies row `row` of `from`, bit for bit. Both have the same dtype and number of columns.
    ///
    /// # Safety
    /// No other thread may access this row at the same time.
    pub unsafe fn copy_row(&self, from: &Rows, row: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.copy_part(from, row, 0..self.cols) }
    }

    /// Copies columns of row `row` of `from`, bit for bit. Both have the same dtype and number of columns.
    ///
    /// # Safety
    /// No other thread may access this part of the row at the same time.
    pub unsafe fn copy_part(&self, from: &Rows, row: usize, cols: std::ops::Range<usize>) {
        assert!(self.cols == from.cols && self.float == from.float);
        assert!(cols.start <= cols.end && cols.end <= self.cols);
        let size = self.float.size();
        let (to, src) = (self.row(row), from.row(row));
        if self.offsets.is_none() && from.offsets.is_none() {
            let first = cols.start * size;
            // SAFETY: inside two packed rows of `cols` elements; `copy` allows them to be the same memory.
            unsafe { std::ptr::copy(src.add(first), to.add(first), cols.len() * size) };
            return;
        }
        for i in cols {
            let at = |rows: &Rows| rows.offsets.as_ref().map_or(i, |o| o[i]) * size;
            // SAFETY: offsets that both views reach.
            unsafe { std::ptr::copy(src.add(at(from)), to.add(at(self)), size) };
        }
    }
}

/// A tensor and what keeps its memory alive: a mapped file, a vector, or a host that promised.
#[derive(Clone)]
pub struct Tensor {
    view: View,
    _keep: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} on {}", self.view.dtype, self.view.shape, self.view.device)
    }
}

impl std::ops::Deref for Tensor {
    type Target = View;
    fn deref(&self) -> &View {
        &self.view
    }
}

impl Tensor {
    /// A view whose memory `keep` holds alive.
    pub fn new(view: View, keep: Arc<dyn Any + Send + Sync>) -> Self {
        Tensor { view, _keep: keep }
    }

    /// A row-major tensor over `bytes`, which `keep` owns at a fixed address. `None` when their number does not fit the shape.
    ///
    /// # Safety
    /// `bytes` must stay valid and unchanged for as long as `keep` lives.
    pub unsafe fn of_bytes(
        bytes: &[u8],
        dtype: Dtype,
        shape: &[usize],
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Option<Self> {
        Some(Tensor { view: View::of_bytes(bytes, dtype, shape)?, _keep: keep })
    }

    /// A row-major tensor that owns its bytes. `None` when their number does not fit the shape.
    pub fn of_vec(bytes: Vec<u8>, dtype: Dtype, shape: &[usize]) -> Option<Self> {
        let keep = Arc::new(bytes);
        let view = View::of_bytes(&keep, dtype, shape)?;
        Some(Tensor { view, _keep: keep })
    }

    /// A row-major f32 tensor that owns its values.
    pub fn of_f32(values: Vec<f32>, shape: &[usize]) -> Self {
        assert_eq!(Some(values.len()), dtype::element_count(shape));
        let keep = Arc::new(values);
        let view = View {
            data: keep.as_ptr().cast::<u8>().cast_mut(),
            device: Device::Cpu,
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            strides: row_major(shape),
        };
        Tensor { view, _keep: keep }
    }

    /// The same elements under another shape; only for row-major tensors of the same count.
    pub fn reshape(&self, shape: &[usize]) -> Option<Self> {
        (self.view.is_contiguous() && dtype::element_count(shape) == Some(self.view.count())).then(|| {
            let mut tensor = self.clone();
            tensor.view.shape = shape.to_vec();
            tensor.view.strides = row_major(shape);
            tensor
        })
    }

    /// Some of the rows (entries of the first axis) of a row-major tensor, sharing its memory.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Option<Self> {
        let (&count, inner) = self.view.shape.split_first()?;
        if !self.view.is_contiguous() || rows.start > rows.end || rows.end > count {
            return None;
        }
        let offset = dtype::byte_len(self.view.dtype, &[&[rows.start], inner].concat())?;
        let mut tensor = self.clone();
        tensor.view.shape[0] = rows.len();
        tensor.view.strides = row_major(&tensor.view.shape);
        // SAFETY: at most one past the end of a row-major tensor, and past it only with no rows left.
        tensor.view.data = unsafe { self.view.data.add(offset) };
        Some(tensor)
    }

    /// The view itself.
    pub fn view(&self) -> &View {
        &self.view
    }
}

/// Row-major strides of a shape.
pub fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i].max(1));
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(data: &mut [f32], shape: &[usize], strides: Option<&[i64]>) -> Result<View> {
        // SAFETY: the tests below pass shapes and strides that stay inside `data`, or that are refused.
        unsafe { View::from_raw(data.as_mut_ptr().cast(), Device::Cpu, Dtype::F32, shape, strides) }
    }

    #[test]
    fn any_strides_read_and_write_like_the_packed_tensor() {
        // A [2, 3, 2] tensor stored channels-last: axis 1 is the fastest.
        let mut stored: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let v = view(&mut stored, &[2, 3, 2], Some(&[6, 1, 3])).unwrap();
        assert!(!v.is_contiguous());
        assert_eq!(v.to_f32("t").unwrap(), [0., 3., 1., 4., 2., 5., 6., 9., 7., 10., 8., 11.]);
        let rows = Rows::of(&v, "t").unwrap();
        // SAFETY: one thread.
        unsafe { rows.write(1, &[-1., -2., -3., -4., -5., -6.]) };
        assert_eq!(stored[6..], [-1., -3., -5., -2., -4., -6.]);
    }

    #[test]
    fn strided_rows_leave_the_neighbours_alone() {
        let mut stored = vec![9f32; 12];
        let v = view(&mut stored, &[3, 2], Some(&[4, 1])).unwrap();
        let rows = Rows::of(&v, "t").unwrap();
        // SAFETY: one thread.
        unsafe { (0..3).for_each(|i| rows.write(i, &[1., 2.])) };
        assert_eq!(stored, [1., 2., 9., 9., 1., 2., 9., 9., 1., 2., 9., 9.]);
    }

    #[test]
    fn rows_of_a_tensor_share_its_memory() {
        let tensor = Tensor::of_f32((0..12).map(|i| i as f32).collect(), &[4, 3]);
        let rows = tensor.rows(1..3).unwrap();
        assert_eq!(rows.shape(), [2, 3]);
        assert_eq!(rows.to_f32("t").unwrap(), [3., 4., 5., 6., 7., 8.]);
        assert_eq!(tensor.rows(4..4).unwrap().count(), 0);
        assert!(tensor.rows(2..5).is_none());
    }

    #[test]
    fn lies_are_refused() {
        let mut stored = vec![0f32; 4];
        assert!(view(&mut stored, &[usize::MAX, 3], None).is_err());
        assert!(view(&mut stored, &[2, 2], Some(&[-1, 1])).is_err());
        assert!(view(&mut stored, &[2, 2], Some(&[1])).is_err());
        assert!(view(&mut stored, &[2, 2], Some(&[i64::MAX, i64::MAX])).is_err());
    }

    #[test]
    fn repeated_elements_are_seen() {
        let mut stored = vec![0f32; 64];
        for (shape, strides, repeats) in [
            (&[4, 4][..], &[4, 1][..], false),
            (&[4, 4], &[1, 4], false),
            (&[4, 4], &[0, 1], true),
            (&[4, 4], &[1, 1], true),
            (&[4, 4], &[3, 1], true),
            (&[2, 3, 2], &[6, 1, 3], false),
            (&[1, 4], &[0, 1], false),
        ] {
            assert_eq!(
                view(&mut stored, shape, Some(strides)).unwrap().repeats_elements(),
                repeats,
                "{strides:?}"
            );
        }
    }

    #[test]
    fn a_scalar_is_read_from_every_number_type() {
        let keep: Arc<dyn Any + Send + Sync> = Arc::new(());
        let cases: [(Dtype, &[u8]); 6] = [
            (Dtype::F64, &8f64.to_le_bytes()),
            (Dtype::F32, &8f32.to_le_bytes()),
            (Dtype::F16, &[0x00, 0x48]),
            (Dtype::BF16, &[0x00, 0x41]),
            (Dtype::I64, &8i64.to_le_bytes()),
            (Dtype::U8, &[8]),
        ];
        for (dtype, bytes) in cases {
            for shape in [&[] as &[usize], &[1], &[1, 1]] {
                // SAFETY: the bytes are constants of this test.
                let tensor = unsafe { Tensor::of_bytes(bytes, dtype, shape, keep.clone()) }.unwrap();
                assert_eq!(tensor.scalar(), Some(8.0), "{dtype}");
            }
        }
        assert_eq!(Tensor::of_f32(vec![1.0, 2.0], &[2]).scalar(), None);
    }
}
