//! Every spelling of a host's weights, and the look-up of an adapter's modules among them.

use super::family::{is_complete, Fraction, Reading, Span, Table};
use super::guess::{best_tables, guess_of, Guess, Module};
use super::scope::{self, SLOTS};
use super::words::{with_dots, UNET};
use super::{clip, family, flatten, sd_unet, without_weight};
use crate::view::Slice;
use std::collections::hash_map::{Entry, HashMap};

/// One place where a module, or a part of it, goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Index into the list given to [`Index::new`].
    pub target: usize,
    /// The part of the target; `None`: all of it.
    pub slice: Option<Slice>,
    /// The part of the module's rows (output channels); `None`: all of them.
    pub rows: Option<Fraction>,
}

impl Piece {
    fn whole(target: usize) -> Self {
        Piece { target, slice: None, rows: None }
    }
}

/// Where a spelling leads.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Hit {
    To(Vec<Piece>),
    /// It means two things.
    Many,
}

impl Hit {
    fn and(self, other: &Hit) -> Hit {
        if self == *other {
            self
        } else {
            Hit::Many
        }
    }

    fn pieces(&self) -> Option<Vec<Piece>> {
        match self {
            Hit::To(pieces) => Some(pieces.clone()),
            Hit::Many => None,
        }
    }
}

type Spellings = HashMap<String, Hit>;

fn put(spellings: &mut Spellings, name: String, hit: Hit) {
    match spellings.entry(name) {
        Entry::Vacant(free) => drop(free.insert(hit)),
        Entry::Occupied(mut taken) => {
            if *taken.get() != hit {
                taken.insert(Hit::Many);
            }
        }
    }
}

/// The spellings within one model of a pipeline, prefixes removed.
#[derive(Default)]
struct Names {
    /// The host's own names.
    dotted: Spellings,
    /// The same, flattened.
    flat: Spellings,
    /// Other layouts' names of the host's weights, flattened.
    family: Spellings,
    /// All of the above with dots, to search for neighbours.
    known: Vec<String>,
}

impl Names {
    fn add(&mut self, name: &str, hit: Hit) {
        put(&mut self.flat, flatten(name), hit.clone());
        put(&mut self.dotted, name.to_owned(), hit);
        self.known.push(name.to_owned());
    }

    fn add_family(&mut self, name: &str, hit: Hit) {
        put(&mut self.family, flatten(name), hit);
        self.known.push(name.to_owned());
    }

    fn find(&self, name: &str, flat: &str) -> Option<&Hit> {
        self.dotted.get(name).or_else(|| self.flat.get(flat)).or_else(|| self.family.get(flat))
    }
}

/// Every spelling of the weights of one host, built once from the host's names.
pub struct Index {
    exact: Spellings,
    aliases: HashMap<String, Piece>,
    aliases_flat: Spellings,
    models: [Names; SLOTS],
    family: Option<Guess>,
}

impl Index {
    /// `targets`: each weight's name, with or without `.weight`, and its shape. Targets are counted from 0 in this order.
    pub fn new<S: AsRef<str>, D: AsRef<[usize]>>(targets: &[(S, D)]) -> Self {
        Self::build(targets, false)
    }

    /// The same of the modules of an adapter, which are a part of its model's and may be flattened: how deep a U-Net's levels are is
    /// not told by those that happen to be there, and is taken from the published models.
    pub fn of_adapter<S: AsRef<str>, D: AsRef<[usize]>>(modules: &[(S, D)]) -> Self {
        Self::build(modules, true)
    }

