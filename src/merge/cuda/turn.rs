//! Rotations: which kernel of `kernels/rotate.cu` and `kernels/rotate_large.cu` turns which weight, in which tiles.

use super::factors::{Factors, Wanted};
use super::tables::{Part, Rotation, RotationTile, Row, Target};
use crate::cuda::{Arg, Buffer, Gpu, Queue};
use crate::dtype::{Dtype, Float};
use crate::error::{Error, Result};
use crate::merge::ops::Rotate;
use std::collections::{BTreeMap, HashMap};

/// The largest block that is turned in registers, and the most groups of blocks that such a kernel takes.
const SMALL: usize = 16;
const MOST_PARTS: usize = 16;
/// Words of shared memory for what waits between stages, and for the matrices that stay for all of a tile.
const WORDS: usize = 8192;
/// How long a tile is across the rotation, at most.
const WIDTH: usize = 2048;
/// Positions of a tile of the large kernel: enough work for its warps.
const LARGE: usize = 256;
/// Scratch memory of rotations in several large stages: one batch after the other shares it.
const BATCH: u64 = 1 << 30;
/// Blocks of a launch ask for as much shared memory as the one that needs most: one launch for each number of them that a multiprocessor holds.
const CLASSES: [usize; 5] = [38_000, 56_000, 75_000, 112_000, usize::MAX];

/// What a rotation needs on the device: its blocks, group by group, then the rescaling.
pub(super) fn wanted(op: &Rotate) -> Vec<Wanted> {
    let blocks = op.stages.iter().flat_map(|stage| &stage.blocks).map(Wanted::plain);
    blocks.chain(op.rescale.iter().map(|rescale| Wanted::repeated(rescale, 1))).collect()
}

/// Whether the kernels can do it; the largest blocks are too much for the shared memory of a multiprocessor.
pub(super) fn fits(gpu: &Gpu, float: Float, op: &Rotate) -> bool {
    groups(op).iter().all(|&Group { stage, size, .. }| {
        let positions = size.next_multiple_of(16).max(LARGE);
        large_step(limit(gpu), planes(float, stage), op.axis, positions).is_some()
    })
}

/// Blocks of one size at consecutive positions of a stage, from the first of these on.
struct Group {
    stage: usize,
    first: usize,
    size: usize,
    count: usize,
}

/// In the order of stages and positions.
fn groups(op: &Rotate) -> Vec<Group> {
    let mut groups = Vec::new();
    for (i, stage) in op.stages.iter().enumerate() {
        let mut first = 0;
        for blocks in &stage.blocks {
            let (count, size) = (blocks.shape()[0], blocks.shape()[1]);
            groups.push(Group { stage: i, first, size, count });
            first += count * size;
        }
    }
    groups
}

/// Which of [`CLASSES`] so many bytes of shared memory are.
fn class(shared: usize) -> usize {
    CLASSES.iter().position(|&most| shared <= most).unwrap_or(0)
}

/// Bytes of dynamic shared memory of a block of threads at most; its own variables take less than the rest.
fn limit(gpu: &Gpu) -> usize {
    gpu.shared_memory().saturating_sub(1024)
}

/// A kernel: rotations are launched in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Order {
    batch: u64,
    stage: usize,
    kernel: Kernel,
    class: usize,
    threads: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kernel {
    Rows(u32),
    Columns,
    Any,
    Large(u32),
    Scratch,
}

impl Kernel {
    /// The file and the function.
    fn name(self) -> (&'static str, &'static str) {
        match self {
            Kernel::Rows(0) => ("rotate", "rotate_rows_f32"),
            Kernel::Rows(1) => ("rotate", "rotate_rows_f16"),
            Kernel::Rows(2) => ("rotate", "rotate_rows_bf16"),
            Kernel::Rows(3) => ("rotate", "rotate_rows_e4m3"),
            Kernel::Rows(_) => ("rotate", "rotate_rows_e5m2"),
            Kernel::Columns => ("rotate", "rotate_columns"),
            Kernel::Any => ("rotate", "rotate_any"),
            Kernel::Large(0) => ("rotate_large", "rotate_large_f32"),
            Kernel::Large(1) => ("rotate_large", "rotate_large_f16"),
            Kernel::Large(2) => ("rotate_large", "rotate_large_bf16"),
            Kernel::Large(3) => ("rotate_large", "rotate_large_e4m3"),
            Kernel::Large(_) => ("rotate_large", "rotate_large_e5m2"),
            Kernel::Scratch => ("rotate_large", "rotate_scratch"),
        }
    }
}

