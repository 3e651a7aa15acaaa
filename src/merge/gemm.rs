//! Matrix products for the CPU executor: a safe door to the `gemm` crate, and the thread pool that everything here runs on.

use once_cell::sync::Lazy;

/// The library's own threads: as many as the machine offers, or as `LYCORE_NUM_THREADS` says when the library is first used.
pub fn pool() -> &'static rayon::ThreadPool {
    static POOL: Lazy<rayon::ThreadPool> = Lazy::new(|| {
        let wanted = std::env::var("LYCORE_NUM_THREADS").ok().and_then(|v| v.parse().ok());
        let threads = wanted
            .filter(|&n| n > 0)
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
        let build =
            |n| rayon::ThreadPoolBuilder::new().num_threads(n).thread_name(|i| format!("lycore-{i}")).build();
        // A process that may not start threads gets one that runs everything in place.
        build(threads)
            .or_else(|_| rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build())
            .unwrap_or_else(|e| panic!("cannot make a thread pool: {e}"))
    });
    &POOL
}

/// A matrix inside a slice.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// The first `rows` x `cols` values of `data`, row-major.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert!(rows * cols <= data.len());
        Mat { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// `out[.., at .. at + b.cols] += scale * a @ b` on the first `a.rows` rows of `out`, whose rows are `stride` apart.
pub fn add_product(
    out: &mut [f32],
    stride: usize,
    at: usize,
    scale: f32,
    a: Mat<'_>,
    b: Mat<'_>,
    parallel: bool,
) {
    assert_eq!(a.cols, b.rows);
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    assert!((a.rows - 1) * stride + at + b.cols <= out.len() && at + b.cols <= stride);
    let parallelism = if parallel { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: the three matrices lie inside their slices (asserted here and in `Mat::new`), and `out` is borrowed mutably.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr().add(at),
            1,
            stride as isize,
            true,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