    fn build<S: AsRef<str>, D: AsRef<[usize]>>(targets: &[(S, D)], partial: bool) -> Self {
        let places: Vec<_> =
            targets.iter().map(|(name, _)| scope::classify(without_weight(name.as_ref()))).collect();
        let in_unet = places.iter().zip(targets).enumerate().filter(|(_, (place, _))| place.scope.is_unet());
        let (numbers, modules): (Vec<usize>, Vec<Module<'_>>) = in_unet
            .map(|(i, (place, (name, shape)))| (i, Module::new(name.as_ref(), place.rest, shape.as_ref())))
            .unzip();
        let family = guess_of(&modules);
        let tables: Vec<&Table> = match &family {
            Some(guess) => family::table(guess.family).into_iter().collect(),
            None => best_tables(&modules),
        };
        let is_table = family.is_some() && !tables.is_empty();
        let found = || sd_unet::Layout::of(modules.iter().map(|m| m.path));
        let layout = match partial {
            true => family
                .as_ref()
                .and_then(|g| sd_unet::Layout::published(g.family))
                .unwrap_or_else(|| found().of_published_depth()),
            false => found(),
        };
        let present = scope::Present::of(places.iter().map(|p| p.scope));

        let mut exact = Spellings::new();
        let mut models: [Names; SLOTS] = Default::default();
        let mut apart: HashMap<(usize, String), [Option<usize>; 3]> = HashMap::new();
        for (target, (place, (name, shape))) in places.iter().zip(targets).enumerate() {
            let full = without_weight(name.as_ref());
            let hit = Hit::To(vec![Piece::whole(target)]);
            put(&mut exact, full.to_owned(), hit.clone());
            if clip::is_transposed(full) {
                continue;
            }
            let other = if place.scope.is_unet() && is_table {
                vec![]
            } else if place.scope.is_unet() {
                let path = if partial { with_dots(place.rest, UNET) } else { place.rest.to_owned() };
                let other = layout.to_diffusers(&path).or_else(|| layout.to_checkpoint(&path));
                other.map(|name| (name, hit.clone())).into_iter().collect()
            } else {
                family_of_encoder(place.rest, target, shape.as_ref().first().copied().unwrap_or(0))
            };
            for slot in place.scope.slots_of_target(&present) {
                let names = &mut models[slot];
                names.add(place.rest, hit.clone());
                if full != place.rest {
                    put(&mut names.flat, flatten(full), hit.clone());
                }
                for (name, hit) in &other {
                    names.add_family(name, hit.clone());
                }
                if let Some((fused, third)) = clip::fused(place.rest).filter(|_| !place.scope.is_unet()) {
                    let thirds = apart.entry((slot, fused)).or_default();
                    thirds[third.min(2)] = Some(target);
                }
            }
        }
        for ((slot, fused), thirds) in apart {
            let [Some(q), Some(k), Some(v)] = thirds else { continue };
            let pieces = [q, k, v].into_iter().enumerate().map(|(first, target)| {
                let rows = Some(Fraction { first, count: 1, of: 3 });
                Piece { target, slice: None, rows }
            });
            models[slot].add_family(&fused, Hit::To(pieces.collect()));
        }
        for table in tables {
            for (name, hit) in family_of_table(table, &numbers, &modules) {
                models[scope::UNET].add_family(&name, hit);
            }
        }
        Index { exact, aliases: HashMap::new(), aliases_flat: Spellings::new(), models, family }
    }

    /// The family of the host, when its names and shapes tell.
    pub fn family(&self) -> Option<&Guess> {
        self.family.as_ref()
    }

    /// Adds a spelling of the host's own; it wins over everything built in, also when a module writes `_` for its dots. `target` is an
    /// index into the list given to [`Index::new`]. The same spelling again replaces the former.
    pub fn add_alias(&mut self, spelling: &str, target: usize, slice: Option<Slice>) {
        let spelling = without_weight(spelling);
        let piece = Piece { target, slice, rows: None };
        if self.aliases.insert(spelling.to_owned(), piece).is_some() {
            self.aliases_flat.remove(&flatten(spelling));
        }
        put(&mut self.aliases_flat, flatten(spelling), Hit::To(vec![piece]));
    }

    /// Where `module` goes: one place, normally. A part of a target when the host fuses what the adapter keeps apart; several places when
    /// the adapter fuses what the host keeps apart, or has halves the other way round.
    ///
    /// In this order: the host's aliases, the host's names as they are, the host's names behind known prefixes (with dots, then
    /// flattened), other layouts' names. A module that names its model (`lora_te2_…`, `unet.…`) reaches no other model; a flattened
    /// name that two targets share reaches neither.
    pub fn resolve(&self, module: &str) -> Option<Vec<Piece>> {
        let module = without_weight(module);
        if let Some(&found) = self.aliases.get(module) {
            return Some(vec![found]);
        }
        match (self.aliases_flat.get(&flatten(module)), self.exact.get(module)) {
            (Some(hit @ Hit::To(_)), _) | (_, Some(hit)) => return hit.pieces(),
            (Some(Hit::Many), None) => return None,
            (None, None) => {}
        }
        let place = scope::classify(module);
        let flat = flatten(place.rest);
        place
            .scope
            .slots_of_module()
            .filter_map(|slot| self.models[slot].find(place.rest, &flat).cloned())
            .reduce(|one, other| one.and(&other))
            .and_then(|hit| hit.pieces())
    }

    /// The known spelling closest to `module`, written the way that `module` is; `None` when nothing agrees with at least half of it.
    ///
    /// Closest is who shares the longest beginning and end with it: linear in the number of targets, and right for the usual
    /// differences (another number, a renamed last part).
    pub fn nearest(&self, module: &str) -> Option<String> {
        let module = without_weight(module);
        let place = scope::classify(module);
        let prefix = &module[..module.len() - place.rest.len()];
        let inside = place
            .scope
            .slots_of_module()
            .flat_map(|slot| &self.models[slot].known)
            .map(|name| (name, prefix, place.rest));
        let whole = self.aliases.keys().map(|name| (name, "", module));
        let (score, _, prefix, name) = inside
            .chain(whole)
            .map(|(name, prefix, wanted)| {
                let score = prefix.len() + shared(name, wanted);
                (score, std::cmp::Reverse(name.len().abs_diff(wanted.len())), prefix, name)
            })
            // The alphabet settles what is left, so that the answer does not hang on the order of a hash map.
            .max_by(|a, b| (a.0, a.1, b.3).cmp(&(b.0, b.1, a.3)))?;
        let agrees = score > prefix.len() && 2 * (score - prefix.len()) >= module.len() - prefix.len();
        let name = if module.contains('.') { name.clone() } else { flatten(name) };
        agrees.then(|| format!("{prefix}{name}"))
    }
}

/// Other layouts' names of a text encoder's weight, with the rows they stand for.
fn family_of_encoder(path: &str, target: usize, rows: usize) -> Vec<(String, Hit)> {
    let third = rows / 3;
    clip::spellings(path)
        .into_iter()
        .filter(|(_, piece)| piece.is_none() || rows % 3 == 0)
        .map(|(name, piece)| {
            let slice = piece.map(|k| Slice { axis: 0, start: k * third, len: third });
            (name, Hit::To(vec![Piece { target, slice, rows: None }]))
        })
        .collect()
}

/// One of the host's weights that a family's table knows.
struct Known<'a> {
    target: usize,
    module: &'a Module<'a>,
    reading: Reading<'a>,
}

