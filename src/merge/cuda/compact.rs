//! Merging in place without copies: weights of 16 bits keep aside what rounding lost of them, a quarter of their size, and come back exactly, since what
//! was added is computed again bit for bit (`kernels/compact.cu`).

use super::launch::{self, Shape, Variant};
use super::lower::{self, Drafts};
use super::tables::{self, Kind, Row, Target, Term};
use super::{aligned, identity, plain_target, side_by_side, Kept};
use crate::cuda::{Arg, Buffer, Queue};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::merge::ops::Op;
use crate::merge::Work;
use crate::view::View;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes that are kept of 16 rows and 64 columns.
const UNIT: usize = 512;
/// Bytes of a slot of the pool: all of a unit.
const SLOT: usize = 2048;

/// How a weight is at the start of a pass, and what shall become of it: `Mode` of the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Fresh = 0,
    Change = 1,
    Restore = 2,
}

/// Which units a pass does: `Pool::units` of the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Units {
    All = 0,
    Pending = 1,
    Others = 2,
}

/// What is kept of the weights of one device that are merged in place.
#[derive(Default)]
pub struct Compact {
    /// By the weight's address.
    weights: HashMap<u64, State>,
    /// Slots for units of which more is lost than fits: so many, of which so many are taken.
    pool: Option<Buffer>,
    slots: u32,
    taken: u32,
    /// Of the last pass, which the next one may be like.
    launches: Option<Launches>,
}

struct State {
    /// `out` is where its units are.
    target: Target,
    float: Float,
    /// What was added, by their coefficients; nothing: the weight is pristine.
    rows: Vec<Term>,
    /// What makes their coefficients: times a strength, of which term.
    sources: Vec<(Option<f64>, usize)>,
    /// The ops of the terms that were added, as long as those are sure to exist.
    ops: Vec<[u64; 4]>,
    /// The memory of the factors in `rows`, and of the units.
    factors: Vec<Arc<Buffer>>,
    _units: Arc<Buffer>,
}

/// A weight in a pass. Its terms have the new strength in their coefficient and the old one in their carry.
struct Item {
    target: Target,
    float: Float,
    rows: Vec<Term>,
    sources: Vec<(Option<f64>, usize)>,
    mode: Mode,
}

impl Item {
    /// A weight that shall have its base back, to which these rows were added at these strengths.
    fn restoring(target: Target, float: Float, rows: &[Term], strength: fn(&Term) -> f32) -> Self {
        let rows = rows.iter().map(|row| Term { carry: strength(row), ..*row }).collect();
        Item { target, float, rows, sources: Vec::new(), mode: Mode::Restore }
    }

    /// Whether there is a faster kernel for what is added.
    fn is_one_product(&self) -> bool {
        let [term] = &self.rows[..] else { return false };
        let whole = term.rows == self.target.rows && term.columns == self.target.columns;
        whole && term.kind == Kind::LowRank as u32 && !term.is_split()
    }
}

/// What depends on the weights of a pass, and on whether each is [`Item::is_one_product`].
struct Launches {
    of: Vec<(u64, bool)>,
    launches: Vec<Launch>,
}

struct Launch {
    shape: Shape,
    strips: Buffer,
    count: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Pool {
    slots: u64,
    wanted: u64,
    size: u32,
    units: u32,
}

/// What tells the terms of a job from others, but for their strengths.
fn ops<'a>(job: &'a Work<'a>) -> impl Iterator<Item = [u64; 4]> + 'a {
    job.terms.iter().filter(|term| term.strength != 0.0).map(identity)
}

/// Whether a job's weight can be merged in place with these terms: 16 bits, rows that the fast kernels take, and nothing that reads the weight.
fn fits(job: &Work<'_>) -> Result<bool> {
    let half = Float::of(job.out.dtype()).filter(|float| float.size() == 2);
    let Some(float) = half.filter(|_| side_by_side(job.out)) else { return Ok(false) };
    let adds = |op: &Op| matches!(op, Op::LowRank(_) | Op::Hadamard(_) | Op::Kron(_) | Op::Dense(_));
    if !job.terms.iter().all(|term| term.strength == 0.0 || adds(term.op)) {
        return Ok(false);
    }
    let rows: Vec<Term> = Drafts::of(job)?.rows.iter().map(|draft| draft.row).collect();
    let target = plain_target(job.out, job.out, float);
    Ok(Variant::of(&target, &rows, aligned(&target, float)) != Variant::Any)
}

/// Whether they are the same but for their strengths.
fn same_terms(a: &[Term], b: &[Term]) -> bool {
    let still = |row: &Term| [Term { coefficient: 0.0, carry: 0.0, ..*row }];
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Row::bytes(&still(a)) == Row::bytes(&still(b)))
}

