//! The executor of fused kernels: all weights and all their adapters in a few launches, on the caller's stream, without libtorch.
//!
//! A merge is a table of targets and a table of terms ([`lower`]), whose factors lie on the device ([`factors`]) and which the kernels of
//! `kernels/` read ([`tables`], [`launch`]). All of it is kept: a change of strengths uploads new coefficients and launches.

mod compact;
mod derived;
mod factors;
mod launch;
mod lower;
mod tables;
mod turn;

use super::ops::{self, Op, Region, Rotate, Rounding, Storage};
use super::Work;
use crate::cuda::{Arg, Buffer, Gpu, Queue};
use crate::dtype::{byte_len, Dtype, Float};
use crate::error::{Error, Result};
use crate::view::{row_major, Device, View};
pub use compact::Compact;
use derived::Computed;
use factors::Factors;
use launch::{Launches, Variant};
use lower::{Draft, Drafts};
use std::borrow::Cow;
use std::collections::HashMap;
use tables::Row;
use turn::{Turn, Turns};

/// What stays on the device between merges of the same weights.
#[derive(Default)]
pub struct Kept {
    factors: Factors,
    computed: Computed,
    plan: Option<Plan>,
}

/// A row before its coefficient is known.
struct Placed {
    row: tables::Term,
    /// The coefficient over the term's strength; `None`: it is 1.
    scale: Option<f64>,
    /// Index of the term.
    term: usize,
}

/// The rows of one target, of which the first are products.
struct Span {
    job: usize,
    count: usize,
    products: usize,
}

/// The tables of the last merge. They serve any strengths, except for what bends with its own.
struct Plan {
    signature: Vec<u64>,
    /// The strengths that are part of the tables: (job, term, strength).
    bent: Vec<(usize, usize, f64)>,
    targets: Buffer,
    /// Target by target.
    rows: Vec<Placed>,
    spans: Vec<Span>,
    /// The rows with their coefficients, here and on the device.
    table: Vec<tables::Term>,
    terms: Buffer,
    launches: Launches,
    /// Rotations that write their weights themselves, of which target and term.
    turns: Turns,
    turned: Vec<(usize, usize)>,
    _columns: Vec<Buffer>,
}

/// Whether all of a job is done by kernels; libtorch is better at the rest, where it is there and knows the dtype.
#[cfg(feature = "torch")]
pub fn has_kernels(gpu: &Gpu, job: &Work<'_>) -> bool {
    let Some(float) = Float::of(job.base.dtype()) else { return true };
    let done = |op: &Op| match op {
        Op::Rotate(op) => turn::fits(gpu, float, op),
        Op::Principal(_) => false,
        _ => true,
    };
    float.is_eight_bits() || job.terms.iter().all(|t| t.strength == 0.0 || done(t.op))
}

/// The rotations of a job and their terms, where there is nothing else to do and no two of them meet: their kernels write the weight, the others
/// at most copy it before.
fn rotations<'a>(gpu: &Gpu, job: &Work<'a>) -> Option<Vec<(&'a Rotate, usize, Region)>> {
    let float = Float::of(job.base.dtype())?;
    let mut found: Vec<(&Rotate, usize, Region)> = Vec::new();
    for (i, term) in job.terms.iter().enumerate().filter(|(_, term)| term.strength != 0.0) {
        let Op::Rotate(op) = term.op else { return None };
        let region = Region::of(job.name, job.base.shape(), term.slice).ok()?;
        let apart =
            |a: &std::ops::Range<usize>, b: &std::ops::Range<usize>| a.end <= b.start || b.end <= a.start;
        let alone = found.iter().all(|(.., r)| apart(&r.rows, &region.rows) || apart(&r.cols, &region.cols));
        if !alone || !turn::fits(gpu, float, op) {
            return None;
        }
        found.push((op, i, region));
    }
    (!found.is_empty()).then_some(found)
}

