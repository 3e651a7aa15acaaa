//! Terms of a weight as rows of the kernels' table.

use super::derived::Derived;
use super::factors::{Factors, Key, Wanted};
use super::tables::{self, Kind, Layout, Pair};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::merge::ops::{Decompose, LowRank, Op, Region};
use crate::merge::Work;
use crate::view::Tensor;

/// A row before its factors have addresses.
#[derive(Clone, Debug, Default)]
pub(super) struct Draft {
    pub row: tables::Term,
    /// a, b, a2, b2
    pub factors: [Option<Key>; 4],
    /// What makes a row's numbers on the device: the index in [`Drafts::derived`] and which of its results.
    pub a: Option<(usize, usize)>,
    pub gain: Option<(usize, usize)>,
    /// The row's coefficient is this times the term's strength; `None`: 1, the strength is in the row's numbers already.
    pub scale: Option<f64>,
    /// Index of the term.
    pub term: usize,
}

/// The rows of one weight, what has to be computed from it before, and the factors of all of it.
#[derive(Default)]
pub(super) struct Drafts {
    pub rows: Vec<Draft>,
    pub derived: Vec<Derived>,
    pub wanted: Vec<Wanted>,
}

impl Drafts {
    /// All that a job adds, products first.
    pub fn of(job: &Work<'_>) -> Result<Self> {
        let (rows, columns) = matrix(job.base.shape());
        let mut own = Drafts::default();
        for (i, term) in job.terms.iter().enumerate().filter(|(_, term)| term.strength != 0.0) {
            let region = Region::of(job.name, job.base.shape(), term.slice)?;
            let whole = region.rows == (0..rows) && region.cols == (0..columns);
            own.add(job.name, term.op, (i, term.strength), &region, whole)?;
        }
        own.rows.sort_by_key(|draft| !draft.row.is_product());
        Ok(own)
    }

    /// Asks for a factor; says under which key it will be.
    pub fn want(&mut self, wanted: Wanted) -> Key {
        let key = wanted.key;
        self.wanted.push(wanted);
        key
    }