/// Every other spelling of the host's weights that a family's table knows, and the places it means: where the rows of the spelling and
/// those of the host's weights meet in the checkpoint's. A spelling of which the host lacks some rows is left out.
fn family_of_table(table: &Table, targets: &[usize], modules: &[Module<'_>]) -> Vec<(String, Hit)> {
    let known = targets
        .iter()
        .zip(modules)
        .filter_map(|(&target, module)| Some(Known { target, module, reading: table.read(&module.words)? }));
    let mut depths: HashMap<&str, usize> = HashMap::new();
    let mut by_path: HashMap<String, Vec<Known<'_>>> = HashMap::new();
    for weight in known {
        if let Some(blocks) = weight.reading.first_number().and_then(|n| n.checked_add(1)) {
            let depth = depths.entry(weight.reading.blocks()).or_default();
            *depth = blocks.max(*depth);
        }
        by_path.entry(weight.reading.path()).or_default().push(weight);
    }
    let mut found = Vec::new();
    for weights in by_path.values() {
        let Some(first) = weights.first() else { continue };
        let depth = depths.get(first.reading.blocks()).copied();
        for (spelling, span) in table.spellings(&first.reading, depth) {
            if !weights.iter().any(|weight| weight.module.path == spelling) {
                found.extend(pieces(span, weights, depth).map(|pieces| (spelling, Hit::To(pieces))));
            }
        }
    }
    found
}

/// Where the rows `span` of a checkpoint's weight lie in the targets that hold it; `None` when some are missing, or there twice.
fn pieces(span: Span, weights: &[Known<'_>], depth: Option<usize>) -> Option<Vec<Piece>> {
    let mut pieces = Vec::new();
    for weight in weights {
        for (ours, its) in span.meets(weight.reading.span(depth)?) {
            let slice = if its.is_whole() {
                None
            } else {
                let (start, len) = its.range(*weight.module.shape.first()?)?;
                Some(Slice { axis: 0, start, len })
            };
            let rows = (!ours.is_whole()).then_some(ours);
            pieces.push((ours, Piece { target: weight.target, slice, rows }));
        }
    }
    // In the order of the module's rows.
    pieces.sort_by(|(a, _), (b, _)| (a.first * b.of).cmp(&(b.first * a.of)));
    is_complete(pieces.iter().map(|(ours, _)| *ours))
        .then(|| pieces.into_iter().map(|(_, piece)| piece).collect())
}

/// Bytes that two names share at the beginning and, behind that, at the end; `.` and `_` count as one.
fn shared(a: &str, b: &str) -> usize {
    let same = |(x, y): &(u8, u8)| x == y || matches!((x, y), (b'.', b'_') | (b'_', b'.'));
    let head = a.bytes().zip(b.bytes()).take_while(same).count();
    let (a, b) = (&a.as_bytes()[head..], &b.as_bytes()[head..]);
    head + a.iter().rev().copied().zip(b.iter().rev().copied()).take_while(same).count()
}