/// Merges all jobs. Enqueued on the queue's stream; nothing is waited for.
pub fn merge(queue: &Queue, jobs: &[Work<'_>], kept: &mut Kept) -> Result<()> {
    let mut plan = match kept.plan.take().filter(|plan| plan.serves(jobs)) {
        Some(plan) => plan,
        None => Plan::new(queue, jobs, kept)?,
    };
    plan.run(queue, jobs)?;
    kept.plan = Some(plan);
    Ok(())
}

fn check(gpu: &Gpu, job: &Work<'_>) -> Result<()> {
    for (view, what) in [(job.base, "the pristine weight"), (job.out, "the weight")] {
        if view.device() != Device::Cuda(gpu.index()) {
            let what =
                format!("`{}`: {what} is on {}, the work on cuda:{}", job.name, view.device(), gpu.index());
            return Err(Error::argument(what, "both must be on one device"));
        }
    }
    if job.base.shape() != job.out.shape() || job.base.dtype() != job.out.dtype() {
        return Err(Error::Shape {
            tensor: job.name.to_owned(),
            what: "base and result differ".into(),
            expected: job.base.shape().to_vec(),
            got: job.out.shape().to_vec(),
        });
    }
    let (rows, columns) = lower::matrix(job.base.shape());
    if rows > u32::MAX as usize - 64 || columns > u32::MAX as usize - 64 {
        let what = format!("`{}`: a weight of {rows} x {columns} is too large for the kernels", job.name);
        return Err(Error::argument(what, ""));
    }
    Ok(())
}

/// What a plan depends on but for strengths. The number of the pristine weight stands for that of its shape, strides and dtype, and for those of
/// the result.
fn signature<'a>(jobs: &'a [Work<'_>]) -> impl Iterator<Item = u64> + 'a {
    jobs.iter().flat_map(|job| {
        let (seed, stochastic) = rounding(job.storage.rounding);
        let own = [
            job.pristine.unwrap_or(0),
            job.base.data() as u64,
            job.out.data() as u64,
            u64::from(job.storage.scale.to_bits()) << 32 | u64::from(seed),
            u64::from(stochastic),
            job.terms.len() as u64,
        ];
        let of_term = |term: &ops::Term<'_>| {
            let [op, axis, start, len] = identity(term);
            [op, u64::from(term.strength == 0.0), axis, start, len]
        };
        own.into_iter().chain(job.terms.iter().flat_map(of_term))
    })
}

/// What tells a term from others, but for its strength. An op that is kept with its factors keeps its address.
fn identity(term: &ops::Term<'_>) -> [u64; 4] {
    let [axis, start, len] = term.slice.map_or([2, 0, 0], |s| [s.axis as u64, s.start as u64, s.len as u64]);
    [std::ptr::from_ref(term.op) as u64, axis, start, len]
}

fn rounding(rounding: Rounding) -> (u32, bool) {
    match rounding {
        Rounding::Nearest => (0, false),
        Rounding::Stochastic { seed } => (seed, true),
    }
}

fn coefficient(job: &Work<'_>, scale: Option<f64>, term: usize) -> Result<f32> {
    let Some(scale) = scale else { return Ok(1.0) };
    ops::coefficient(job.name, job.terms.get(term).map_or(0.0, |term| term.strength), scale)
}

/// Puts products in the order of their coefficients' sizes, equal ones as they stand, and gives each the coefficient of the one before over its
/// own: `merge_products` keeps one sum in units of the coefficient at hand.
fn carry(products: &mut [tables::Term]) {
    products.sort_by(|a, b| a.coefficient.abs().total_cmp(&b.coefficient.abs()));
    let mut before = 0.0f32;
    for row in products {
        row.carry = if row.coefficient == 0.0 { 0.0 } else { before / row.coefficient };
        before = row.coefficient;
    }
}

impl Plan {
    /// Whether it was made for the same jobs, at whatever strengths.
    fn serves(&self, jobs: &[Work<'_>]) -> bool {
        let at = |job: usize, term: usize| jobs[job].terms[term].strength;
        jobs.iter().all(|job| job.pristine.is_some())
            && signature(jobs).eq(self.signature.iter().copied())
            && self.bent.iter().all(|&(job, term, strength)| at(job, term).to_bits() == strength.to_bits())
    }

    /// Enqueues the merge at the jobs' strengths.
    fn run(&mut self, queue: &Queue, jobs: &[Work<'_>]) -> Result<()> {
        self.table.clear();
        let mut first = 0;
        for &Span { job, count, products } in &self.spans {
            for Placed { row, scale, term } in &self.rows[first..first + count] {
                let coefficient = coefficient(&jobs[job], *scale, *term)?;
                self.table.push(tables::Term { coefficient, ..*row });
            }
            carry(&mut self.table[first..first + products]);
            first += count;
        }
        let strength = |&(job, term): &(usize, usize)| jobs[job].terms[term].coefficient(jobs[job].name);
        let strengths = self.turned.iter().map(strength).collect::<Result<Vec<f32>>>()?;
        // SAFETY: the host's weights, which it keeps until the stream has passed here, and memory that the plan holds; the merge that read these
        // terms before comes before this one.
        unsafe {
            queue.upload(Row::bytes(&self.table), self.terms.ptr())?;
            self.launches.run(queue, &self.targets, &self.terms)?;
            self.turns.run(queue, &strengths)
        }
    }

    fn new(queue: &Queue, all: &[Work<'_>], kept: &mut Kept) -> Result<Self> {
        let numbered = || all.iter().enumerate().filter(|(_, job)| job.base.count() > 0);
        let (numbers, jobs): (Vec<usize>, Vec<&Work<'_>>) = numbered().unzip();
        let jobs = &jobs[..];
        jobs.iter().try_for_each(|job| check(queue.gpu(), job))?;
        let mut drafts = Vec::with_capacity(jobs.len());
        let direct: Vec<_> = jobs.iter().map(|job| rotations(queue.gpu(), job)).collect();
        let mut bent = Vec::new();
        for ((job, direct), &number) in jobs.iter().zip(&direct).zip(&numbers) {
            if direct.is_some() {
                drafts.push(Drafts::default());
                continue;
            }
            let bending = |(_, term): &(usize, &ops::Term<'_>)| term.strength != 0.0 && lower::bends(term.op);
            let bending = job.terms.iter().enumerate().filter(bending);
            bent.extend(bending.map(|(i, term)| (number, i, term.strength)));
            drafts.push(Drafts::of(job)?);
        }
        let turning = direct.iter().flatten().flatten().flat_map(|(op, ..)| turn::wanted(op));
        let drafted = drafts.iter_mut().flat_map(|own| std::mem::take(&mut own.wanted));
        kept.factors.load(queue, drafted.chain(turning))?;
        let mut columns = Columns::default();
        let mut targets = Vec::with_capacity(jobs.len());
        for job in jobs {
            targets.push(target(queue, job, &mut columns)?);
        }
        kept.computed.compute(queue, jobs, &targets, &drafts, &kept.factors)?;
        let (mut rows, mut spans, mut launches) = (Vec::new(), Vec::new(), Launches::default());
        let (mut turns, mut turned) = (Turns::default(), Vec::new());
        for (i, (job, own)) in jobs.iter().zip(&drafts).enumerate() {
            let address = |index: usize, which| kept.computed.address(job, &own.derived[index], which);
            let resolved = |draft: &Draft| lower::resolve(draft, &kept.factors, &address);
            let terms = own.rows.iter().map(resolved).collect::<Result<Vec<_>>>()?;
            let products = terms.iter().filter(|t| t.is_product()).count();
            let target = &mut targets[i];
            target.first = rows.len() as u32;
            (target.count, target.products) = (terms.len() as u32, products as u32);
            spans.push(Span { job: numbers[i], count: terms.len(), products });
            let placed =
                |(&row, draft): (&tables::Term, &Draft)| Placed { row, scale: draft.scale, term: draft.term };
            rows.extend(terms.iter().zip(&own.rows).map(placed));
            let float = Float::require(job.base.dtype(), job.name)?;
            let mut covered = false;
            for (op, term, region) in direct[i].iter().flatten() {
                let (part, pitch) = (part(target, region, float), target.columns as usize);
                covered |= part.rows == target.rows && part.columns == target.columns;
                let element = (region.rows.start * pitch + region.cols.start) as u64;
                let turn = Turn { name: job.name, part, float, op, element, pitch, delta: None };
                turns.add(queue.gpu(), &turn, &kept.factors)?;
                turned.push((numbers[i], *term));
            }
            if !covered {
                let variant = Variant::of(target, &terms, aligned(target, float));
                launches.add(i, target, float, &terms, variant);
            }
        }
        Ok(Plan {
            signature: signature(all).collect(),
            bent,
            targets: queue.upload_new(Row::bytes(&targets))?,
            terms: queue.alloc(rows.len() * std::mem::size_of::<tables::Term>())?,
            table: Vec::with_capacity(rows.len()),
            rows,
            spans,
            launches,
            turns,
            turned,
            _columns: columns.memory,
        })
    }
}

/// A weight as the kernels see it, without terms.
fn target(queue: &Queue, job: &Work<'_>, columns: &mut Columns) -> Result<tables::Target> {
    let float = Float::require(job.base.dtype(), job.name)?;
    let (seed, stochastic) = rounding(job.storage.rounding);
    Ok(tables::Target {
        base_columns: columns.of(queue, job.base)?,
        out_columns: columns.of(queue, job.out)?,
        scale: job.storage.scale,
        seed,
        stochastic: u32::from(stochastic && float.size() == 1),
        ..plain_target(job.base, job.out, float)
    })
}

/// The same where the columns lie side by side and the stored numbers are the real ones, rounded to nearest.
fn plain_target(base: &View, out: &View, float: Float) -> tables::Target {
    let (rows, columns) = lower::matrix(base.shape());
    let row = |view: &View| view.strides().first().copied().unwrap_or(0) as u64;
    tables::Target {
        base: base.data() as u64,
        out: out.data() as u64,
        base_row: row(base),
        out_row: row(out),
        rows: rows as u32,
        columns: columns as u32,
        scale: 1.0,
        dtype: tables::dtype(float),
        ..Default::default()
    }
}

/// A region of a weight as a weight of its own.
fn part(target: &tables::Target, region: &Region, float: Float) -> tables::Target {
    let (rows, cols) = (region.rows.start as u64, region.cols.start as u64);
    let side = |address: u64, columns: u64, row: u64| {
        let skipped = if columns == 0 { cols } else { 0 };
        (
            address + (rows * row + skipped) * float.size() as u64,
            if columns == 0 { 0 } else { columns + 4 * cols },
        )
    };
    let (base, base_columns) = side(target.base, target.base_columns, target.base_row);
    let (out, out_columns) = side(target.out, target.out_columns, target.out_row);
    tables::Target {
        base,
        out,
        base_columns,
        out_columns,
        rows: region.rows.len() as u32,
        columns: region.cols.len() as u32,
        ..*target
    }
}

/// Whether the fast kernels can take a weight: eights of its columns lie together, at 16 bytes (8 where an element is one).
fn aligned(target: &tables::Target, float: Float) -> bool {
    let (size, step) = (float.size() as u64, (8 * float.size() as u64).min(16));
    let side =
        |address: u64, row: u64, columns: u64| columns == 0 && address % step == 0 && row * size % step == 0;
    target.columns % 8 == 0
        && side(target.base, target.base_row, target.base_columns)
        && side(target.out, target.out_row, target.out_columns)
}

/// As [`aligned`], for kernels that only read the weight.
fn reads_aligned(target: &tables::Target, float: Float) -> bool {
    let (out, out_row, out_columns) = (target.base, target.base_row, target.base_columns);
    aligned(&tables::Target { out, out_row, out_columns, ..*target }, float)
}

/// The shape and strides of a row.
fn inner(view: &View) -> (&[usize], &[usize]) {
    (view.shape().get(1..).unwrap_or(&[]), view.strides().get(1..).unwrap_or(&[]))
}

/// Whether the columns of a weight do.
fn side_by_side(view: &View) -> bool {
    let (shape, strides) = inner(view);
    shape.iter().zip(strides).zip(row_major(shape)).all(|((&d, &s), r)| d == 1 || s == r)
}

/// Offsets of columns that do not lie side by side, by their shape and strides.
#[derive(Default)]
struct Columns {
    known: HashMap<(Vec<usize>, Vec<usize>), u64>,
    memory: Vec<Buffer>,
}

impl Columns {
    /// The table's address, or 0 where there is nothing to tell.
    fn of(&mut self, queue: &Queue, view: &View) -> Result<u64> {
        if side_by_side(view) {
            return Ok(0);
        }
        let (shape, strides) = inner(view);
        if let Some(&address) = self.known.get(&(shape.to_vec(), strides.to_vec())) {
            return Ok(address);
        }
        let mut offsets = vec![0u64];
        for (&dim, &stride) in shape.iter().zip(strides) {
            offsets = offsets.iter().flat_map(|&o| (0..dim).map(move |i| o + (i * stride) as u64)).collect();
        }
        let bytes: Vec<u8> = offsets.iter().flat_map(|&o| (o as u32).to_le_bytes()).collect();
        if offsets.iter().any(|&o| u32::try_from(o).is_err()) {
            return Err(Error::argument(
                format!("columns of a weight lie {:?} elements apart", strides),
                "call .contiguous() on it",
            ));
        }
        let buffer = queue.upload_new(&bytes)?;
        let address = buffer.ptr();
        self.memory.push(buffer);
        self.known.insert((shape.to_vec(), strides.to_vec()), address);
        Ok(address)
    }
}

/// Host weights that are merged at once: as much scratch memory on the device as that.
const BATCH: usize = 256 << 20;

/// As [`merge`], for weights of which the pristine one or the result may be in host memory.
pub fn merge_from_anywhere(
    queue: &Queue,
    jobs: &[Work<'_>],
    kept: &mut Kept,
    between: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<()> {
    let here = |view: &View| view.device() != Device::Cpu;
    if jobs.iter().all(|job| here(job.base) && here(job.out)) {
        between(0)?;
        return merge(queue, jobs, kept);
    }
    if jobs.iter().all(|job| here(job.out) && (here(job.base) || job.base.dtype() == job.out.dtype())) {
        between(0)?;
        // Pristine weights go up to where the results will be, and are merged in place: no scratch memory, and one launch for all.
        let up: Vec<_> =
            jobs.iter().filter(|job| !here(job.base)).map(|job| (job.name, job.base, job.out)).collect();
        copy(queue, &up)?;
        let mut in_place = jobs.to_vec();
        in_place.iter_mut().filter(|job| !here(job.base)).for_each(|job| job.base = job.out);
        return merge(queue, &in_place, kept);
    }
    // Through scratch memory, some at a time.
    let mut first = 0;
    while first < jobs.len() {
        let (mut size, mut end) = (0usize, first);
        while end < jobs.len() && (end == first || size < BATCH) {
            size += jobs[end].base.byte_len();
            end += 1;
        }
        between(first)?;
        merge_through_scratch(queue, &jobs[first..end], kept)?;
        first = end;
    }
    Ok(())
}

fn merge_through_scratch(queue: &Queue, jobs: &[Work<'_>], kept: &mut Kept) -> Result<()> {
    // Where the dtypes differ both are fp32 on the device: the sum is, anyway.
    let scratch = |view: &View, dtype: Dtype| -> Result<(View, Option<Buffer>)> {
        if view.device() != Device::Cpu {
            return Ok((view.clone(), None));
        }
        let size = byte_len(dtype, view.shape()).unwrap_or(0);
        let buffer = queue.alloc(size.max(1))?;
        let device = Device::Cuda(queue.gpu().index());
        // SAFETY: the buffer is that long and lives until this function returns; what is enqueued by then is ordered before its end.
        let own = unsafe { View::from_raw(buffer.ptr() as *mut u8, device, dtype, view.shape(), None)? };
        Ok((own, Some(buffer)))
    };
    let dtype = |job: &Work<'_>| match job.base.dtype() == job.out.dtype() {
        true => job.base.dtype(),
        false => Dtype::F32,
    };
    let bases = jobs.iter().map(|job| scratch(job.base, dtype(job))).collect::<Result<Vec<_>>>()?;
    let outs = jobs.iter().map(|job| scratch(job.out, dtype(job))).collect::<Result<Vec<_>>>()?;
    for (job, (base, buffer)) in jobs.iter().zip(&bases) {
        if buffer.is_none() {
            continue;
        }
        let bytes = match job.base.bytes() {
            Some(bytes) if base.dtype() == job.base.dtype() => Cow::Borrowed(bytes),
            _ => Cow::Owned(packed(job.name, job.base, base.dtype())?),
        };
        // SAFETY: as above.
        unsafe { queue.upload(&bytes, base.data() as u64)? };
    }
    let moved: Vec<Work<'_>> = jobs
        .iter()
        .zip(bases.iter().zip(&outs))
        .map(|(job, ((base, _), (out, _)))| Work { base, out, pristine: None, ..*job })
        .collect();
    let mut own = Kept { factors: std::mem::take(&mut kept.factors), ..Kept::default() };
    let merged = merge(queue, &moved, &mut own);
    kept.factors = own.factors;
    merged?;
    for (job, (out, buffer)) in jobs.iter().zip(&outs) {
        if buffer.is_none() {
            continue;
        }
        let mut bytes = vec![0u8; out.byte_len()];
        // SAFETY: as above.
        unsafe { queue.download(out.data() as u64, &mut bytes)? };
        host_copy(job.name, &mut bytes, out.dtype(), job.out)?;
    }
    Ok(())
}

/// A region of a job's pristine weight, row-major, on the host. Waits for the stream.
fn packed_region(queue: &Queue, job: &Work<'_>, region: &Region) -> Result<Vec<u8>> {
    let base = job.base.region(region.rows.clone(), region.cols.clone());
    let base = base.ok_or_else(|| Error::Backend(format!("`{}`: its region is no slice", job.name)))?;
    let size = base.byte_len();
    let buffer = queue.alloc(size.max(1))?;
    // SAFETY: the buffer is that long and lives until the download below has been waited for.
    let to =
        unsafe { View::from_raw(buffer.ptr() as *mut u8, base.device(), base.dtype(), base.shape(), None)? };
    copy(queue, &[(job.name, &base, &to)])?;
    let mut bytes = vec![0u8; size];
    // SAFETY: as above.
    unsafe { queue.download(buffer.ptr(), &mut bytes)? };
    Ok(bytes)
}

/// The elements of a host view, row-major, as `dtype`: its own, or fp32.
pub(super) fn packed(name: &str, view: &View, dtype: Dtype) -> Result<Vec<u8>> {
    if dtype != view.dtype() {
        return Ok(view.to_f32(name)?.into_iter().flat_map(f32::to_le_bytes).collect());
    }
    let mut bytes = vec![0u8; view.byte_len()];
    // SAFETY: a view of the vector, which outlives it.
    let to = unsafe { View::from_raw(bytes.as_mut_ptr(), Device::Cpu, dtype, view.shape(), None)? };
    super::restore::copy(name, view, &to)?;
    Ok(bytes)
}

/// Row-major elements into a host view, rounded where the dtypes differ.
fn host_copy(name: &str, bytes: &mut [u8], dtype: Dtype, to: &View) -> Result<()> {
    // SAFETY: a view of the slice, which outlives it.
    let from = unsafe { View::from_raw(bytes.as_mut_ptr(), Device::Cpu, dtype, to.shape(), None)? };
    if dtype == to.dtype() {
        return super::restore::copy(name, &from, to);
    }
    super::cpu::merge(name, &from, to, &Storage::default(), &[])
}

/// Copies weights of the same shape and dtype, bit for bit, whatever their strides: (name, from, to). One side may be in host memory, packed and
/// page-locked.
pub fn copy(queue: &Queue, pairs: &[(&str, &View, &View)]) -> Result<()> {
    let (mut jobs, mut apart) = (Vec::new(), Vec::new());
    for &(name, from, to) in pairs {
        if from.device() != Device::Cpu && to.device() != Device::Cpu {
            jobs.push(only_copied(name, from, to));
        } else if from.is_contiguous() && to.is_contiguous() {
            // SAFETY: page-locked memory of a backup and the host's weight, which both live until the stream has passed here.
            unsafe { queue.copy(from.data() as u64, to.data() as u64, from.byte_len())? };
        } else {
            apart.push((name, from, to));
        }
    }
    // In parts: while the device copies one, the tables of the next are made.
    jobs.chunks(128).try_for_each(|jobs| merge(queue, jobs, &mut Kept::default()))?;
    let mut rest = &apart[..];
    while !rest.is_empty() {
        let mut size = 0;
        let full = rest.iter().position(|(_, from, _)| {
            size += from.byte_len();
            size >= BATCH
        });
        let (some, others) = rest.split_at(full.map_or(rest.len(), |last| last + 1));
        copy_through_scratch(queue, some)?;
        rest = others;
    }
    Ok(())
}

/// A weight to which nothing is added.
fn only_copied<'a>(name: &'a str, base: &'a View, out: &'a View) -> Work<'a> {
    Work { name, base, out, storage: Storage::default(), terms: &[], pristine: None }
}

/// As [`copy`], between packed host memory and weights whose elements lie apart: packed on the device, they go up or down.
fn copy_through_scratch(queue: &Queue, pairs: &[(&str, &View, &View)]) -> Result<()> {
    let packed = |&(_, from, _): &(&str, &View, &View)| {
        let buffer = queue.alloc(from.byte_len())?;
        let (at, device) = (buffer.ptr() as *mut u8, Device::Cuda(queue.gpu().index()));
        // SAFETY: the buffer is that long and lives until this function returns; what is enqueued by then is ordered before its end.
        let view = unsafe { View::from_raw(at, device, from.dtype(), from.shape(), None)? };
        Ok((view, buffer))
    };
    let scratch = pairs.iter().map(packed).collect::<Result<Vec<_>>>()?;
    let each = || pairs.iter().zip(&scratch).map(|(&(name, from, to), (packed, _))| (name, from, to, packed));
    let move_packed = |from: &View, to: &View| {
        // SAFETY: scratch memory, and that of a backup, which lives until the stream has passed here.
        unsafe { queue.copy(from.data() as u64, to.data() as u64, from.byte_len()) }
    };
    let goes_up = |from: &View| from.device() == Device::Cpu;
    each()
        .filter(|(_, from, ..)| goes_up(from))
        .try_for_each(|(_, from, _, packed)| move_packed(from, packed))?;
    let job = |(name, from, to, packed)| match goes_up(from) {
        true => only_copied(name, packed, to),
        false => only_copied(name, from, packed),
    };
    merge(queue, &each().map(job).collect::<Vec<_>>(), &mut Kept::default())?;
    each().filter(|(_, from, ..)| !goes_up(from)).try_for_each(|(_, _, to, packed)| move_packed(packed, to))
}

/// The checksums of weights on this device; see `checksum.rs`. Waits for the stream.
pub(super) fn checksums(queue: &Queue, weights: &[(&str, &View)]) -> Result<Vec<u64>> {
    let mut columns = Columns::default();
    let mut sums = Vec::with_capacity(weights.len());
    // A launch takes so many rows of blocks.
    for weights in weights.chunks(65_535) {
        let mut targets = Vec::with_capacity(weights.len());
        for &(name, view) in weights {
            targets.push(target(queue, &only_copied(name, view, view), &mut columns)?);
        }
        let mut bytes = vec![0u8; 8 * weights.len()];
        let result = queue.upload_new(&bytes)?;
        let targets = queue.upload_new(Row::bytes(&targets))?;
        let grid = [64, weights.len() as u32, 1];
        // SAFETY: the kernel's parameters in its order; the weights are the host's, and the result is as long as they are many.
        unsafe {
            queue.launch("checksum", "checksum", grid, 256, 0, &[Arg::from(&targets), Arg::from(&result)])?;
            queue.download(result.ptr(), &mut bytes)?;
        }
        sums.extend(
            bytes
                .chunks_exact(8)
                .map(|b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])),
        );
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_go_by_their_coefficients_and_equal_ones_as_they_came() {
        let row = |a, coefficient| tables::Term { a, coefficient, ..Default::default() };
        let mut rows = vec![row(0, 1.0), row(1, 0.5), row(2, -0.75), row(3, -0.5)];
        carry(&mut rows);
        assert_eq!(rows.iter().map(|row| row.a).collect::<Vec<_>>(), [1, 3, 2, 0]);
        assert_eq!(rows.iter().map(|row| row.carry).collect::<Vec<_>>(), [0.0, -1.0, -0.5 / -0.75, -0.75]);
    }
}