    /// Adds what `op` does on `region` of a weight; `whole` when that is all of it.
    pub fn add(
        &mut self,
        name: &str,
        op: &Op,
        (term, strength): (usize, f64),
        region: &Region,
        whole: bool,
    ) -> Result<()> {
        let place = Draft {
            row: tables::Term {
                row: region.rows.start as u32,
                rows: region.rows.len() as u32,
                column: region.cols.start as u32,
                columns: region.cols.len() as u32,
                ..Default::default()
            },
            scale: Some(op.scale()),
            term,
            ..Draft::default()
        };
        let taps: usize = region.shape.iter().skip(2).product();
        let fits = |size: [usize; 2]| match size == [region.rows.len(), region.cols.len()] {
            true => Ok(()),
            false => Err(Error::Shape {
                tensor: name.to_owned(),
                what: "the factors do not fit".into(),
                expected: vec![region.rows.len(), region.cols.len()],
                got: size.to_vec(),
            }),
        };
        match op {
            Op::LowRank(LowRank { up, down, .. }) => {
                fits([up.shape()[0], down.shape()[1]])?;
                let draft = self.product(place, region, [(up, down)])?;
                self.rows.push(draft);
            }
            Op::Hadamard(op) => {
                let [(up1, down1), (up2, down2)] = &op.pairs;
                fits([up1.shape()[0], down1.shape()[1]])?;
                fits([up2.shape()[0], down2.shape()[1]])?;
                let draft = self.product(place, region, [(up1, down1), (up2, down2)])?;
                self.rows.push(draft);
            }
            Op::Kron(op) => {
                let (outer, inner) = (op.w1.shape(), op.w2.shape());
                fits([outer[0] * inner[0], outer[1] * inner[1]])?;
                let mut draft = place;
                draft.row.kind = Kind::Kron as u32;
                (draft.row.format, draft.row.format2) = (dtype(&op.w1)?, dtype(&op.w2)?);
                draft.row.inner_rows = inner[0] as u32;
                draft.row.inner_columns = inner[1] as u32;
                draft.row.outer_columns = outer[1] as u32;
                draft.row.plain = u32::from(whole && inner[1] % 8 == 0 && wide(&op.w2));
                let pair = [&op.w1, &op.w2].map(|w| Some(self.want(Wanted::plain(w))));
                draft.factors = [pair[0], pair[1], None, None];
                self.rows.push(draft);
            }
            Op::Dense(op) => {
                fits([op.diff.shape()[0], op.diff.shape()[1]])?;
                let draft = self.elements(place, Kind::Dense, &op.diff, whole && wide(&op.diff))?;
                self.rows.push(draft);
            }
            Op::Replace(op) => {
                fits([op.value.shape()[0], op.value.shape()[1]])?;
                let draft = self.elements(place, Kind::Replace, &op.value, false)?;
                self.rows.push(draft);
            }
            Op::Scale(op) => {
                let rows = op.axis == 0;
                let kind = if rows { Kind::ScaleRows } else { Kind::ScaleColumns };
                let times = if rows { 1 } else { taps };
                fits(if rows {
                    [op.v.count(), region.cols.len()]
                } else {
                    [region.rows.len(), op.v.count() * taps]
                })?;
                let mut draft = place;
                draft.row.kind = kind as u32;
                draft.row.plain = u32::from(whole);
                draft.factors[0] = Some(self.want(Wanted::repeated(&op.v, times)));
                self.rows.push(draft);
            }
            Op::RightLowRank(op) => {
                fits([region.rows.len(), op.a1.shape()[0] * taps])?;
                fits([region.rows.len(), op.a2.shape()[1] * taps])?;
                let index = self.derived.len();
                let derived = Derived::right(op, region, taps, self)?;
                self.derived.push(derived);
                let mut draft = place;
                draft.row.kind = Kind::LowRank as u32;
                // W @ a1 is split.
                let pair = Pair::of(Float::F32, Float::require(op.a2.dtype(), "a factor")?);
                draft.row.format = pair as u32;
                draft.row.ranks = (taps * op.a1.shape()[1].div_ceil(16)) as u32;
                draft.a = Some((index, 0));
                let down = Wanted::fragments(&op.a2, Layout::Down, pair.down(), region.cols.start);
                draft.factors[1] = Some(self.want(down.for_taps(taps)));
                self.rows.push(draft);
            }
            Op::Decompose(op) => self.decompose(name, op, place, region, taps, whole)?,
            Op::Rotate(_) | Op::Principal(_) => {
                let index = self.derived.len();
                // A rotation that interpolates is not linear in its strength.
                let fixed = bends(op);
                let derived = Derived::delta(op, region, fixed.then_some(strength), self);
                self.derived.push(derived);
                let mut draft = Draft { scale: (!fixed).then_some(1.0), ..place };
                draft.row.kind = Kind::Dense as u32;
                draft.row.plain = u32::from(whole);
                draft.row.format = tables::dtype(Float::F32);
                draft.a = Some((index, 0));
                self.rows.push(draft);
            }
        }
        Ok(())
    }