#[derive(Default)]
struct Launch {
    tiles: Vec<RotationTile>,
    shared: usize,
    on_device: Option<Buffer>,
}

/// Rotations to do, planned once for any strengths.
#[derive(Default)]
pub(super) struct Turns {
    /// Until the tables are on the device `parts` is the first one's index, and a part's `order` the place in `orders` plus one.
    rows: Vec<Rotation>,
    parts: Vec<Part>,
    orders: Vec<u32>,
    known: HashMap<Vec<u32>, u64>,
    launches: BTreeMap<Order, Launch>,
    /// Bytes in all batches so far, in the last one, and in the largest.
    batch: u64,
    used: u64,
    scratch: u64,
    tables: Option<[Buffer; 2]>,
}

/// What is turned.
pub(super) struct Turn<'a> {
    /// For errors.
    pub name: &'a str,
    /// The region as a weight of its own.
    pub part: Target,
    pub float: Float,
    pub op: &'a Rotate,
    /// The region's first element in its weight, and the weight's columns.
    pub element: u64,
    pub pitch: usize,
    /// Write what would be added, in fp32 [rows, columns], to here.
    pub delta: Option<u64>,
}

impl Turns {
    /// Adds one whose factors are loaded.
    pub fn add(&mut self, gpu: &Gpu, turn: &Turn<'_>, factors: &Factors) -> Result<()> {
        let Turn { name, part, op, .. } = turn;
        let along = if op.axis == 0 { part.rows } else { part.columns } as usize;
        let misfit = |what: &str, expected: usize, got: usize| Error::Shape {
            tensor: (*name).to_owned(),
            what: what.into(),
            expected: vec![expected],
            got: vec![got],
        };
        for stage in &op.stages {
            let orders = stage.order.as_ref();
            if stage.size() != along
                || orders.is_some_and(|o| o.len() != along || o.iter().any(|&p| p >= along))
            {
                return Err(misfit("a rotation does not fit", along, stage.size()));
            }
            if stage.blocks.iter().any(|b| b.dtype() != Dtype::F32) {
                return Err(Error::Backend(format!("`{name}`: a rotation's blocks are not fp32")));
            }
        }
        if let Some(rescale) = op.rescale.as_ref().filter(|r| r.count() != part.rows as usize) {
            return Err(misfit("a rescaling does not fit", part.rows as usize, rescale.count()));
        }
        // The kernels reckon with rows of less than 4 GiB.
        let row = part.base_row.max(part.out_row).max(u64::from(part.columns)).saturating_mul(4);
        if row > u64::from(u32::MAX) {
            let what =
                format!("`{name}`: rows of a weight lie {} elements apart", part.base_row.max(part.out_row));
            return Err(Error::argument(what, "call .contiguous() on it"));
        }
        let first = self.parts.len();
        let orders: Vec<u64> =
            op.stages.iter().map(|stage| stage.order.as_ref().map_or(0, |order| self.order(order))).collect();
        let all = op.stages.iter().flat_map(|stage| &stage.blocks);
        for (group, blocks) in groups(op).iter().zip(all) {
            self.parts.push(Part {
                blocks: factors.address(&Wanted::plain(blocks).key)?,
                order: orders[group.stage],
                first: group.first as u32,
                count: group.count as u32,
                size: group.size as u32,
                stage: group.stage as u32,
            });
        }
        let rescale = match &op.rescale {
            Some(rescale) => factors.address(&Wanted::repeated(rescale, 1).key)?,
            None => 0,
        };
        let mut rotation = Rotation {
            base: part.base,
            out: turn.delta.unwrap_or(part.out),
            base_columns: part.base_columns,
            out_columns: if turn.delta.is_some() { 0 } else { part.out_columns },
            base_row: part.base_row,
            out_row: part.out_row,
            parts: first as u64,
            rescale,
            scratch: 0,
            element: turn.element,
            pitch: turn.pitch as u32,
            rows: part.rows,
            columns: part.columns,
            count: (self.parts.len() - first) as u32,
            stages: op.stages.len() as u32,
            scale: part.scale,
            seed: part.seed,
            stochastic: part.stochastic,
            dtype: part.dtype,
            strength: 0.0,
            interpolate: u32::from(op.interpolate),
            axis: op.axis as u32,
            delta: u32::from(turn.delta.is_some()),
            vectors: u32::from(lie_together(turn, 8)),
        };
        if !self.small(gpu, turn) {
            self.large(gpu, turn, &mut rotation)?;
        }
        self.rows.push(rotation);
        Ok(())
    }

