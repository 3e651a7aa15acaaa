//! Which kernel merges which weight, in which strips.

use super::tables::{self, Kind, Row, Strip, Target, Term};
use crate::cuda::{Arg, Buffer, Gpu, Queue};
use crate::dtype::Float;
use crate::error::Result;

/// Tiles of a strip at most: long enough that starting a block costs little, short enough that the last ones end together. The kernels without
/// products rely on it.
const STRIP: usize = 16;
const COLUMNS: usize = 64;
/// Bytes of a product in the table that `kernels/ring.cuh` keeps of a weight's in shared memory.
const PRODUCT: usize = 96;
/// Bytes of shared memory that a fragment of an up factor takes, for the four warps that have one in each tile.
const FRAGMENT: usize = 4 * 512;

/// The kernels of `kernels/merge.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Variant {
    /// Low-rank products of 16-bit factors.
    Products,
    /// Products of any kind in regions such as those of `Products`, and scales of the weight there; 16-bit weights.
    Whole,
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
        let simple =
            |t: &Term| t.kind == Kind::LowRank as u32 && !t.is_split() && t.gain == 0 && whole_blocks(t);
        let scales = |t: &Term| t.kind == Kind::ScaleRows as u32 || t.kind == Kind::ScaleColumns as u32;
        let in_blocks = |t: &Term| (t.is_product() || scales(t)) && whole_blocks(t);
        let of_two_bytes = [Float::F16, Float::BF16].iter().any(|&f| target.dtype == tables::dtype(f));
        let products = terms.iter().filter(|t| t.is_product()).count();
        if !aligned || products > Variant::Full.most_products() {
            Variant::Any
        } else if products > 0 && terms.iter().all(simple) {
            Variant::Products
        } else if products > 0
            && products <= Variant::Whole.most_products()
            && of_two_bytes
            && terms.iter().all(in_blocks)
        {
            Variant::Whole
        } else if !terms.iter().all(|t| t.is_product() || t.plain == 1) {
            Variant::Any
        } else if products == 0 {
            Variant::Plain
        } else {
            Variant::Full
        }
    }

    /// Of one weight: a table of more does not fit beside the rest on every device.
    fn most_products(self) -> usize {
        match self {
            Variant::Whole => 64,
            _ => 256,
        }
    }

    fn shape(self, float: Float) -> Shape {
        let size = float.size();
        let (kernel, threads, rows, tiles, ring, aside) = match (self, float) {
            (Variant::Products, Float::F32) => ("merge_32", 256, 64, 32 << 10, 32 << 10, 0),
            (Variant::Products, Float::F16 | Float::BF16) => ("merge_16", 256, 128, 32 << 10, 32 << 10, 0),
            (Variant::Products, Float::E4M3) => ("merge_e4m3", 128, 128, 8 << 10, 16 << 10, 0),
            (Variant::Products, Float::E5M2) => ("merge_e5m2", 128, 128, 8 << 10, 16 << 10, 0),
            (Variant::Whole, _) => ("merge_16_whole", 256, 128, 16 << 10, 40 << 10, 32 << 10),
            (Variant::Full, _) => {
                let kernel = ["merge_8_full", "merge_16_full", "merge_32_full"][size / 2];
                (kernel, 128, 64, size * (4 << 10) + (16 << 10), 24 << 10, 0)
            }
            (Variant::Plain, _) => {
                let kernel = ["merge_8_plain", "merge_16_plain", "merge_32_plain"][size / 2];
                (kernel, 128, 64, size * (8 << 10), 0, 0)
            }
            (Variant::Any, _) => ("merge_any", 128, 64, 0, 0, 0),
        };
        Shape { kernel, threads, rows, tiles, ring, aside }
    }
}

/// A kernel, and what a block of it takes.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub kernel: &'static str,
    pub threads: u32,
    /// Rows of a tile.
    rows: usize,
    /// Bytes of shared memory for the weight (and what else is always there); for what is on its way, where there are copies that run ahead; for sums
    /// that wait while a term is multiplied by more than its coefficient.
    tiles: usize,
    ring: usize,
    aside: usize,
}

/// Of `kernels/compact.cu`, for weights of 16 bits; `one`: with one product of 16-bit factors on all of it.
pub(super) fn compact(float: Float, one: bool) -> Shape {
    let (tiles, ring) = if one { (8 << 10, 16 << 10) } else { (32 << 10, 24 << 10) };
    let kernel = match (float == Float::F16, one) {
        (true, true) => "compact_f16_one",
        (true, false) => "compact_f16",
        (false, true) => "compact_bf16_one",
        (false, false) => "compact_bf16",
    };
    Shape { kernel, threads: 128, rows: 64, tiles, ring, aside: 0 }
}

