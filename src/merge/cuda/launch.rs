//! Which kernel merges which weight, in which strips.

use super::tables::{Kind, Row, Strip, Target, Term};
use crate::cuda::{Arg, Buffer, Gpu, Queue};
use crate::dtype::Float;
use crate::error::Result;

/// Tiles of a strip at most: long enough that starting a block costs little, short enough that the last ones end together. The kernels without
/// products rely on it.
const STRIP: usize = 16;
const COLUMNS: usize = 64;
/// More products of one weight than that go one element at a time: `kernels/ring.cuh` keeps a table of them in shared memory.
const MOST_PRODUCTS: usize = 256;
const PRODUCT: usize = 96;
/// Bytes of shared memory that a fragment of an up factor takes, for the four warps that have one in each tile.
const FRAGMENT: usize = 4 * 512;

/// The kernels of `kernels/merge.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Variant {
    /// Low-rank products of 16-bit factors.
    Products,
    /// No product.
    Plain,
    /// Products and plain terms.
    Full,
    /// Anything, one element at a time.
    Any,
}

impl Variant {
    /// The fastest kernel that does these terms of a target. `aligned`: the weight's rows begin at 16 bytes, and its columns lie side by side in
    /// eights.
    pub fn of(target: &Target, terms: &[Term], aligned: bool) -> Self {
        // `Products` tells no element of a warp's 32 rows and 64 columns from its neighbours.
        let ends = |start: u32, count: u32, block: u32, size: u32| {
            start % block == 0 && ((start + count) % block == 0 || start + count == size)
        };
        let whole_blocks =
            |t: &Term| ends(t.row, t.rows, 32, target.rows) && ends(t.column, t.columns, 64, target.columns);
        let simple = |t: &Term| {
            let low_rank = t.kind == Kind::LowRank as u32 && t.format != super::tables::Format::Split as u32;
            low_rank && t.gain == 0 && whole_blocks(t)
        };
        let products = terms.iter().filter(|t| t.is_product()).count();
        if !aligned || products > MOST_PRODUCTS || !terms.iter().all(|t| t.is_product() || t.plain == 1) {
            Variant::Any
        } else if products == 0 {
            Variant::Plain
        } else if terms.iter().all(simple) {
            Variant::Products
        } else {
            Variant::Full
        }
    }

    fn shape(self, float: Float) -> Shape {
        let size = float.size();
        let (kernel, threads, rows, blocks, tiles, ring) = match (self, float) {
            (Variant::Products, Float::F32) => ("merge_32", 256, 64, 1, 32 << 10, 32 << 10),
            (Variant::Products, Float::F16 | Float::BF16) => ("merge_16", 256, 128, 2, 32 << 10, 32 << 10),
            (Variant::Products, Float::E4M3) => ("merge_e4m3", 128, 128, 2, 8 << 10, 16 << 10),
            (Variant::Products, Float::E5M2) => ("merge_e5m2", 128, 128, 2, 8 << 10, 16 << 10),
            (Variant::Full, _) => {
                let kernel = ["merge_8_full", "merge_16_full", "merge_32_full"][size / 2];
                (kernel, 128, 64, 1, size * (4 << 10) + (16 << 10), 24 << 10)
            }
            (Variant::Plain, _) => {
                let kernel = ["merge_8_plain", "merge_16_plain", "merge_32_plain"][size / 2];
                (kernel, 128, 64, 0, size * (8 << 10), 0)
            }
            (Variant::Any, _) => ("merge_any", 128, 64, 0, 0, 0),
        };
        Shape { kernel, threads, rows, blocks, tiles, ring }
    }
}

/// A kernel, and what a block of it takes.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub kernel: &'static str,
    pub threads: u32,
    /// Rows of a tile.
    rows: usize,
    /// Blocks of 16 rows of a warp, whose up factors it would like to keep in shared memory; 0: none.
    blocks: usize,
    /// Bytes of shared memory for the weight and sums aside; for factors on their way, where there are copies that run ahead.
    tiles: usize,
    ring: usize,
}

/// Of `kernels/compact.cu`, for weights of 16 bits; `one`: with one product of 16-bit factors on all of it.
pub(super) fn compact(float: Float, one: bool) -> Shape {
    let (tiles, ring) = if one { (16 << 10, 16 << 10) } else { (32 << 10, 24 << 10) };
    let kernel = match (float == Float::F16, one) {
        (true, true) => "compact_f16_one",
        (true, false) => "compact_f16",
        (false, true) => "compact_bf16_one",
        (false, false) => "compact_bf16",
    };
    Shape { kernel, threads: 128, rows: 64, blocks: 1, tiles, ring }
}

