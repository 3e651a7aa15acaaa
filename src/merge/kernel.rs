//! The one inner loop of the CPU executor: a tile of a thin product, added to the tile of the weight that it belongs to.
//!
//! A weight is read once and written once, past the caches where it is large; the product never leaves the core. Each element is the sum
//! over the rank in its order, in blocks of [`BLOCK`], whatever the tile, so a result depends neither on the number of threads nor on how a weight
//! is cut.

use once_cell::sync::Lazy;

/// So many ranks are summed by themselves before they join the rest. In one chain every product is rounded at the size of the sum so far: five LoRAs
/// of rank 32 then leave 8.3 times the error of a correctly rounded fp32 weight, in blocks 3.6 times. Smaller blocks cost more and gain nothing.
const BLOCK: usize = 16;

/// What the machine runs.
pub(super) struct Kernel {
    /// Rows of a tile.
    pub rows: usize,
    /// Columns of a tile.
    pub cols: usize,
    /// Its name, for tests and figures.
    #[cfg_attr(not(test), allow(dead_code))]
    pub name: &'static str,
    run: unsafe fn(&Tile),
}

/// `out = base + a @ b` on one tile; where the product is 0 the base keeps its bits (so -0 stays -0).
pub(super) struct Tile {
    /// The inner dimension.
    pub depth: usize,
    /// [depth, Kernel::rows].
    pub a: *const f32,
    /// [depth, Kernel::cols].
    pub b: *const f32,
    /// First element of the tile to read, any alignment.
    pub base: *const f32,
    /// Between its rows; 0 reads one row again and again.
    pub base_stride: usize,
    /// First element of the tile to write.
    pub out: *mut f32,
    /// Between its rows.
    pub out_stride: usize,
    /// How many rows are written, at most `Kernel::rows`; always all columns.
    pub rows: usize,
    /// Whether `out` is written past the caches; all its rows then begin at multiples of 64 bytes.
    pub stream: bool,
    /// A tile, like `base`, that will be read soon. Only a hint: the address need not be valid.
    pub ahead: *const f32,
}