    /// `s * (V o f - W)` with `V = W + inside`, f the magnitude over V's norm: `s * f o inside + s * (f - 1) o W`. f does not depend on s.
    fn decompose(
        &mut self,
        name: &str,
        op: &Decompose,
        place: Draft,
        region: &Region,
        taps: usize,
        whole: bool,
    ) -> Result<()> {
        let count = if op.axis == 0 { region.rows.len() } else { region.cols.len() / taps.max(1) };
        if op.magnitude.count() != count {
            return Err(Error::Shape {
                tensor: name.to_owned(),
                what: "a magnitude does not fit".into(),
                expected: vec![count],
                got: vec![op.magnitude.count()],
            });
        }
        // The norms are those of the region alone, so its terms are placed anew there.
        let alone =
            Region { shape: region.shape.clone(), rows: 0..region.rows.len(), cols: 0..region.cols.len() };
        let mut inside = Drafts::default();
        for inner in &op.inside {
            if inner.reads_weight() {
                return Err(Error::Backend(format!(
                    "`{name}`: {inner:?} cannot stand inside a decomposition"
                )));
            }
            inside.add(name, inner, (place.term, 1.0), &alone, true)?;
        }
        let index = self.derived.len();
        let first = self.rows.len();
        for inner in &op.inside {
            self.add(name, inner, (place.term, 1.0), region, whole)?;
        }
        for row in &mut self.rows[first..] {
            row.gain = Some((index, 0));
            row.row.gain_axis = op.axis as u32;
            // Only products take their gain in registers.
            row.row.plain = 0;
        }
        self.wanted.append(&mut inside.wanted);
        let derived = Derived::norm(op, region, taps, inside.rows, self);
        self.derived.push(derived);
        let mut rest = place;
        rest.row.kind = if op.axis == 0 { Kind::ScaleRows as u32 } else { Kind::ScaleColumns as u32 };
        rest.row.plain = u32::from(whole);
        rest.a = Some((index, 1));
        self.rows.push(rest);
        Ok(())
    }

    fn product<const N: usize>(
        &mut self,
        mut draft: Draft,
        region: &Region,
        pairs: [(&Tensor, &Tensor); N],
    ) -> Result<Draft> {
        for (i, (up, down)) in pairs.into_iter().enumerate() {
            let of = |t: &Tensor| Float::require(t.dtype(), "a factor");
            let pair = Pair::of(of(up)?, of(down)?);
            let ranks = up.shape()[1].div_ceil(16) as u32;
            let up = Wanted::fragments(up, Layout::Up, pair.up(), region.rows.start);
            let down = Wanted::fragments(down, Layout::Down, pair.down(), region.cols.start);
            draft.factors[2 * i] = Some(self.want(up));
            draft.factors[2 * i + 1] = Some(self.want(down));
            match i {
                0 => (draft.row.format, draft.row.ranks) = (pair as u32, ranks),
                _ => (draft.row.format2, draft.row.ranks2) = (pair as u32, ranks),
            }
        }
        draft.row.kind = if N == 1 { Kind::LowRank as u32 } else { Kind::Hadamard as u32 };
        Ok(draft)
    }

    fn elements(&mut self, mut draft: Draft, kind: Kind, matrix: &Tensor, plain: bool) -> Result<Draft> {
        draft.row.kind = kind as u32;
        draft.row.format = dtype(matrix)?;
        draft.row.plain = u32::from(plain);
        draft.factors[0] = Some(self.want(Wanted::plain(matrix)));
        Ok(draft)
    }
}

/// Whether what an op does is not its strength times something.
pub(super) fn bends(op: &Op) -> bool {
    matches!(op, Op::Rotate(op) if op.interpolate)
}

/// Rows and columns of a weight of this shape.
pub(super) fn matrix(shape: &[usize]) -> (usize, usize) {
    (shape.first().copied().unwrap_or(1), shape.iter().skip(1).product())
}

fn dtype(tensor: &Tensor) -> Result<u32> {
    Ok(tables::dtype(Float::require(tensor.dtype(), "a factor")?))
}

/// Whether eight of its numbers fill 16 bytes or more.
fn wide(tensor: &Tensor) -> bool {
    Float::of(tensor.dtype()).is_some_and(|float| float.size() >= 2)
}

/// Fills in the addresses.
pub(super) fn resolve(
    draft: &Draft,
    factors: &Factors,
    derived: &dyn Fn(usize, usize) -> Result<u64>,
) -> Result<tables::Term> {
    let mut row = draft.row;
    let slots = [&mut row.a, &mut row.b, &mut row.a2, &mut row.b2];
    for (slot, key) in slots.into_iter().zip(&draft.factors) {
        if let Some(key) = key {
            *slot = factors.address(key)?;
        }
    }
    if let Some((index, which)) = draft.a {
        row.a = derived(index, which)?;
    }
    if let Some((index, which)) = draft.gain {
        row.gain = derived(index, which)?;
    }
    row.carry = 1.0;
    Ok(row)
}