impl Shape {
    /// Bytes of shared memory, and of how many fragments of up factors there is room in them.
    pub fn shared(&self, gpu: &Gpu, products: usize, wanted: usize) -> (usize, usize) {
        if self.ring == 0 || gpu.architecture() < 80 {
            return (self.tiles, 0);
        }
        let least = self.tiles + self.ring + products * PRODUCT;
        // Of a multiprocessor's memory, 1 KiB more than a block can have, the driver takes 1 KiB per block; the kernels' own variables are smaller
        // than this.
        let (driver, own) = (1 << 10, 2048);
        let alone = gpu.shared_memory().saturating_sub(own);
        let in_pairs = ((gpu.shared_memory() + driver) / 2).saturating_sub(driver + own);
        let most = if least <= in_pairs { in_pairs } else { alone };
        let room = (most.saturating_sub(least) / FRAGMENT).min(wanted);
        (least + room * FRAGMENT, room)
    }
}

/// Tiles of targets that one launch takes.
struct Launch {
    shape: Shape,
    strips: Vec<Strip>,
    /// The most products of a target, and fragments of up factors that a warp would like to keep in shared memory.
    products: usize,
    fragments: usize,
    on_device: Option<Buffer>,
}

/// Sorts targets into launches.
#[derive(Default)]
pub(super) struct Launches(Vec<Launch>);

impl Launches {
    /// Adds a target; `terms` are its own.
    pub fn add(&mut self, index: usize, target: &Target, float: Float, terms: &[Term], variant: Variant) {
        let shape = variant.shape(float);
        let at = self.0.iter().position(|l| l.shape.kernel == shape.kernel).unwrap_or_else(|| {
            self.0.push(Launch { shape, strips: Vec::new(), products: 0, fragments: 0, on_device: None });
            self.0.len() - 1
        });
        let launch = &mut self.0[at];
        let products = target.products as usize;
        let fragments: usize = terms.iter().take(products).map(Term::fragments).sum();
        launch.products = launch.products.max(products);
        launch.fragments = launch.fragments.max(fragments * shape.blocks);
        launch.strips.extend(strips(index, target, shape.rows));
    }

    /// Enqueues everything.
    ///
    /// # Safety
    /// The tables describe memory that lives until the stream has passed here.
    pub unsafe fn run(&mut self, queue: &Queue, targets: &Buffer, terms: &Buffer) -> Result<()> {
        for launch in &mut self.0 {
            let strips = match &launch.on_device {
                Some(strips) => strips,
                None => launch.on_device.insert(queue.upload_new(Row::bytes(&launch.strips))?),
            };
            let Shape { kernel, threads, .. } = launch.shape;
            let (shared, room) = launch.shape.shared(queue.gpu(), launch.products, launch.fragments);
            let args = [Arg::from(targets), Arg::from(terms), Arg::from(strips), Arg::from(room as u32)];
            let grid = [launch.strips.len() as u32, 1, 1];
            // SAFETY: the kernel's parameters in its order; the caller's promise for what the tables describe.
            unsafe { queue.launch("merge", kernel, grid, threads, shared, &args)? };
        }
        Ok(())
    }
}

/// A weight in strips of tiles of so many rows and 64 columns. Those of a row of tiles are alike, of an even number but for the last one: two warps
/// side by side take a tile each.
pub(super) fn strips(index: usize, target: &Target, rows_per_tile: usize) -> impl Iterator<Item = Strip> {
    let tiles = (target.columns as usize).div_ceil(COLUMNS);
    let each = tiles.div_ceil(tiles.div_ceil(STRIP).max(1)).next_multiple_of(2);
    let rows = (target.rows as usize).div_ceil(rows_per_tile);
    (0..rows).flat_map(move |row_tile| {
        (0..tiles).step_by(each.max(1)).map(move |first| Strip {
            target: index as u32,
            row_tile: row_tile as u32,
            column_tile: first as u32,
            count: each.min(tiles - first) as u32,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_within_a_warps_elements_is_not_for_the_fastest_kernel() {
        let target = Target { rows: 200, columns: 328, ..Default::default() };
        let of = |row, rows, column, columns| {
            let term = Term { row, rows, column, columns, ..Default::default() };
            Variant::of(&target, &[term], true)
        };
        for (row, rows, column, columns) in [(0, 200, 0, 328), (32, 64, 64, 128), (160, 40, 320, 8)] {
            assert_eq!(of(row, rows, column, columns), Variant::Products, "{row} {rows} {column} {columns}");
        }
        for (row, rows, column, columns) in
            [(16, 184, 0, 328), (0, 48, 0, 328), (0, 200, 32, 296), (0, 200, 0, 96), (0, 199, 0, 328)]
        {
            assert_eq!(of(row, rows, column, columns), Variant::Full, "{row} {rows} {column} {columns}");
        }
    }
}
