//! The executor for host memory: one pass over each weight, accumulation in f32 over all terms, one rounding.

use super::gemm::{add_product, on_pool, threads, Mat};
use super::kernel::{Kernel, Tile};
use super::ops::{LowRank, Op, Region, Storage, Term};
use super::{whole, Work};
use crate::error::{Error, Result};
use crate::view::{Device, Rows, Tensor, View};
use rayon::prelude::*;
use std::ops::Range;

/// About as many f32 as fit beside their factors in a core's cache.
const TILE: usize = 64 * 1024;

/// Elements of a task: so many that packing its factors does not count.
const TASK: usize = 2 << 20;

/// Elements per thread that are planned together; at the end of such a group threads may wait for the last task.
const GROUP: usize = 16 << 20;

/// About as many elements may have their whole delta in memory.
const WHOLE: usize = 32 << 20;

/// Tasks are multiples of so many rows: of every kernel's height, so that only the end of a weight is a part of a tile.
const PANEL: usize = 12;

/// Values of packed right factors that fit in a core's second cache with room for the weight.
const PANELS: usize = 96 * 1024;

/// f32 in a cache line.
const LINE: usize = 16;

/// How many tiles ahead the weight is fetched: a tile takes about as long as memory does.
const AHEAD: usize = 2;

/// A term with its factors in f32 and its place in the weight's matrix.
pub(super) struct Ready {
    parts: Parts,
    scale: f32,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
}

/// The factors of an op, row-major.
enum Parts {
    LowRank(Pair),
    Hadamard([Pair; 2]),
    Kron {
        w1: Vec<f32>,
        w2: Vec<f32>,
        w2_rows: usize,
        w1_cols: usize,
    },
    Dense(Vec<f32>),
    /// One value per row of the region.
    Rows(Vec<f32>),
    /// One value per column of the region.
    Cols(Vec<f32>),
    /// W @ a1 @ a2 over the input channels, each tap of the kernel alike.
    Right {
        a1: Vec<f32>,
        a2: Vec<f32>,
        rank: usize,
        taps: usize,
    },
    /// What W becomes.
    Towards(Vec<f32>),
}

struct Pair {
    up: Vec<f32>,
    down: Vec<f32>,
    rank: usize,
}

