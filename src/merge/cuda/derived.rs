//! What terms need that is computed from the weight itself, once: it does not depend on strengths.

use super::factors::{Factors, Key as Factor, Wanted};
use super::launch::{strips, Variant};
use super::lower::{resolve, Draft, Drafts};
use super::tables::{self, Format, Layout, Row, Strip, Target};
use super::turn::{self, Turn, Turns};
use super::{packed_region, part, reads_aligned};
use crate::cuda::{Arg, Buffer, Queue};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::merge::ops::{self, Decompose, Op, Region, RightLowRank, Term};
use crate::merge::{whole, Work};
use crate::view::{Rows, Tensor};
use std::collections::{BTreeMap, HashMap};

/// One thing to compute on a region of a weight.
pub(super) struct Derived {
    /// The op's address: it is kept with its adapter.
    op: usize,
    region: Region,
    taps: usize,
    what: What,
}

enum What {
    /// DoRA's gain f and f - 1.
    Norm { axis: usize, magnitude: Factor, inside: Vec<Draft> },
    /// GLoRA's W @ a1 as up fragments.
    Right { a1: Factor, rank: usize, format: Format },
    /// The whole delta in fp32, of a rotation or computed on the host: at strength 1, or at the given one, which it is not proportional to.
    Delta(Box<Op>, Option<f64>),
}

impl Derived {
    /// For [`Op::RightLowRank`]: result 0 is the up factor. Asks for its factors, as the others do.
    pub fn right(op: &RightLowRank, region: &Region, taps: usize, own: &mut Drafts) -> Result<Self> {
        let format = match Float::require(op.a1.dtype(), "a factor")? {
            Float::BF16 => Format::BF16,
            _ => Format::Split,
        };
        let a1 = own.want(Wanted::fragments(&op.a1, Layout::Right, format, 0));
        let what = What::Right { a1, rank: op.a1.shape()[1], format };
        Ok(Derived { op: std::ptr::from_ref(op) as usize, region: region.clone(), taps, what })
    }

    /// For [`Op::Decompose`], whose inner rows are placed in the region alone: result 0 is f, 1 is f - 1.
    pub fn norm(op: &Decompose, region: &Region, taps: usize, inside: Vec<Draft>, own: &mut Drafts) -> Self {
        let magnitude = own.want(Wanted::repeated(&op.magnitude, 1));
        let what = What::Norm { axis: op.axis, magnitude, inside };
        Derived { op: std::ptr::from_ref(op) as usize, region: region.clone(), taps, what }
    }

    /// For an op without kernels: result 0 is the delta in fp32, at strength 1 or, not kept for the next merge, at the given one.
    pub fn delta(op: &Op, region: &Region, strength: Option<f64>, own: &mut Drafts) -> Self {
        if let Op::Rotate(op) = op {
            own.wanted.extend(turn::wanted(op));
        }
        let what = What::Delta(Box::new(op.clone()), strength);
        Derived { op: std::ptr::from_ref(op) as usize, region: region.clone(), taps: 1, what }
    }

    fn key(&self, job: &Work<'_>) -> Key {
        (self.op, job.out.data() as usize, self.region.rows.start, self.region.cols.start)
    }
}

/// The op, the weight, the region's first row and column.
type Key = (usize, usize, usize, usize);

/// What was computed.
#[derive(Default)]
pub(super) struct Computed(HashMap<Key, Entry>);

struct Entry {
    /// Of the copy that it was computed from.
    pristine: Option<u64>,
    results: [u64; 2],
    _memory: Buffer,
}

impl Computed {
    /// The address of a result that was computed.
    pub fn address(&self, job: &Work<'_>, derived: &Derived, which: usize) -> Result<u64> {
        let entry = self.0.get(&derived.key(job));
        let results =
            entry.ok_or_else(|| Error::Backend(format!("`{}`: a part was not computed", job.name)))?;
        Ok(results.results[which])
    }