impl Kernel {
    /// The best one here.
    pub fn get() -> &'static Kernel {
        static BEST: Lazy<Kernel> = Lazy::new(|| {
            let mut all = Kernel::all();
            all.swap_remove(0)
        });
        &BEST
    }

    /// Every one that this machine can run, the best first.
    pub fn all() -> Vec<Kernel> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                all.push(Kernel { rows: 6, cols: 32, name: "avx512", run: x86::avx512 });
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Kernel { rows: 6, cols: 16, name: "avx2", run: x86::avx2 });
            }
        }
        all.push(Kernel { rows: 4, cols: 16, name: "portable", run: portable });
        all
    }

    /// Computes one tile.
    ///
    /// # Safety
    /// The pointers reach what `Tile` says; nobody else writes `base` or accesses `out`, which is `base` itself or apart from it.
    pub unsafe fn run(&self, tile: &Tile) {
        debug_assert!(tile.rows <= self.rows);
        // SAFETY: the caller's promise; `all` lists only what the machine can run.
        unsafe { (self.run)(tile) }
    }

    /// What makes streamed stores visible to other threads; once after a run of tiles.
    pub fn finish(&self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE is part of x86-64.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

/// Without vector instructions of its own: as the compiler sees fit.
///
/// # Safety
/// As [`Kernel::run`].
unsafe fn portable(t: &Tile) {
    // One rounding per step where the machine has it; elsewhere `mul_add` would be a call.
    let step = |acc: f32, x: f32, y: f32| match cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        true => x.mul_add(y, acc),
        false => acc + x * y,
    };
    let mut sums = [[0f32; 16]; 4];
    for start in (0..t.depth).step_by(BLOCK) {
        let mut acc = [[0f32; 16]; 4];
        for k in start..t.depth.min(start + BLOCK) {
            // SAFETY: both packed factors have `depth` rows of this length, aligned as f32.
            let (a, b) =
                unsafe { (&*t.a.add(k * 4).cast::<[f32; 4]>(), &*t.b.add(k * 16).cast::<[f32; 16]>()) };
            for (acc, &x) in acc.iter_mut().zip(a) {
                acc.iter_mut().zip(b).for_each(|(acc, &y)| *acc = step(*acc, x, y));
            }
        }
        sums.iter_mut().flatten().zip(acc.iter().flatten()).for_each(|(sum, acc)| *sum += acc);
    }
    for (i, sums) in sums.iter().take(t.rows).enumerate() {
        for (j, &sum) in sums.iter().enumerate() {
            // SAFETY: inside the tile.
            unsafe {
                let w = t.base.add(i * t.base_stride + j).read_unaligned();
                t.out.add(i * t.out_stride + j).write_unaligned(if sum == 0.0 { w } else { w + sum });
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Tile, BLOCK};
    use std::arch::x86_64::*;

    /// 6 x 32: in registers 12 sums, 12 of the block, two halves of a row of b, one broadcast.
    ///
    /// # Safety
    /// As `Kernel::run`, on a machine with AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(t: &Tile) {
        // SAFETY: passed on.
        unsafe {
            match (t.rows, t.depth > BLOCK) {
                (..=2, false) => avx512_rows::<2, false>(t),
                (..=2, true) => avx512_rows::<2, true>(t),
                (3..=4, false) => avx512_rows::<4, false>(t),
                (3..=4, true) => avx512_rows::<4, true>(t),
                (_, false) => avx512_rows::<6, false>(t),
                (_, true) => avx512_rows::<6, true>(t),
            }
        }
    }

    /// The product of the next `depth` ranks, in the first `M` rows.
    ///
    /// # Safety
    /// The packed factors go on for so many ranks; as `avx512`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512_block<const M: usize>(
        mut a: *const f32,
        mut b: *const f32,
        depth: usize,
    ) -> [[__m512; 2]; M] {
        // SAFETY: reads inside the packed factors.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); 2]; M];
            for _ in 0..depth {
                let (left, right) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(i));
                    acc[0] = _mm512_fmadd_ps(x, left, acc[0]);
                    acc[1] = _mm512_fmadd_ps(x, right, acc[1]);
                }
                (a, b) = (a.add(6), b.add(32));
            }
            acc
        }
    }

    /// The first `M` rows of the tile, `DEEP` where there are several blocks; rows from `t.rows` on are computed and not written.
    ///
    /// # Safety
    /// As `avx512`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512_rows<const M: usize, const DEEP: bool>(t: &Tile) {
        // SAFETY: reads inside the packed factors and the tile, writes inside the tile; prefetching touches nothing.
        unsafe {
            for i in 0..M {
                let line = t.ahead.wrapping_add(i * t.base_stride).cast::<i8>();
                _mm_prefetch::<_MM_HINT_T0>(line);
                _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(64));
            }
            let (mut a, mut b, mut depth) = (t.a, t.b, if DEEP { BLOCK } else { t.depth });
            let mut sums = avx512_block::<M>(a, b, depth);
            while DEEP && depth < t.depth {
                (a, b) = (a.add(BLOCK * 6), b.add(BLOCK * 32));
                let more = avx512_block::<M>(a, b, BLOCK.min(t.depth - depth));
                depth += BLOCK;
                for (sums, more) in sums.iter_mut().zip(&more) {
                    sums[0] = _mm512_add_ps(sums[0], more[0]);
                    sums[1] = _mm512_add_ps(sums[1], more[1]);
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                if i >= t.rows {
                    break;
                }
                for (half, &sum) in sums.iter().enumerate() {
                    let w = _mm512_loadu_ps(t.base.add(i * t.base_stride + half * 16));
                    let some = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(sum, _mm512_setzero_ps());
                    let w = _mm512_mask_add_ps(w, some, w, sum);
                    let out = t.out.add(i * t.out_stride + half * 16);
                    match t.stream {
                        true => _mm512_stream_ps(out, w),
                        false => _mm512_storeu_ps(out, w),
                    }
                }
            }
        }
    }

    /// 6 x 16: in registers 12 sums of the block, two halves of a row of b, one broadcast.
    ///
    /// # Safety
    /// As `Kernel::run`, on a machine with AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(t: &Tile) {
        // SAFETY: passed on.
        unsafe {
            match (t.rows, t.depth > BLOCK) {
                (..=2, false) => avx2_rows::<2, false>(t),
                (..=2, true) => avx2_rows::<2, true>(t),
                (3..=4, false) => avx2_rows::<4, false>(t),
                (3..=4, true) => avx2_rows::<4, true>(t),
                (_, false) => avx2_rows::<6, false>(t),
                (_, true) => avx2_rows::<6, true>(t),
            }
        }
    }

    /// The product of the next `depth` ranks, in the first `M` rows.
    ///
    /// # Safety
    /// The packed factors go on for so many ranks; as `avx2`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_block<const M: usize>(
        mut a: *const f32,
        mut b: *const f32,
        depth: usize,
    ) -> [[__m256; 2]; M] {
        // SAFETY: reads inside the packed factors.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 2]; M];
            for _ in 0..depth {
                let (left, right) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*a.add(i));
                    acc[0] = _mm256_fmadd_ps(x, left, acc[0]);
                    acc[1] = _mm256_fmadd_ps(x, right, acc[1]);
                }
                (a, b) = (a.add(6), b.add(16));
            }
            acc
        }
    }

    /// The first `M` rows of the tile, `DEEP` where there are several blocks; rows from `t.rows` on are computed and not written.
    ///
    /// # Safety
    /// As `avx2`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_rows<const M: usize, const DEEP: bool>(t: &Tile) {
        // SAFETY: reads inside the packed factors and the tile, writes inside the tile; prefetching touches nothing.
        unsafe {
            for i in 0..M {
                _mm_prefetch::<_MM_HINT_T0>(t.ahead.wrapping_add(i * t.base_stride).cast::<i8>());
            }
            let (mut a, mut b, mut depth) = (t.a, t.b, if DEEP { BLOCK } else { t.depth });
            let mut sums = avx2_block::<M>(a, b, depth);
            while DEEP && depth < t.depth {
                (a, b) = (a.add(BLOCK * 6), b.add(BLOCK * 16));
                let more = avx2_block::<M>(a, b, BLOCK.min(t.depth - depth));
                depth += BLOCK;
                for (sums, more) in sums.iter_mut().zip(&more) {
                    sums[0] = _mm256_add_ps(sums[0], more[0]);
                    sums[1] = _mm256_add_ps(sums[1], more[1]);
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                if i >= t.rows {
                    break;
                }
                for (half, &sum) in sums.iter().enumerate() {
                    let w = _mm256_loadu_ps(t.base.add(i * t.base_stride + half * 8));
                    let none = _mm256_cmp_ps::<_CMP_EQ_OQ>(sum, _mm256_setzero_ps());
                    let w = _mm256_blendv_ps(_mm256_add_ps(w, sum), w, none);
                    let out = t.out.add(i * t.out_stride + half * 8);
                    match t.stream {
                        true => _mm256_stream_ps(out, w),
                        false => _mm256_storeu_ps(out, w),
                    }
                }
            }
        }
    }
}