impl Shape {
    /// Bytes of shared memory, and of how many fragments of up factors there is room in them.
    pub fn shared(&self, gpu: &Gpu, products: usize, wanted: usize, waits: bool) -> (usize, usize) {
        let aside = if waits { self.aside } else { 0 };
        if self.ring == 0 || gpu.architecture() < 80 {
            return (self.tiles + aside, 0);
        }
        let least = self.tiles + self.ring + products * PRODUCT + aside;
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
    /// The most products of a target, and fragments of up factors that four warps would like to keep in shared memory.
    products: usize,
    fragments: usize,
    /// Whether sums of a target have to wait.
    waits: bool,
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
            self.0.push(Launch {
                shape,
                strips: Vec::new(),
                products: 0,
                fragments: 0,
                waits: false,
                on_device: None,
            });
            self.0.len() - 1
        });
        let launch = &mut self.0[at];
        let products = target.products as usize;
        let alone = |t: &Term| t.kind == Kind::Hadamard as u32 || t.gain != 0;
        let fragments: usize = terms.iter().take(products).map(Term::fragments).sum();
        launch.products = launch.products.max(products);
        launch.fragments = launch.fragments.max(fragments * shape.rows / 64);
        launch.waits |= products > 1 && terms.iter().take(products).any(alone);
        launch.strips.extend(strips(index, target, shape.rows));
    }

    /// Enqueues everything.
    ///
    /// # Safety
    /// The tables describe memory that lives until the stream has passed here.
    pub unsafe fn run(&mut self, queue: &Queue, targets: &Buffer, terms: &Buffer) -> Result<()> {
        for launch in &mut self.0 {
            let Shape { kernel, threads, .. } = launch.shape;
            let (shared, room) =
                launch.shape.shared(queue.gpu(), launch.products, launch.fragments, launch.waits);
            let strips = match &launch.on_device {
                Some(strips) => strips,
                None => launch.on_device.insert(queue.upload_new(Row::bytes(&launch.strips))?),
            };
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
    use super::super::tables::Pair;
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

    const ROWS: u32 = 200;
    const COLUMNS: u32 = 328;

    fn of(dtype: Float, terms: &[Term]) -> Variant {
        let target =
            Target { rows: ROWS, columns: COLUMNS, dtype: tables::dtype(dtype), ..Default::default() };
        Variant::of(&target, terms, true)
    }

    fn term(kind: Kind) -> Term {
        Term { kind: kind as u32, rows: ROWS, columns: COLUMNS, plain: 1, ..Default::default() }
    }

    #[test]
    fn a_weight_of_16_bits_takes_any_product_of_whole_blocks_at_once() {
        let loha = term(Kind::Hadamard);
        let part = |kind, row, rows| Term { row, rows, plain: 0, ..term(kind) };
        let split = |pair: Pair| Term { format: pair as u32, ..term(Kind::LowRank) };
        let dora = Term { gain: 256, gain_axis: 1, ..term(Kind::LowRank) };
        let together: [&[Term]; 7] = [
            &[loha],
            &[split(Pair::Split)],
            &[split(Pair::UpSplit), term(Kind::LowRank)],
            &[dora, term(Kind::ScaleColumns)],
            &[dora, part(Kind::ScaleRows, 64, 96)],
            &[part(Kind::Hadamard, 160, 40), dora],
            &[loha, term(Kind::ScaleRows), term(Kind::ScaleColumns)],
        ];
        for terms in together {
            assert_eq!(of(Float::BF16, terms), Variant::Whole, "{terms:?}");
            assert_eq!(of(Float::F16, terms), Variant::Whole, "{terms:?}");
        }
        let of_other_sizes = [Float::F32, Float::E4M3, Float::E5M2];
        assert_eq!(of_other_sizes.map(|float| of(float, &[loha])), [Variant::Full; 3]);
        assert_eq!(of(Float::BF16, &[term(Kind::LowRank), split(Pair::F16)]), Variant::Products);
        assert_eq!(of(Float::BF16, &[loha, term(Kind::Kron)]), Variant::Full);
        assert_eq!(of(Float::BF16, &[part(Kind::Hadamard, 16, 64)]), Variant::Full);
        assert_eq!(of(Float::BF16, &[term(Kind::ScaleRows)]), Variant::Plain);
        assert_eq!(of(Float::BF16, &[loha, part(Kind::ScaleRows, 16, 64)]), Variant::Any);
        assert_eq!(of(Float::BF16, &[loha; 64]), Variant::Whole);
        assert_eq!(of(Float::BF16, &[loha; 65]), Variant::Full);
    }

    #[test]
    fn a_block_fits_in_the_least_shared_memory_of_a_device() {
        // Of sm_86, sm_89 and sm_120; of sm_75.
        let (least, least_without_copies) = (99 << 10, 64 << 10);
        for variant in [Variant::Products, Variant::Whole, Variant::Plain, Variant::Full] {
            for float in [Float::F32, Float::F16, Float::BF16, Float::E4M3, Float::E5M2] {
                let Shape { kernel, tiles, ring, aside, .. } = variant.shape(float);
                let own = 2 << 10;
                assert!(tiles + aside + own <= least_without_copies, "{kernel}");
                let table = variant.most_products() * PRODUCT;
                assert!(tiles + aside + ring + table + own <= least, "{kernel}");
            }
        }
    }

    #[test]
    fn sums_wait_where_a_term_among_others_stands_alone() {
        let launched = |terms: &[Term]| {
            let target = Target {
                rows: ROWS,
                columns: COLUMNS,
                dtype: tables::dtype(Float::BF16),
                products: terms.iter().filter(|t| t.is_product()).count() as u32,
                ..Default::default()
            };
            let mut launches = Launches::default();
            launches.add(0, &target, Float::BF16, terms, Variant::Whole);
            (launches.0[0].waits, launches.0[0].fragments)
        };
        let loha = Term { ranks: 2, ranks2: 1, format2: Pair::UpSplit as u32, ..term(Kind::Hadamard) };
        let dora = Term { gain: 256, ranks: 3, ..term(Kind::LowRank) };
        let lora = Term { gain: 0, ..dora };
        // Of 64 rows each, of which a tile has twice as many.
        assert_eq!(launched(&[loha]), (false, 2 * (2 + 3)));
        assert_eq!(launched(&[dora, term(Kind::ScaleRows)]), (false, 2 * 3));
        assert_eq!(launched(&[lora, lora]), (false, 2 * 6));
        assert_eq!(launched(&[lora, dora]), (true, 2 * 6));
        assert_eq!(launched(&[loha, lora]), (true, 2 * 8));
    }
}