    /// Computes what is missing or was computed from another copy.
    pub fn compute(
        &mut self,
        queue: &Queue,
        jobs: &[&Work<'_>],
        targets: &[Target],
        drafts: &[Drafts],
        factors: &Factors,
    ) -> Result<()> {
        let (mut norms, mut rights) = (Norms::default(), Rights::default());
        let (mut turns, mut strengths) = (Turns::default(), Vec::new());
        for ((job, target), own) in jobs.iter().zip(targets).zip(drafts) {
            for derived in &own.derived {
                let known = self.0.get(&derived.key(job));
                let lasts = job.pristine.is_some() && !matches!(derived.what, What::Delta(_, Some(_)));
                if known.is_some_and(|entry| entry.pristine == job.pristine && lasts) {
                    continue;
                }
                let float = Float::require(job.base.dtype(), job.name)?;
                let part = part(target, &derived.region, float);
                let (results, memory) = match &derived.what {
                    What::Norm { axis, magnitude, inside } => {
                        let lines = if *axis == 0 { part.rows } else { part.columns } as usize;
                        let memory = queue.alloc(8 * lines)?;
                        let results = [memory.ptr(), memory.ptr() + 4 * lines as u64];
                        norms.add(
                            part,
                            float,
                            *axis,
                            derived.taps,
                            factors.address(magnitude)?,
                            inside,
                            factors,
                            results,
                        )?;
                        (results, memory)
                    }
                    What::Right { a1, rank, format } => {
                        let shift = derived.region.rows.start % 16;
                        let ranks = rank.div_ceil(16);
                        let blocks = (shift + part.rows as usize).div_ceil(16);
                        let memory = queue.alloc(blocks * derived.taps * ranks * 3 * 512)?;
                        let plain = derived.taps == 1 && reads_aligned(&part, float);
                        rights.add(tables::Right {
                            base: part.base,
                            base_columns: part.base_columns,
                            a1: factors.address(a1)?,
                            out: memory.ptr(),
                            base_row: part.base_row,
                            rows: part.rows,
                            channels: part.columns / derived.taps as u32,
                            taps: derived.taps as u32,
                            ranks: ranks as u32,
                            dtype: part.dtype,
                            format: *format as u32,
                            shift: shift as u32,
                            plain: u32::from(plain),
                            scale: part.scale,
                            unused: 0,
                        });
                        ([memory.ptr(), 0], memory)
                    }
                    What::Delta(op, strength) if turns_here(queue, float, op) => {
                        let Op::Rotate(op) = op.as_ref() else { continue };
                        let memory = queue.alloc(4 * part.rows as usize * part.columns as usize)?;
                        let delta = Some(memory.ptr());
                        // What is added in fp32 is not rounded, so its place in the noise is of no matter.
                        let turn = Turn { name: job.name, part, float, op, element: 0, pitch: 0, delta };
                        turns.add(queue.gpu(), &turn, factors)?;
                        strengths.push(ops::coefficient(job.name, strength.unwrap_or(1.0), 1.0)?);
                        ([memory.ptr(), 0], memory)
                    }
                    What::Delta(op, strength) => {
                        let bytes = delta(queue, job, op, &derived.region, strength.unwrap_or(1.0))?;
                        let memory = queue.upload_new(&bytes)?;
                        ([memory.ptr(), 0], memory)
                    }
                };
                let entry = Entry { pristine: job.pristine, results, _memory: memory };
                self.0.insert(derived.key(job), entry);
            }
        }
        norms.run(queue)?;
        rights.run(queue)?;
        // SAFETY: the host's weights, which it keeps until the stream has passed here, and memory that is kept above.
        unsafe { turns.run(queue, &strengths) }
    }
}

/// Whether a delta is that of a rotation that has kernels.
fn turns_here(queue: &Queue, float: Float, op: &Op) -> bool {
    matches!(op, Op::Rotate(op) if turn::fits(queue.gpu(), float, op))
}

/// Norms to compute, by kernel.
#[derive(Default)]
struct Norms {
    targets: Vec<Target>,
    terms: Vec<tables::Term>,
    strips: BTreeMap<String, Vec<Strip>>,
    norms: Vec<tables::Norm>,
    /// fp32 numbers of partial sums.
    partial: usize,
}

impl Norms {
    #[allow(clippy::too_many_arguments)]
    fn add(
        &mut self,
        part: Target,
        float: Float,
        axis: usize,
        taps: usize,
        magnitude: u64,
        inside: &[Draft],
        factors: &Factors,
        [gain, less]: [u64; 2],
    ) -> Result<()> {
        let none = |_, _| Err(Error::Backend("a decomposition holds what reads the weight".into()));
        let mut terms = inside.iter().map(|d| resolve(d, factors, &none)).collect::<Result<Vec<_>>>()?;
        terms
            .iter_mut()
            .zip(inside)
            .for_each(|(term, draft)| term.coefficient = draft.scale.unwrap_or(1.0) as f32);
        terms.sort_by_key(|term| !term.is_product());
        let products = terms.iter().filter(|t| t.is_product()).count() as u32;
        let kernel = match Variant::of(&part, &terms, reads_aligned(&part, float)) {
            Variant::Any => "squares_any".into(),
            Variant::Plain => format!("squares_{}_plain", tables::name(float)),
            Variant::Products | Variant::Whole | Variant::Full => format!("squares_{}", tables::name(float)),
        };
        let index = self.targets.len();
        let (tiles, stride) = match axis {
            0 => (part.columns.div_ceil(64), part.rows),
            _ => (part.rows.div_ceil(64), part.columns),
        };
        self.norms.push(tables::Norm {
            // Counted from the first for now.
            partial: self.partial as u64,
            magnitude,
            gain,
            less,
            count: if axis == 0 { part.rows } else { part.columns / taps.max(1) as u32 },
            parts: tiles,
            stride,
            taps: if axis == 0 { 1 } else { taps as u32 },
        });
        let target = Target {
            out: self.partial as u64,
            first: self.terms.len() as u32,
            count: terms.len() as u32,
            axis: axis as u32,
            products,
            ..part
        };
        self.partial += tiles as usize * stride as usize;
        self.strips.entry(kernel).or_default().extend(strips(index, &target, 64));
        self.targets.push(target);
        self.terms.extend(terms);
        Ok(())
    }