    /// Where an order of positions is among all of them, plus one.
    fn order(&mut self, order: &[usize]) -> u64 {
        let order: Vec<u32> = order.iter().map(|&p| p as u32).collect();
        if let Some(&place) = self.known.get(&order) {
            return place;
        }
        let place = self.orders.len() as u64 + 1;
        self.orders.extend_from_slice(&order);
        self.known.insert(order, place);
        place
    }

    fn push(&mut self, order: Order, shared: usize, tiles: impl IntoIterator<Item = RotationTile>) {
        let launch = self.launches.entry(order).or_default();
        launch.shared = launch.shared.max(shared);
        launch.tiles.extend(tiles);
    }

    /// With blocks of at most 16; whether that is possible.
    fn small(&mut self, gpu: &Gpu, turn: &Turn<'_>) -> bool {
        let Turn { part, op, .. } = turn;
        let groups = groups(op);
        if groups.len() > MOST_PARTS || groups.iter().any(|group| group.size > SMALL) {
            return false;
        }
        let (along, across) = match op.axis {
            0 => (part.rows as usize, part.columns as usize),
            _ => (part.columns as usize, part.rows as usize),
        };
        let mut cuts = cuts(op, &groups, along);
        let kernel = if op.axis == 0 && lie_together(turn, 4) {
            Kernel::Rows(part.dtype)
        } else if op.axis == 1 && lie_together(turn, 8) {
            cuts.retain(|cut| cut % 8 == 0);
            Kernel::Columns
        } else {
            Kernel::Any
        };
        let (goal, most) = if kernel == Kernel::Columns { (128, 64) } else { (64, 128) };
        let direct = matches!(kernel, Kernel::Rows(_)) && op.stages.len() == 1;
        let (mut tiles, mut shared, mut at) = (Vec::new(), 0, 0);
        while at + 1 < cuts.len() {
            let first = cuts[at];
            at += 1;
            while at + 1 < cuts.len() && cuts[at + 1] - first <= goal {
                at += 1;
            }
            let count = cuts[at] - first;
            let records = records(&groups, first, count);
            let (total, one) = (records.iter().sum::<usize>(), records.into_iter().max().unwrap_or(0));
            let width = across.div_ceil(across.div_ceil(WIDTH).max(1)).next_multiple_of(32);
            let fits = |words: usize| 4 * words <= limit(gpu);
            let (step, data) = if direct {
                (width, 0)
            } else {
                let mut step = 1;
                while step * 2 * count <= WORDS && step < most {
                    step *= 2;
                }
                while step < 32 && fits(step * 2 * count + one) {
                    step *= 2;
                }
                (step, step * count)
            };
            let resident = total <= WORDS && fits(data + total);
            let words = data + if resident { total } else { one };
            if step < 4 || !fits(words) {
                return false;
            }
            shared = shared.max(4 * words);
            tiles.extend((0..across).step_by(width.max(1)).map(|from| RotationTile {
                rotation: self.rows.len() as u32,
                first: first as u32,
                count: count as u32,
                from: from as u32,
                width: width.min(across - from) as u32,
                step: step as u32,
                resident: u32::from(resident),
                part: 0,
            }));
        }
        let order = Order { batch: 0, stage: 0, kernel, class: class(shared), threads: 128 };
        self.push(order, shared, tiles);
        true
    }

