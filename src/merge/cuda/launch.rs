//! Which kernel merges which weight, in which strips.

use super::tables::{Kind, Row, Strip, Target, Term};
use crate::cuda::{Arg, Buffer, Gpu, Queue};
use crate::dtype::Float;
use crate::error::{Error, Result};

/// Tiles of a strip at most: long enough that starting a block costs little, short enough that the last ones end together.
const STRIP: usize = 16;
const COLUMNS: usize = 64;
const THREADS: u32 = 128;
/// Stages of `kernels/tile.cuh`'s ring.
const STAGES: usize = 3;

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
        if !aligned || !terms.iter().all(|t| t.is_product() || t.plain == 1) {
            Variant::Any
        } else if !terms.iter().any(Term::is_product) {
            Variant::Plain
        } else if terms.iter().all(simple) {
            Variant::Products
        } else {
            Variant::Full
        }
    }

    /// Blocks of 16 rows of a warp.
    fn blocks(self, float: Float) -> usize {
        if self == Variant::Products && float.size() <= 2 {
            2
        } else {
            1
        }
    }

    fn kernel(self, float: Float) -> String {
        let name = super::tables::name(float);
        match self {
            Variant::Products => format!("merge_{name}"),
            Variant::Plain => format!("merge_{name}_plain"),
            Variant::Full => format!("merge_{name}_full"),
            Variant::Any => "merge_any".into(),
        }
    }
}

/// Tiles of targets that one launch takes.
pub(super) struct Launch {
    variant: Variant,
    float: Float,
    strips: Vec<Strip>,
    /// Fragments of up factors that a warp would like to keep in shared memory.
    room: usize,
    on_device: Option<Buffer>,
}

/// Sorts targets into launches.
#[derive(Default)]
pub(super) struct Launches(Vec<Launch>);

impl Launches {
    /// Adds a target; `terms` are its own.
    pub fn add(
        &mut self,
        index: usize,
        target: &Target,
        float: Float,
        terms: &[Term],
        variant: Variant,
    ) -> Result<()> {
        let rows_per_tile = 64 * variant.blocks(float);
        let launch = match self
            .0
            .iter_mut()
            .position(|l| l.variant == variant && (l.float == float || variant == Variant::Any))
        {
            Some(at) => &mut self.0[at],
            None => {
                self.0.push(Launch { variant, float, strips: Vec::new(), room: 0, on_device: None });
                self.0.last_mut().ok_or_else(|| Error::Backend("an empty list".into()))?
            }
        };
        let fragments = |format: u32, ranks: u32| {
            let parts = if format == super::tables::Format::Split as u32 { 3 } else { 1 };
            parts * ranks as usize
        };
        let room: usize = terms
            .iter()
            .take(target.products as usize)
            .map(|t| fragments(t.format, t.ranks) + fragments(t.format2, t.ranks2))
            .sum();
        launch.room = launch.room.max(room * variant.blocks(float));
        launch.strips.extend(strips(index, target, rows_per_tile));
        Ok(())
    }

    /// Enqueues everything.
    ///
    /// # Safety
    /// The tables describe memory that lives until the stream has passed here.
    pub unsafe fn run(&mut self, queue: &Queue, targets: &Buffer, terms: &Buffer) -> Result<()> {
        for launch in &mut self.0 {
            if launch.on_device.is_none() {
                launch.on_device = Some(queue.upload_new(Row::bytes(&launch.strips))?);
            }
            let Some(strips) = &launch.on_device else { continue };
            let kernel = launch.variant.kernel(launch.float);
            let mut args = vec![Arg::from(targets), Arg::from(terms), Arg::from(strips)];
            let mut shared = 0;
            if launch.variant != Variant::Any {
                let stages = STAGES
                    * (4 * launch.variant.blocks(launch.float) * 128 * 8 * launch.float.size()
                        + 3 * 128 * 16);
                let room = launch.room.min(most(queue.gpu()).saturating_sub(stages) / FRAGMENT);
                shared = stages + room * FRAGMENT;
                args.push(Arg::from(room as u32));
            }
            let grid = [launch.strips.len() as u32, 1, 1];
            // SAFETY: the kernel's parameters in its order; the caller's promise for what the tables describe.
            unsafe { queue.launch("merge", &kernel, grid, THREADS, shared, &args)? };
        }
        Ok(())
    }
}

/// A weight in strips of tiles of so many rows and 64 columns.
pub(super) fn strips(index: usize, target: &Target, rows_per_tile: usize) -> impl Iterator<Item = Strip> {
    let tiles = (target.columns as usize).div_ceil(COLUMNS);
    let rows = (target.rows as usize).div_ceil(rows_per_tile);
    (0..rows).flat_map(move |row_tile| {
        (0..tiles).step_by(STRIP).map(move |first| Strip {
            target: index as u32,
            row_tile: row_tile as u32,
            column_tile: first as u32,
            count: STRIP.min(tiles - first) as u32,
        })
    })
}

/// Bytes of shared memory that a fragment of an up factor takes, for the four warps of a block.
const FRAGMENT: usize = 4 * 512;

/// Shared memory of a block at most: two of them shall fit on a multiprocessor where its memory allows.
fn most(gpu: &Gpu) -> usize {
    gpu.shared_memory().min(112 * 1024)
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