    fn run(mut self, queue: &Queue) -> Result<()> {
        if self.norms.is_empty() {
            return Ok(());
        }
        let partial = queue.alloc(4 * self.partial)?;
        let place = |at: u64| partial.ptr() + 4 * at;
        self.targets.iter_mut().for_each(|target| target.out = place(target.out));
        self.norms.iter_mut().for_each(|norm| norm.partial = place(norm.partial));
        let targets = queue.upload_new(Row::bytes(&self.targets))?;
        let terms = queue.upload_new(Row::bytes(&self.terms))?;
        for (kernel, strips) in &self.strips {
            let strips_on_device = queue.upload_new(Row::bytes(strips))?;
            let args = [Arg::from(&targets), Arg::from(&terms), Arg::from(&strips_on_device)];
            // SAFETY: the kernel's parameters in its order; weights of the host, and memory that lives until the stream has passed here.
            unsafe { queue.launch("squares", kernel, [strips.len() as u32, 1, 1], 128, 0, &args)? };
        }
        for norms in self.norms.chunks(65_535) {
            let widest = norms.iter().map(|norm| norm.count).max().unwrap_or(0);
            let table = queue.upload_new(Row::bytes(norms))?;
            let grid = [widest.div_ceil(32).clamp(1, 64), norms.len() as u32, 1];
            // SAFETY: as above.
            unsafe { queue.launch("squares", "gains", grid, 256, 0, &[Arg::from(&table)])? };
        }
        Ok(())
    }
}

/// Products W @ a1 to compute.
#[derive(Default)]
struct Rights {
    jobs: Vec<tables::Right>,
    tiles: Vec<tables::Tile>,
}

impl Rights {
    fn add(&mut self, job: tables::Right) {
        let rows_per_tile = match (job.plain, job.taps) {
            (1, _) => 128,
            (_, 1) => 64,
            _ => 16,
        };
        let count = (job.shift + job.rows).div_ceil(rows_per_tile) * job.ranks.div_ceil(2);
        let index = self.jobs.len() as u32;
        self.tiles.extend((0..count).map(|tile| tables::Tile { job: index, tile }));
        self.jobs.push(job);
    }

    fn run(self, queue: &Queue) -> Result<()> {
        if self.jobs.is_empty() {
            return Ok(());
        }
        let (jobs, tiles) =
            (queue.upload_new(Row::bytes(&self.jobs))?, queue.upload_new(Row::bytes(&self.tiles))?);
        let grid = [self.tiles.len() as u32, 1, 1];
        // SAFETY: the kernel's parameters in its order; weights of the host, and memory that lives until the stream has passed here.
        unsafe { queue.launch("right", "right", grid, 128, 0, &[Arg::from(&jobs), Arg::from(&tiles)]) }
    }
}

/// What an op that only the CPU knows adds to W, as bytes of fp32.
fn delta(queue: &Queue, job: &Work<'_>, op: &Op, region: &Region, strength: f64) -> Result<Vec<u8>> {
    let bytes = packed_region(queue, job, region)?;
    let host = Tensor::of_vec(bytes, job.base.dtype(), &region.shape)
        .ok_or_else(|| Error::Backend(format!("`{}`: a part of it could not be read", job.name)))?;
    let alone =
        Region { shape: region.shape.clone(), rows: 0..region.rows.len(), cols: 0..region.cols.len() };
    let term = Term { op, strength, slice: None };
    let values = whole::delta(job.name, &term, &Rows::of(&host, job.name)?, &alone)?;
    let values =
        values.ok_or_else(|| Error::Backend(format!("`{}`: {op:?} has no whole delta", job.name)))?;
    Ok(values.into_iter().flat_map(f32::to_le_bytes).collect())
}
