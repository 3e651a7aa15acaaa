//! Matrix products for the CPU executor: a safe door to the `gemm` crate, and the thread pool that everything here runs on.

use once_cell::sync::Lazy;

/// How many threads the library may use: as many as the machine offers, or as `LYCORE_NUM_THREADS` says when it is first asked.
pub fn threads() -> usize {
    static THREADS: Lazy<usize> = Lazy::new(|| {
        let wanted = std::env::var("LYCORE_NUM_THREADS").ok().and_then(|v| v.parse().ok()).filter(|&n| n > 0);
        wanted.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
    });
    *THREADS
}

/// Runs `work` on the library's own threads; on the calling thread where the process may not start any.
pub fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    static POOL: Lazy<Option<rayon::ThreadPool>> = Lazy::new(|| {
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads());
        builder.thread_name(|i| format!("lycore-{i}")).build().ok()
    });
    match &*POOL {
        Some(pool) => pool.install(work),
        None => work(),
    }
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