impl Compact {
    /// Whether a weight is merged in place.
    pub fn holds(&self, weight: &View) -> bool {
        self.weights.get(&(weight.data() as u64)).is_some_and(|state| !state.rows.is_empty())
    }

    /// How many weights are, and the bytes that are kept for them.
    pub fn size(&self) -> (usize, usize) {
        let held = self.weights.values().filter(|state| !state.rows.is_empty());
        (
            held.count(),
            self.weights.values().map(|state| units(&state.target)).sum::<usize>()
                + self.slots as usize * SLOT,
        )
    }

    /// Whether a job's weight can be merged in place with these terms.
    pub fn takes(&self, job: &Work<'_>) -> Result<bool> {
        Ok(self.knows(job).is_some() || fits(job)?)
    }

    /// The weight's state, if it has these terms already, at whatever strengths.
    fn knows(&self, job: &Work<'_>) -> Option<&State> {
        let state = self.weights.get(&(job.out.data() as u64))?;
        (!state.ops.is_empty() && state.ops.iter().copied().eq(ops(job))).then_some(state)
    }

    /// Ops may be others from here on, at the same addresses.
    pub fn forget_ops(&mut self) {
        self.weights.values_mut().for_each(|state| state.ops.clear());
    }

    /// Brings weights to these terms, which [`Self::takes`] has approved. Waits for the stream, to hear whether all that is lost had room.
    pub fn merge(&mut self, queue: &Queue, jobs: &[Work<'_>], kept: &mut Kept) -> Result<()> {
        let unknown = |job: &Work<'_>| self.knows(job).is_none().then(|| Drafts::of(job)).transpose();
        let mut drafts = jobs.iter().map(unknown).collect::<Result<Vec<_>>>()?;
        let wanted = drafts.iter_mut().flatten().flat_map(|own| std::mem::take(&mut own.wanted));
        kept.factors.load(queue, wanted)?;
        let none = |_, _| Err(Error::Backend("a term reads a weight that is merged in place".into()));
        let mut items = Vec::with_capacity(jobs.len());
        for (job, own) in jobs.iter().zip(&drafts) {
            let (rows, sources): (Vec<Term>, Vec<_>) = match (own, self.knows(job)) {
                (None, Some(state)) => (state.rows.clone(), state.sources.clone()),
                (own, _) => own
                    .iter()
                    .flat_map(|own| &own.rows)
                    .map(|draft| {
                        Ok((lower::resolve(draft, &kept.factors, &none)?, (draft.scale, draft.term)))
                    })
                    .collect::<Result<Vec<_>>>()?
                    .into_iter()
                    .unzip(),
            };
            let float = Float::require(job.out.dtype(), job.name)?;
            let target = plain_target(job.out, job.out, float);
            let mut item = Item { target, float, rows, sources, mode: Mode::Fresh };
            for (row, &(scale, term)) in item.rows.iter_mut().zip(&item.sources) {
                row.coefficient = super::coefficient(job, scale, term)?;
            }
            items.push(item);
        }
        // What other terms were added to becomes pristine first.
        let differs = |item: &Item| {
            self.weights.get(&item.target.base).is_some_and(|state| !same_terms(&state.rows, &item.rows))
        };
        let unknown = items.iter().zip(&drafts).filter(|(_, own)| own.is_some());
        let others: Vec<u64> =
            unknown.filter(|(item, _)| differs(item)).map(|(item, _)| item.target.base).collect();
        self.give_back(queue, &others)?;
        self.make_room(queue, &items)?;
        for item in &mut items {
            let Some(state) = self.weights.get(&item.target.base) else { continue };
            item.target.out = state.target.out;
            if !state.rows.is_empty() {
                item.mode = Mode::Change;
                item.rows.iter_mut().zip(&state.rows).for_each(|(new, old)| new.carry = old.coefficient);
            }
        }
        self.pass(queue, &items)?;
        for ((item, job), own) in items.into_iter().zip(jobs).zip(&drafts) {
            let Some(state) = self.weights.get_mut(&item.target.base) else { continue };
            state.rows = item.rows;
            if own.is_some() {
                (state.sources, state.ops) = (item.sources, ops(job).collect());
                state.factors = kept.factors.memory().to_vec();
            }
        }
        Ok(())
    }

    /// Gives weights their base back.
    pub fn restore(&mut self, queue: &Queue, weights: &[&View]) -> Result<()> {
        let addresses: Vec<u64> = weights.iter().map(|weight| weight.data() as u64).collect();
        self.give_back(queue, &addresses)
    }

    fn give_back(&mut self, queue: &Queue, weights: &[u64]) -> Result<()> {
        let held = |address: &u64| self.weights.get(address).filter(|state| !state.rows.is_empty());
        let items: Vec<Item> = weights
            .iter()
            .filter_map(held)
            .map(|state| Item::restoring(state.target, state.float, &state.rows, |row| row.coefficient))
            .collect();
        self.run(queue, &items, Units::All)?;
        self.forget(&items);
        Ok(())
    }

    /// They are pristine.
    fn forget(&mut self, items: &[Item]) {
        for item in items {
            if let Some(state) = self.weights.get_mut(&item.target.base) {
                state.rows.clear();
                state.ops.clear();
                state.factors.clear();
            }
        }
    }

    /// Units for weights that have none.
    fn make_room(&mut self, queue: &Queue, items: &[Item]) -> Result<()> {
        let new: Vec<&Item> =
            items.iter().filter(|item| !self.weights.contains_key(&item.target.base)).collect();
        let total: usize = new.iter().map(|item| units(&item.target)).sum();
        let memory = Arc::new(queue.alloc_large(total)?);
        // SAFETY: all of the buffer, which lives until the stream has passed here.
        unsafe { queue.zero(memory.ptr(), total)? };
        let mut at = memory.ptr();
        for item in new {
            let target = Target { out: at, ..item.target };
            at += units(&target) as u64;
            let state = State {
                target,
                float: item.float,
                rows: Vec::new(),
                sources: Vec::new(),
                ops: Vec::new(),
                factors: Vec::new(),
                _units: memory.clone(),
            };
            self.weights.insert(target.base, state);
        }
        Ok(())
    }

    /// One pass over weights, and further ones over what had no room in it.
    fn pass(&mut self, queue: &Queue, items: &[Item]) -> Result<()> {
        let mut units = Units::All;
        loop {
            let wanted = self.run(queue, items, units)?;
            self.taken = wanted.min(self.slots);
            if wanted <= self.slots {
                return Ok(());
            }
            if let Err(e) = self.grow(queue, wanted) {
                self.undo(queue, items)?;
                return Err(e);
            }
            units = Units::Pending;
        }
    }

    /// Makes the pool as large as was wanted, and a little larger.
    fn grow(&mut self, queue: &Queue, wanted: u32) -> Result<()> {
        let slots = wanted.saturating_add(wanted / 4);
        let pool = queue.alloc_large(slots as usize * SLOT)?;
        if let Some(old) = &self.pool {
            // SAFETY: two buffers, both at least that long.
            unsafe { queue.copy(old.ptr(), pool.ptr(), self.taken as usize * SLOT)? };
        }
        (self.pool, self.slots) = (Some(pool), slots);
        Ok(())
    }

    /// Makes weights pristine of which some units were merged and others, for want of room, were not.
    fn undo(&mut self, queue: &Queue, items: &[Item]) -> Result<()> {
        let back = |item: &Item, strength| Item::restoring(item.target, item.float, &item.rows, strength);
        let merged: Vec<Item> = items.iter().map(|item| back(item, |row| row.coefficient)).collect();
        let changing = items.iter().filter(|item| item.mode == Mode::Change);
        let pending: Vec<Item> = changing.map(|item| back(item, |row| row.carry)).collect();
        self.run(queue, &merged, Units::Others)?;
        self.run(queue, &pending, Units::Pending)?;
        self.forget(items);
        Ok(())
    }

    /// Launches. How many slots of the pool are wanted then; waits for the stream to say so, unless nothing can be.
    fn run(&mut self, queue: &Queue, items: &[Item], units: Units) -> Result<u32> {
        if items.is_empty() {
            return Ok(self.taken);
        }
        let (mut targets, mut terms) = (Vec::with_capacity(items.len()), Vec::new());
        let (mut products, mut fragments) = (0, 0);
        for item in items {
            let own = item.rows.iter().filter(|row| row.is_product());
            let (count, size) = own.fold((0, 0), |(n, size), row| (n + 1, size + row.fragments()));
            (products, fragments) = (products.max(count), fragments.max(size));
            targets.push(Target {
                first: terms.len() as u32,
                count: item.rows.len() as u32,
                products: count as u32,
                axis: item.mode as u32,
                ..item.target
            });
            terms.extend_from_slice(&item.rows);
        }
        self.lay_out(queue, items)?;
        let wanted = queue.upload_new(&self.taken.to_le_bytes())?;
        let pool = Pool {
            slots: self.pool.as_ref().map_or(0, Buffer::ptr),
            wanted: wanted.ptr(),
            size: self.slots,
            units: units as u32,
        };
        let (targets, terms) =
            (queue.upload_new(Row::bytes(&targets))?, queue.upload_new(Row::bytes(&terms))?);
        for Launch { shape, strips, count } in self.launches.iter().flat_map(|last| &last.launches) {
            let (shared, room) = shape.shared(queue.gpu(), products, fragments, false);
            let args = [
                Arg::from(&targets),
                Arg::from(&terms),
                Arg::from(strips),
                Arg::from(room as u32),
                Arg::plain(&pool),
            ];
            // SAFETY: the kernel's parameters in its order. The host keeps its weights until the stream has passed here; units, factors and
            // slots are kept by `self`.
            unsafe { queue.launch("compact", shape.kernel, [*count, 1, 1], shape.threads, shared, &args)? };
        }
        if items.iter().all(|item| item.mode == Mode::Restore) {
            return Ok(self.taken);
        }
        let mut bytes = [0u8; 4];
        // SAFETY: the counter that was uploaded above.
        unsafe { queue.download(wanted.ptr(), &mut bytes)? };
        Ok(u32::from_le_bytes(bytes))
    }

    /// The strips of these weights, which the last pass may have left.
    fn lay_out(&mut self, queue: &Queue, items: &[Item]) -> Result<()> {
        let of: Vec<_> = items.iter().map(|item| (item.target.base, item.is_one_product())).collect();
        if self.launches.as_ref().is_some_and(|last| last.of == of) {
            return Ok(());
        }
        let mut launches = Vec::new();
        for (float, one) in
            [(Float::BF16, true), (Float::BF16, false), (Float::F16, true), (Float::F16, false)]
        {
            let own = |&(_, item): &(usize, &Item)| item.float == float && item.is_one_product() == one;
            let own = items.iter().enumerate().filter(own);
            let strips: Vec<tables::Strip> =
                own.flat_map(|(i, item)| launch::strips(i, &item.target, 64)).collect();
            let (shape, count) = (launch::compact(float, one), strips.len() as u32);
            launches.push(Launch { shape, strips: queue.upload_new(Row::bytes(&strips))?, count });
        }
        self.launches = Some(Launches { of, launches });
        Ok(())
    }
}

/// Bytes of a weight's units.
fn units(target: &Target) -> usize {
    UNIT * (target.rows as usize).div_ceil(16) * (target.columns as usize).div_ceil(64)
}