    /// On tensor cores, stage by stage.
    fn large(&mut self, gpu: &Gpu, turn: &Turn<'_>, rotation: &mut Rotation) -> Result<()> {
        let Turn { name, part, float, op, .. } = turn;
        let across = if op.axis == 0 { part.columns } else { part.rows } as usize;
        if op.stages.len() > 1 {
            let bytes = (4 * u64::from(part.rows) * u64::from(part.columns)).next_multiple_of(256);
            if self.used > 0 && self.used + bytes > BATCH {
                (self.batch, self.used) = (self.batch + 1, 0);
            }
            rotation.scratch = self.used;
            self.used += bytes;
            self.scratch = self.scratch.max(self.used);
        }
        for (index, group) in groups(op).into_iter().enumerate() {
            let Group { stage, size, .. } = group;
            let (padded, planes) = (size.next_multiple_of(16), planes(*float, stage));
            let per_tile = (LARGE / padded).max(1);
            let kernel = if stage == 0 { Kernel::Large(part.dtype) } else { Kernel::Scratch };
            let threads = if size <= 64 { 128 } else { 256 };
            for first in (0..group.count).step_by(per_tile) {
                let count = per_tile.min(group.count - first);
                let found = large_step(limit(gpu), planes, op.axis, count * padded);
                let (step, shared) = found.ok_or_else(|| {
                    Error::Backend(format!("`{name}`: blocks of {size} are too large for the kernels"))
                })?;
                let order = Order { batch: self.batch, stage, kernel, class: class(shared), threads };
                let tile = RotationTile {
                    rotation: self.rows.len() as u32,
                    first: (group.first + first * size) as u32,
                    count: (count * size) as u32,
                    from: 0,
                    width: 0,
                    step: step as u32,
                    resident: 0,
                    part: index as u32,
                };
                let tiles = (0..across).step_by(step).map(|from| RotationTile {
                    from: from as u32,
                    width: step.min(across - from) as u32,
                    ..tile
                });
                self.push(order, shared, tiles);
            }
        }
        Ok(())
    }

    /// Enqueues everything, at these strengths.
    ///
    /// # Safety
    /// The regions and factors live until the stream has passed here.
    pub unsafe fn run(&mut self, queue: &Queue, strengths: &[f32]) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        if self.tables.is_none() {
            self.tables = Some(self.upload(queue)?);
        }
        let scratch = queue.alloc(self.scratch as usize)?;
        let mut rows = self.rows.clone();
        for (row, &strength) in rows.iter_mut().zip(strengths) {
            row.strength = strength;
            row.scratch += scratch.ptr();
        }
        let rows = queue.upload_new(Row::bytes(&rows))?;
        for (order, launch) in &mut self.launches {
            let tiles = match &launch.on_device {
                Some(tiles) => tiles,
                None => launch.on_device.insert(queue.upload_new(Row::bytes(&launch.tiles))?),
            };
            let (file, kernel) = order.kernel.name();
            let (grid, args) = ([launch.tiles.len() as u32, 1, 1], [Arg::from(&rows), Arg::from(tiles)]);
            // SAFETY: the kernel's parameters in its order; the caller's promise for what the tables describe.
            unsafe { queue.launch(file, kernel, grid, order.threads, launch.shared, &args)? };
        }
        Ok(())
    }

    /// Parts and orders; from now on rows and parts hold addresses.
    fn upload(&mut self, queue: &Queue) -> Result<[Buffer; 2]> {
        let bytes: Vec<u8> = self.orders.iter().flat_map(|order| order.to_le_bytes()).collect();
        let orders = queue.upload_new(&bytes)?;
        for part in self.parts.iter_mut().filter(|part| part.order > 0) {
            part.order = orders.ptr() + 4 * (part.order - 1);
        }
        let parts = queue.upload_new(Row::bytes(&self.parts))?;
        self.rows.iter_mut().for_each(|row| row.parts = parts.ptr() + 32 * row.parts);
        (self.orders, self.known, self.parts) = Default::default();
        Ok([orders, parts])
    }
}