/// Merges one weight; see [`Work`].
pub fn merge(name: &str, base: &View, out: &View, storage: &Storage, terms: &[Term<'_>]) -> Result<()> {
    let work = Work { name, base, out, storage: *storage, terms, pristine: None };
    merge_all(&[work], &mut |_| Ok(()))
}

/// Merges many weights, faster than one after the other: the threads share the work of several. `between` hears each number of weights that are
/// done, from 0 up to the last but one; several at once where they were done together. Its error stops the work. After any error each weight is
/// merged, untouched or, if it was being written, neither.
pub fn merge_all(jobs: &[Work<'_>], between: &mut dyn FnMut(usize) -> Result<()>) -> Result<()> {
    let threads = threads();
    let mut at = 0;
    while at < jobs.len() {
        between(at)?;
        let first = at;
        let mut plans = Vec::new();
        let (mut elements, mut whole) = (0, 0);
        while at < jobs.len() && elements < GROUP * threads && whole < WHOLE {
            let (plan, count) = (Plan::of(&jobs[at])?, jobs[at].base.count());
            elements += count;
            whole += if plan.others.is_empty() && plan.towards.is_empty() { 0 } else { count };
            plans.push(plan);
            at += 1;
        }
        let size = (elements / (threads * 8)).clamp(TASK / 16, TASK);
        let tasks: Vec<(&Plan, Range<usize>)> = plans.iter().flat_map(|plan| plan.tasks(size)).collect();
        on_pool(|| {
            let tasks = tasks.into_par_iter().with_max_len(1);
            tasks.for_each_init(Scratch::default, |scratch, (plan, rows)| plan.run(rows, scratch));
        });
        (first + 1..at).try_for_each(&mut *between)?;
    }
    Ok(())
}

/// A checked job, ready to run.
struct Plan {
    from: Rows,
    to: Rows,
    storage: Storage,
    /// Whether what no term touches is in place already.
    idle: bool,
    products: Vec<Product>,
    others: Vec<Ready>,
    towards: Vec<Ready>,
}

/// A thin product, its factors as they lie in the file.
struct Product {
    up: Rows,
    down: Rows,
    scale: f32,
    rows: Range<usize>,
    cols: Range<usize>,
    _keep: [Tensor; 2],
}

/// What a thread keeps from task to task.
#[derive(Default)]
struct Scratch {
    /// The left factors of all products of a cell, scaled, in panels of the kernel's height.
    a: Aligned,
    /// The right ones, for a block of columns, in panels of the kernel's width.
    b: Aligned,
    /// A panel's product, where it cannot go straight into the weight.
    panel: Aligned,
    row: Vec<f32>,
    sum: Vec<f32>,
}

/// Zeros and factors that begin at a cache line.
#[derive(Default)]
struct Aligned(Vec<f32>);

impl Aligned {
    fn take(&mut self, len: usize) -> &mut [f32] {
        if self.0.len() < len + 16 {
            self.0.resize(len + 16, 0.0);
        }
        let at = self.0.as_ptr().align_offset(64).min(16);
        &mut self.0[at..at + len]
    }
}

/// Where a product goes.
enum Sink<'a> {
    /// From f32 to f32, by address and distance of rows, both at the cell's first element.
    Direct { base: (*const f32, usize), out: (*mut f32, usize), stream: bool },
    /// Into the weight through its dtype.
    Weight(&'a Plan),
}

impl Plan {
    fn of(job: &Work<'_>) -> Result<Self> {
        let Work { name, base, out, storage, terms, .. } = *job;
        if base.shape() != out.shape() {
            return Err(Error::Shape {
                tensor: name.to_owned(),
                what: "base and result differ".into(),
                expected: base.shape().to_vec(),
                got: out.shape().to_vec(),
            });
        }
        let (from, to) = (Rows::of(base, name)?.scaled(storage.scale), Rows::of(out, name)?);
        let idle = base.data() == out.data() && from.float() == to.float();
        let mut plan =
            Plan { from, to, storage, idle, products: Vec::new(), others: Vec::new(), towards: Vec::new() };
        for term in terms.iter().filter(|term| term.strength != 0.0) {
            let region = Region::of(name, base.shape(), term.slice)?;
            if let Op::LowRank(op) = term.op {
                let product = Product::of(name, op, term.coefficient(name)?, &region)?;
                if product.down.rows > 0 {
                    plan.products.push(product);
                }
                continue;
            }
            let ready = prepare_in(name, &plan.from, &region, term)?;
            match ready.parts {
                Parts::Towards(_) => plan.towards.push(ready),
                _ => plan.others.push(ready),
            }
        }
        Ok(plan)
    }

    /// Ranges of rows of about `size` elements.
    fn tasks(&self, size: usize) -> impl Iterator<Item = (&Plan, Range<usize>)> {
        let (rows, cols) = (self.from.rows, self.from.cols);
        let nothing = self.products.is_empty() && self.others.is_empty() && self.towards.is_empty();
        let end = if cols == 0 || (nothing && self.idle) { 0 } else { rows };
        let height = (size / cols.max(1)).max(1).next_multiple_of(PANEL);
        (0..end).step_by(height).map(move |start| (self, start..end.min(start + height)))
    }

    fn run(&self, rows: Range<usize>, scratch: &mut Scratch) {
        if self.others.is_empty() && self.towards.is_empty() {
            for (rows, cols, products) in self.cells(rows) {
                match products.is_empty() {
                    true => self.pass(rows, cols, scratch),
                    false => multiply(&products, &rows, &cols, self.sink(&rows, &cols), scratch),
                }
            }
            return;
        }
        let tile = (TILE / self.from.cols).clamp(8, 256);
        let (start, end) = (rows.start, rows.end);
        for first in (start..end).step_by(tile) {
            self.general(first..end.min(first + tile), scratch);
        }
    }

    /// The parts of these rows on which the same products act.
    fn cells(&self, rows: Range<usize>) -> Vec<(Range<usize>, Range<usize>, Vec<&Product>)> {
        let cut = |whole: &Range<usize>, parts: &mut dyn Iterator<Item = Range<usize>>| {
            let mut at: Vec<usize> = parts.flat_map(|p| [p.start, p.end]).collect();
            at.extend([whole.start, whole.end]);
            at.retain(|p| (whole.start..=whole.end).contains(p));
            at.sort_unstable();
            at.dedup();
            at
        };
        let mut cells = Vec::new();
        for r in cut(&rows, &mut self.products.iter().map(|p| p.rows.clone())).windows(2) {
            let here = || self.products.iter().filter(|p| p.rows.contains(&r[0]));
            for c in cut(&(0..self.from.cols), &mut here().map(|p| p.cols.clone())).windows(2) {
                let products = here().filter(|p| p.cols.contains(&c[0])).collect();
                cells.push((r[0]..r[1], c[0]..c[1], products));
            }
        }
        cells
    }

    fn sink(&self, rows: &Range<usize>, cols: &Range<usize>) -> Sink<'_> {
        let at = |all: &Rows| {
            let (data, stride) = all.as_f32()?;
            Some((data.wrapping_add(rows.start * stride + cols.start), stride))
        };
        match (self.storage.scale == 1.0, at(&self.from), at(&self.to)) {
            (true, Some((base, base_stride)), Some(out)) => {
                let line = |n: usize| n % 64 == 0;
                let stream = line(out.0 as usize) && line(out.1 * 4);
                Sink::Direct { base: (base.cast_const(), base_stride), out, stream }
            }
            _ => Sink::Weight(self),
        }
    }

    /// What no term touches, from base to result.
    fn pass(&self, rows: Range<usize>, cols: Range<usize>, scratch: &mut Scratch) {
        if self.idle {
            return;
        }
        for r in rows {
            if self.from.float() == self.to.float() {
                // SAFETY: tasks are disjoint ranges of rows, and each is one thread's.
                unsafe { self.to.copy_part(&self.from, r, cols.clone()) };
            } else {
                scratch.row.resize(cols.len(), 0.0);
                self.from.read_stored(r, cols.start, &mut scratch.row);
                // SAFETY: as above.
                unsafe { self.to.write_part(r, cols.start, &scratch.row, self.storage.rounding) };
            }
        }
    }

    /// Rows on which not only thin products act.
    fn general(&self, rows: Range<usize>, scratch: &mut Scratch) {
        let cols = self.from.cols;
        let mut sum = std::mem::take(&mut scratch.sum);
        sum.clear();
        sum.resize(rows.len() * cols, 0.0);
        for t in &self.others {
            let common = rows.start.max(t.rows.start)..rows.end.min(t.rows.end);
            if !common.is_empty() {
                t.add(&mut sum[(common.start - rows.start) * cols..], cols, t.cols.start, common, &self.from);
            }
        }
        for (part, columns, products) in self.cells(rows.clone()) {
            if !products.is_empty() {
                let out = sum[(part.start - rows.start) * cols + columns.start..].as_mut_ptr();
                let sink = Sink::Direct { base: (out.cast_const(), cols), out: (out, cols), stream: false };
                multiply(&products, &part, &columns, sink, scratch);
            }
        }
        let (mut stored, mut row, mut pristine) = (vec![0f32; cols], vec![0f32; cols], vec![0f32; cols]);
        let scale = self.storage.scale;
        for (r, sum) in rows.zip(sum.chunks_exact(cols)) {
            let covers = |region: &Range<usize>| region.contains(&r);
            let touched = self.others.iter().chain(&self.towards).any(|t| covers(&t.rows))
                || self.products.iter().any(|p| covers(&p.rows));
            if !touched {
                self.pass(r..r + 1, 0..cols, scratch);
                continue;
            }
            self.from.read_stored(r, 0, &mut stored);
            pristine
                .iter_mut()
                .zip(&stored)
                .for_each(|(w, v)| *w = if scale == 1.0 { *v } else { scale * v });
            row.copy_from_slice(&pristine);
            self.towards.iter().for_each(|t| t.replace(r, &mut row, &pristine));
            for (((v, w), old), s) in stored.iter_mut().zip(&row).zip(&pristine).zip(sum) {
                if *s != 0.0 || w.to_bits() != old.to_bits() {
                    // Where nothing is added, -0 stays -0.
                    let w = if *s == 0.0 { *w } else { w + s };
                    *v = if scale == 1.0 { w } else { w / scale };
                }
            }
            // SAFETY: tasks are disjoint ranges of rows, and each is one thread's.
            unsafe { self.to.write_part(r, 0, &stored, self.storage.rounding) };
        }
        scratch.sum = sum;
    }
}

impl Product {
    fn of(name: &str, op: &LowRank, scale: f32, region: &Region) -> Result<Self> {
        let here = |factor: &Tensor| match factor.device() {
            Device::Cpu => Ok(factor.clone()),
            Device::Cuda(_) => factor.to_f32(name).map(|values| Tensor::of_f32(values, factor.shape())),
        };
        let keep = [here(&op.up)?, here(&op.down)?];
        let (up, down) = (Rows::of(&keep[0], name)?, Rows::of(&keep[1], name)?);
        fits(name, region, [up.rows, down.cols])?;
        let (rows, cols) = (region.rows.clone(), region.cols.clone());
        Ok(Product { up, down, scale, rows, cols, _keep: keep })
    }
}

/// The sum of the products on a cell, into the sink. The ranks stand side by side, so that a tile is one product.
fn multiply(
    products: &[&Product],
    rows: &Range<usize>,
    cols: &Range<usize>,
    sink: Sink<'_>,
    scratch: &mut Scratch,
) {
    let kernel = Kernel::get();
    let (height, width) = (kernel.rows, kernel.cols);
    let depth: usize = products.iter().map(|p| p.down.rows).sum();
    let panels = rows.len().div_ceil(height);
    // The panels of b should stay in the second cache beside what streams through it.
    let most = (PANELS / depth).max(width);
    let block = cols.len().div_ceil(cols.len().div_ceil(most)).next_multiple_of(width);
    let Scratch { a, b, panel, row, .. } = scratch;
    let a = a.take(panels * depth * height);
    pack_left(products, rows, depth, height, a, row);
    // Without the odd line every panel would begin in the same set of the first cache.
    let step = depth * width + LINE;
    let b = b.take(block / width * step);
    let panel = panel.take(height * block + width);
    // A row of zeros to add to.
    let (zeros, panel) = panel.split_at_mut(width);
    zeros.fill(0.0);
    for start in cols.clone().step_by(block) {
        let here = start..cols.end.min(start + block);
        pack_right(products, &here, step, width, b, row);
        for (i, a) in a.chunks_exact(depth * height).enumerate() {
            let count = height.min(rows.len() - i * height);
            for (j, b) in b.chunks_exact(step).take(here.len().div_ceil(width)).enumerate() {
                let mut tile = Tile {
                    depth,
                    a: a.as_ptr(),
                    b: b.as_ptr(),
                    base: zeros.as_ptr(),
                    base_stride: 0,
                    out: panel[j * width..].as_mut_ptr(),
                    out_stride: block,
                    rows: count,
                    stream: false,
                    ahead: zeros.as_ptr(),
                };
                let place = |stride, i, j| i * height * stride + start - cols.start + j * width;
                let wanted = width.min(here.len() - j * width);
                if let Sink::Direct { base, out, stream } = &sink {
                    let full = here.len() / width;
                    let ahead = match j + AHEAD < full {
                        true => place(base.1, i, j + AHEAD),
                        false => place(base.1, i + 1, (j + AHEAD).saturating_sub(full)),
                    };
                    if wanted == width {
                        tile.base = base.0.wrapping_add(place(base.1, i, j));
                        tile.base_stride = base.1;
                        tile.ahead = base.0.wrapping_add(ahead);
                        tile.out = out.0.wrapping_add(place(out.1, i, j));
                        tile.out_stride = out.1;
                        tile.stream = *stream;
                    }
                }
                // SAFETY: the packed factors have this size; the sink's addresses hold the cell, whose rows are this thread's.
                unsafe { kernel.run(&tile) };
                if let (Sink::Direct { base, out, .. }, true) = (&sink, wanted < width) {
                    for r in 0..count {
                        for (c, &s) in panel[r * block + j * width..][..wanted].iter().enumerate() {
                            // SAFETY: as above.
                            unsafe {
                                let w = base.0.add(place(base.1, i, j) + r * base.1 + c).read_unaligned();
                                let out = out.0.add(place(out.1, i, j) + r * out.1 + c);
                                out.write_unaligned(if s == 0.0 { w } else { w + s });
                            }
                        }
                    }
                }
            }
            if let Sink::Weight(plan) = &sink {
                row.resize(here.len(), 0.0);
                let scale = plan.storage.scale;
                for r in 0..count {
                    let at = rows.start + i * height + r;
                    plan.from.read_stored(at, start, row);
                    let sums = &panel[r * block..][..here.len()];
                    match scale == 1.0 {
                        true => row
                            .iter_mut()
                            .zip(sums)
                            .for_each(|(v, &s)| *v = if s == 0.0 { *v } else { *v + s }),
                        false => row.iter_mut().zip(sums).for_each(|(v, &s)| {
                            *v = if s == 0.0 { *v } else { (scale * *v + s) / scale };
                        }),
                    }
                    // SAFETY: tasks are disjoint ranges of rows, and each is one thread's.
                    unsafe { plan.to.write_part(at, start, row, plan.storage.rounding) };
                }
            }
        }
    }
    kernel.finish();
}

/// The scaled left factors side by side, [rows, depth], as panels of [depth, height]; the last one filled up with zeros.
fn pack_left(
    products: &[&Product],
    rows: &Range<usize>,
    depth: usize,
    height: usize,
    out: &mut [f32],
    row: &mut Vec<f32>,
) {
    for (i, panel) in out.chunks_exact_mut(depth * height).enumerate() {
        for r in 0..height {
            let at = rows.start + i * height + r;
            let mut first = r;
            for p in products {
                row.clear();
                row.resize(p.up.cols, 0.0);
                if at < rows.end {
                    p.up.read(at - p.rows.start, row);
                }
                let column = panel[first..].iter_mut().step_by(height);
                column.zip(row.iter()).for_each(|(out, v)| *out = p.scale * v);
                first += p.up.cols * height;
            }
        }
    }
}

/// The right factors below each other, [depth, cols], as panels of [depth, width], `step` apart; the last one filled up with zeros.
fn pack_right(
    products: &[&Product],
    cols: &Range<usize>,
    step: usize,
    width: usize,
    out: &mut [f32],
    row: &mut Vec<f32>,
) {
    row.resize(cols.len(), 0.0);
    let mut k = 0;
    for p in products {
        for r in 0..p.down.rows {
            p.down.read_stored(r, cols.start - p.cols.start, row);
            for (panel, values) in out.chunks_exact_mut(step).zip(row.chunks(width)) {
                let line = &mut panel[k * width..][..width];
                line[..values.len()].copy_from_slice(values);
                line[values.len()..].fill(0.0);
            }
            k += 1;
        }
    }
}

/// Reads a term's factors and checks that they fill its region. `base` is the pristine weight, of this shape; what needs more of it than
/// one row at a time is computed here.
pub(super) fn prepare(name: &str, base: &Rows, shape: &[usize], term: &Term<'_>) -> Result<Ready> {
    prepare_in(name, base, &Region::of(name, shape, term.slice)?, term)
}

/// As [`prepare`], in the region that the term's slice names.
pub(super) fn prepare_in(name: &str, base: &Rows, region: &Region, term: &Term<'_>) -> Result<Ready> {
    let (parts, scale) = match whole::delta(name, term, base, region)? {
        Some(delta) => (Parts::Dense(delta), 1.0),
        None => (factors(name, term.op, region)?, term.coefficient(name)?),
    };
    Ok(Ready { parts, scale, rows: region.rows.clone(), cols: region.cols.clone() })
}

fn fits(name: &str, region: &Region, size: [usize; 2]) -> Result<()> {
    let expected = [region.rows.len(), region.cols.len()];
    match size == expected {
        true => Ok(()),
        false => Err(Error::Shape {
            tensor: name.to_owned(),
            what: "the factors do not fit".into(),
            expected: expected.to_vec(),
            got: size.to_vec(),
        }),
    }
}

/// Reads the factors of an op that works row by row.
fn factors(name: &str, op: &Op, region: &Region) -> Result<Parts> {
    let Region { rows, cols, shape } = region;
    let fits = |size: [usize; 2]| fits(name, region, size);
    let pair = |up: &Tensor, down: &Tensor| -> Result<Pair> {
        fits([up.shape()[0], down.shape()[1]])?;
        Ok(Pair { rank: up.shape()[1], up: up.to_f32(name)?, down: down.to_f32(name)? })
    };
    Ok(match op {
        Op::LowRank(op) => Parts::LowRank(pair(&op.up, &op.down)?),
        Op::Hadamard(op) => {
            let [(up1, down1), (up2, down2)] = &op.pairs;
            Parts::Hadamard([pair(up1, down1)?, pair(up2, down2)?])
        }
        Op::Kron(op) => {
            let ((a, b), (c, d)) =
                ((op.w1.shape()[0], op.w1.shape()[1]), (op.w2.shape()[0], op.w2.shape()[1]));
            fits([a * c, b * d])?;
            let (w1, w2) = (op.w1.to_f32(name)?, op.w2.to_f32(name)?);
            Parts::Kron { w1, w2, w2_rows: c, w1_cols: b }
        }
        Op::Dense(op) => {
            fits([op.diff.shape()[0], op.diff.shape()[1]])?;
            Parts::Dense(op.diff.to_f32(name)?)
        }
        Op::Scale(op) if op.axis == 0 => {
            fits([op.v.count(), cols.len()])?;
            Parts::Rows(op.v.to_f32(name)?)
        }
        Op::Scale(op) => {
            let kernel: usize = shape.iter().skip(2).product();
            fits([rows.len(), op.v.count() * kernel])?;
            let v = op.v.to_f32(name)?;
            Parts::Cols(v.iter().flat_map(|&v| std::iter::repeat_n(v, kernel)).collect())
        }
        Op::RightLowRank(op) => {
            let taps = shape.iter().skip(2).product();
            fits([rows.len(), op.a1.shape()[0] * taps])?;
            fits([rows.len(), op.a2.shape()[1] * taps])?;
            let (a1, a2) = (op.a1.to_f32(name)?, op.a2.to_f32(name)?);
            Parts::Right { a1, a2, rank: op.a1.shape()[1], taps }
        }
        Op::Replace(op) => {
            fits([op.value.shape()[0], op.value.shape()[1]])?;
            Parts::Towards(op.value.to_f32(name)?)
        }
        Op::Rotate(_) | Op::Decompose(_) | Op::Principal(_) => {
            return Err(Error::Backend(format!("`{name}`: {op:?} does not work row by row")))
        }
    })
}

impl Ready {
    /// The term as a layer applies it: `scale * up @ down` where it is such a product, else its whole delta in the place of `down`.
    pub(super) fn into_factors(self, base: &Rows) -> (Option<Vec<f32>>, Vec<f32>, f32) {
        if let Parts::LowRank(pair) = self.parts {
            return (Some(pair.up), pair.down, self.scale);
        }
        let (rows, cols) = (self.rows.len(), self.cols.len());
        let mut sum = vec![0f32; rows * cols];
        // A region of its own size: the columns begin at 0.
        self.add(&mut sum, cols, 0, self.rows.clone(), base);
        (None, sum, 1.0)
    }

    /// Moves row `r` of the weight towards the term's value. Taking W out first gives, at strength 1, the value itself; adding the difference
    /// to W would round it at W's size.
    fn replace(&self, r: usize, row: &mut [f32], pristine: &[f32]) {
        let (Parts::Towards(value), true) = (&self.parts, self.rows.contains(&r)) else { return };
        let value = &value[(r - self.rows.start) * self.cols.len()..][..self.cols.len()];
        let both = row[self.cols.clone()].iter_mut().zip(&pristine[self.cols.clone()]);
        both.zip(value).for_each(|((o, w), v)| {
            // An infinite W is taken out as well.
            *o = if self.scale == 1.0 && *o == *w { *v } else { (*o - self.scale * w) + self.scale * v };
        });
    }

    /// Adds the delta of `rows` (of the weight, all inside the region) to `sum`, whose rows are `stride` long; the region's columns begin
    /// at `at`. Only a term that multiplies W reads `base`.
    pub(super) fn add(&self, sum: &mut [f32], stride: usize, at: usize, rows: Range<usize>, base: &Rows) {
        let first = rows.start - self.rows.start;
        let width = self.cols.len();
        let product = |out: &mut [f32], stride, at, scale, pair: &Pair| {
            let up = Mat::new(&pair.up[first * pair.rank..], rows.len(), pair.rank);
            add_product(out, stride, at, scale, up, Mat::new(&pair.down, pair.rank, width), false);
        };
        if let Parts::LowRank(pair) = &self.parts {
            return product(sum, stride, at, self.scale, pair);
        }
        if let Parts::Hadamard([one, two]) = &self.parts {
            let (mut left, mut right) = (vec![0f32; rows.len() * width], vec![0f32; rows.len() * width]);
            product(&mut left, width, 0, self.scale, one);
            product(&mut right, width, 0, 1.0, two);
            for (i, (left, right)) in left.chunks_exact(width).zip(right.chunks_exact(width)).enumerate() {
                let out = &mut sum[i * stride + at..][..width];
                out.iter_mut().zip(left).zip(right).for_each(|((o, l), r)| *o += l * r);
            }
            return;
        }
        let mut row = vec![0f32; base.cols];
        if let Parts::Right { a1, a2, rank, taps } = &self.parts {
            // A row of W is [I, taps]; seen as [taps, I] each tap is a row of the product.
            let (channels, count) = (width / taps, rows.len() * taps);
            let mut left = vec![0f32; count * channels];
            for (i, r) in rows.clone().enumerate() {
                base.read(r, &mut row);
                for (c, values) in row[self.cols.clone()].chunks_exact(*taps).enumerate() {
                    for (t, value) in values.iter().enumerate() {
                        left[(i * taps + t) * channels + c] = *value;
                    }
                }
            }
            let (mut thin, mut delta) = (vec![0f32; count * rank], vec![0f32; count * channels]);
            let (left, a1) = (Mat::new(&left, count, channels), Mat::new(a1, channels, *rank));
            add_product(&mut thin, *rank, 0, 1.0, left, a1, false);
            let (thin, a2) = (Mat::new(&thin, count, *rank), Mat::new(a2, *rank, channels));
            add_product(&mut delta, channels, 0, self.scale, thin, a2, false);
            for (i, delta) in delta.chunks_exact(taps * channels).enumerate() {
                let out = &mut sum[i * stride + at..][..width];
                for (k, out) in out.iter_mut().enumerate() {
                    *out += delta[k % taps * channels + k / taps];
                }
            }
            return;
        }
        for (i, r) in rows.enumerate() {
            let (out, own) = (&mut sum[i * stride + at..][..width], first + i);
            match &self.parts {
                Parts::Kron { w1, w2, w2_rows, w1_cols } => {
                    let d = width / w1_cols;
                    let (w1, w2) =
                        (&w1[own / w2_rows * w1_cols..][..*w1_cols], &w2[own % w2_rows * d..][..d]);
                    for (out, factor) in out.chunks_exact_mut(d).zip(w1) {
                        let factor = self.scale * factor;
                        out.iter_mut().zip(w2).for_each(|(o, w)| *o += factor * w);
                    }
                }
                Parts::Dense(diff) => {
                    out.iter_mut().zip(&diff[own * width..]).for_each(|(o, d)| *o += self.scale * d);
                }
                Parts::Rows(v) => {
                    base.read(r, &mut row);
                    let factor = self.scale * v[own];
                    out.iter_mut().zip(&row[self.cols.clone()]).for_each(|(o, w)| *o += factor * w);
                }
                Parts::Cols(v) => {
                    base.read(r, &mut row);
                    let base = &row[self.cols.clone()];
                    out.iter_mut().zip(base).zip(v).for_each(|((o, w), v)| *o += self.scale * v * w);
                }
                Parts::Towards(value) => {
                    base.read(r, &mut row);
                    let (value, base) = (&value[own * width..][..width], &row[self.cols.clone()]);
                    out.iter_mut().zip(value).zip(base).for_each(|((o, v), w)| *o += self.scale * (v - w));
                }
                Parts::LowRank(_) | Parts::Hadamard(_) | Parts::Right { .. } => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
