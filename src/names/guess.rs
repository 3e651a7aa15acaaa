//! Which family a model or an adapter is of, told by its names and shapes, and the evidence for it in one clause.

use super::family::{tables, Mark, Reading, Table, Words};
use super::{scope, sd_unet, without_weight};
use std::cmp::Reverse;

/// A family and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guess {
    /// As users say it: `SDXL`, `Flux.1`.
    pub family: &'static str,
    /// One clause: a name and what about it tells.
    pub reason: String,
}

/// Families whose adapters may be meant for each other.
const RELATED: &[&[&str]] = &[&["Flux.1", "Chroma"], &["Anima", "Cosmos-Predict2"]];

/// Whether an adapter of family `a` may be meant for a host of family `b`.
pub fn related(a: &str, b: &str) -> bool {
    a == b || RELATED.iter().any(|group| group.contains(&a) && group.contains(&b))
}

/// A module of the diffusion model.
#[derive(Clone)]
pub(super) struct Module<'a> {
    /// As given.
    pub name: &'a str,
    /// Without prefix.
    pub path: &'a str,
    pub words: Words<'a>,
    pub shape: &'a [usize],
}

impl<'a> Module<'a> {
    pub fn new(name: &'a str, path: &'a str, shape: &'a [usize]) -> Self {
        Module { name, path, words: Words::of(path), shape }
    }
}

/// The family of an adapter, or of a model, from its modules' names and the shapes of the weights that they change (`[out, in,
/// kernel…]`; empty when unknown). `None` when nothing tells, or two families fit alike.
pub fn guess(modules: &[(&str, &[usize])]) -> Option<Guess> {
    let modules: Vec<_> = modules
        .iter()
        .filter_map(|&(name, shape)| {
            let place = scope::classify(without_weight(name));
            place.is_of_unet().then(|| Module::new(name, place.rest, shape))
        })
        .collect();
    guess_of(&modules)
}

pub(super) fn guess_of(modules: &[Module<'_>]) -> Option<Guess> {
    let mut verdicts: Vec<Verdict> = tables().iter().filter_map(|table| judge(table, modules)).collect();
    verdicts.retain(|v| 2 * v.read >= modules.len());
    verdicts.extend(sd_unet::judge(modules));
    // The sort is stable: of equals the first in the list stands first.
    verdicts.sort_by_key(Verdict::weight);
    let best = verdicts.first()?;
    let rivals = verdicts.iter().filter(|v| v.weight() == best.weight());
    let alone = rivals.into_iter().all(|v| related(v.guess.family, best.guess.family));
    alone.then(|| best.guess.clone())
}

/// The tables that read most of a model's names; all of them when they read equally many, as a few names do not tell families apart.
pub(super) fn best_tables(modules: &[Module<'_>]) -> Vec<&'static Table> {
    let read = |t: &Table| modules.iter().filter(|m| t.read(&m.words).is_some()).count();
    let counts: Vec<_> = tables().iter().map(|table| (read(table), table)).collect();
    let most = counts.iter().map(|(n, _)| *n).max().filter(|&n| n > 0);
    counts.into_iter().filter(|(n, _)| Some(*n) == most).map(|(_, table)| table).collect()
}

/// What a family's marks say of some modules, when none speaks against it.
pub(super) struct Verdict {
    pub guess: Guess,
    /// Names that the family has.
    pub read: usize,
    /// Marks that speak for it. A size that fits does not: it only fails to speak against.
    pub votes: usize,
}

impl Verdict {
    fn weight(&self) -> Reverse<(usize, usize)> {
        Reverse((self.read, self.votes))
    }
}

fn judge(table: &Table, modules: &[Module<'_>]) -> Option<Verdict> {
    let known: Vec<_> =
        modules.iter().filter_map(|module| Some((module, table.read(&module.words)?))).collect();
    let mut evidence = Vec::new();
    let mut votes = 0;
    for mark in table.family.marks {
        let found = weigh(mark, &known).ok()?;
        votes += usize::from(found.is_some() && matches!(mark, Mark::Has(_) | Mark::Blocks(..)));
        evidence.extend(found);
    }
    let (first, _) = known.first()?;
    let reason = evidence.into_iter().next().unwrap_or_else(|| format!("`{}` is a name of its", first.name));
    let guess = Guess { family: table.family.name, reason };
    Some(Verdict { guess, read: known.len(), votes })
}

/// Speaks against the family.
struct Against;

/// The evidence in favour, if there is any.
fn weigh(mark: &Mark, known: &[(&Module<'_>, Reading<'_>)]) -> Result<Option<String>, Against> {
    let of = |pattern| known.iter().filter(move |(_, r)| r.weight == pattern && r.tail.is_empty());
    // Every weight with a known shape has to pass; the first is the evidence.
    let sized = |pattern, fits: &dyn Fn(usize, usize) -> bool| {
        let mut found = None;
        for (module, reading) in of(pattern) {
            let &[rows, columns, ..] = module.shape else { continue };
            let (count, shares) = reading.span(None).map_or((1, 1), |span| span.size());
            if !fits(rows.saturating_mul(shares) / count.max(1), columns) {
                return Err(Against);
            }
            found.get_or_insert_with(|| format!("`{}` is {:?}", module.name, module.shape));
        }
        Ok(found)
    };
    match *mark {
        Mark::Has(pattern) => Ok(of(pattern).next().map(|(m, _)| format!("it has `{}`", m.name))),
        Mark::Lacks(pattern) if of(pattern).next().is_some() => Err(Against),
        Mark::Lacks(_) => Ok(None),
        Mark::Columns(pattern, sizes) => sized(pattern, &|_, columns| sizes.contains(&columns)),
        Mark::Ratio(pattern, above, below) => sized(pattern, &|rows, columns| {
            rows.checked_mul(below).is_some_and(|product| Some(product) == columns.checked_mul(above))
        }),
        Mark::Blocks(beginning, depths) => {
            let numbered = known.iter().filter(|(_, r)| r.weight.starts_with(beginning));
            let last = numbered.filter_map(|(m, r)| Some((r.first_number()?.checked_add(1)?, m.name)));
            match (last.max(), depths.iter().max()) {
                (Some((blocks, _)), Some(&most)) if blocks > most => Err(Against),
                (Some((blocks, name)), _) if depths.contains(&blocks) => {
                    Ok(Some(format!("`{name}` is in the last of {blocks} such blocks")))
                }
                _ => Ok(None),
            }
        }
    }
}