/// Whether so many neighbours of a row always lie together, at a multiple of their bytes or of 16.
fn lie_together(turn: &Turn<'_>, count: u64) -> bool {
    let (part, size) = (&turn.part, turn.float.size() as u64);
    let step = (count * size).min(16);
    let side = |address: u64, row: u64| address % step == 0 && row * size % step == 0;
    let out = turn.delta.is_some() || (part.out_columns == 0 && side(part.out, part.out_row));
    u64::from(part.columns) % count == 0 && part.base_columns == 0 && side(part.base, part.base_row) && out
}

/// The positions that no block of any stage reaches over, from 0 to the end.
fn cuts(op: &Rotate, groups: &[Group], along: usize) -> Vec<usize> {
    let mut free = vec![true; along + 1];
    for (i, stage) in op.stages.iter().enumerate() {
        let mut ends = vec![false; along + 1];
        ends[0] = true;
        for Group { first, size, count, .. } in groups.iter().filter(|group| group.stage == i) {
            (1..=*count).for_each(|n| ends[first + n * size] = true);
        }
        free.iter_mut().zip(&ends).for_each(|(free, end)| *free &= end);
        if let Some(order) = &stage.order {
            let mut furthest = 0;
            for (i, &place) in order.iter().enumerate() {
                furthest = furthest.max(place);
                free[i + 1] &= furthest == i;
            }
        }
    }
    (0..=along).filter(|&i| free[i]).collect()
}

/// Words of shared memory that the matrices of each stage take in a tile: `record_words` of `kernels/rotate.cuh`.
fn records(groups: &[Group], first: usize, count: usize) -> Vec<usize> {
    let mut words = vec![0; groups.last().map_or(0, |group| group.stage + 1)];
    for group in groups {
        let end = group.first + group.count * group.size;
        let (low, high) = (first.max(group.first), (first + count).min(end));
        let padded = [4, 8, 16].into_iter().find(|&p| group.size <= p).unwrap_or(group.size);
        words[group.stage] += high.saturating_sub(low) / group.size.max(1) * (padded * (padded + 1) + 4);
    }
    words
}

/// In how many bf16 numbers the large kernel keeps one of the weight, or of what a stage has left.
fn planes(float: Float, stage: usize) -> usize {
    match float {
        _ if stage > 0 => 3,
        Float::F32 => 3,
        Float::F16 => 2,
        _ => 1,
    }
}

/// How many across a tile of so many positions, padded ones included, the large kernel takes at once, and the bytes of shared memory for them.
fn large_step(limit: usize, planes: usize, axis: usize, positions: usize) -> Option<(usize, usize)> {
    let bytes = |step: usize| {
        let elements = if axis == 0 { positions * (step + 8) } else { step * (positions + 8) };
        2 * planes * elements
    };
    [64, 32, 16].map(|step| (step, bytes(step))).into_iter().find(|&(_, bytes)| bytes <= limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::ops::Stage;
    use crate::view::Tensor;

    fn blocks(count: usize, size: usize) -> Tensor {
        Tensor::of_vec(vec![0u8; 4 * count * size * size], Dtype::F32, &[count, size, size]).unwrap()
    }

    fn rotate(stages: Vec<Stage>) -> Rotate {
        Rotate { stages, rescale: None, axis: 0, interpolate: false }
    }

    #[test]
    fn a_tile_ends_where_every_stage_does() {
        let op = rotate(vec![
            Stage { blocks: vec![blocks(4, 2), blocks(1, 4)], order: None },
            Stage { blocks: vec![blocks(6, 2)], order: Some(vec![0, 2, 1, 3, 4, 6, 5, 7, 8, 9, 11, 10]) },
        ]);
        assert_eq!(cuts(&op, &groups(&op), 12), [0, 4, 8, 12]);
        // A matrix of 4 by 4, its places, and four words to spread the banks.
        assert_eq!(records(&groups(&op), 4, 8), [3 * 24, 4 * 24]);
    }

    #[test]
    fn the_large_kernel_takes_as_many_across_as_fit() {
        assert_eq!(large_step(100_000, 1, 0, 256), Some((64, 2 * 256 * 72)));
        assert_eq!(large_step(30_000, 1, 0, 256), Some((32, 2 * 256 * 40)));
        assert_eq!(large_step(30_000, 3, 1, 256), Some((16, 2 * 3 * 16 * 264)));
        assert_eq!(large_step(30_000, 3, 0, 4096), None);
    }
}
