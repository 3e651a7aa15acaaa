//! Which weight of a model an adapter's module means.
//!
//! One model has many names for a weight: its checkpoint's, diffusers', and either of them flattened by kohya behind a prefix. The
//! host gives its own names once; [`Index`] lists every spelling each of them answers to, so that looking up a module is a few
//! hash lookups. `scope` knows the prefixes, `sd_unet` and `clip` translate between layouts.

pub mod clip;
pub mod scope;
pub mod sd_unet;

use crate::view::Slice;
use scope::SLOTS;
use std::collections::hash_map::{Entry, HashMap};

/// Which of the user's two strengths applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The diffusion model, U-Net or transformer.
    Unet,
    /// A text encoder.
    TextEncoder,
}

/// The part that `module` changes on `target`: what the module's prefix says, else what the target's says, else the diffusion model.
pub fn part_of(module: &str, target: &str) -> Part {
    let of = |name| scope::classify(name).scope.part();
    of(module).or_else(|| of(target)).unwrap_or(Part::Unet)
}

/// Where a spelling leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hit {
    One(usize, Option<Slice>),
    /// Two targets share the spelling.
    Many,
}

impl Hit {
    fn and(self, other: Hit) -> Hit {
        if self == other {
            self
        } else {
            Hit::Many
        }
    }

    fn one(self) -> Option<(usize, Option<Slice>)> {
        match self {
            Hit::One(target, slice) => Some((target, slice)),
            Hit::Many => None,
        }
    }
}

type Spellings = HashMap<String, Hit>;

fn put(spellings: &mut Spellings, name: String, hit: Hit) {
    match spellings.entry(name) {
        Entry::Vacant(free) => drop(free.insert(hit)),
        Entry::Occupied(mut taken) => {
            let both = taken.get().and(hit);
            taken.insert(both);
        }
    }
}

fn flatten(name: &str) -> String {
    name.replace('.', "_")
}

/// One table read either way: `path` with a first part that `pairs` translate, what follows kept.
fn rename<'t>(path: &str, mut pairs: impl Iterator<Item = (&'t str, &'t str)>) -> Option<String> {
    pairs.find_map(|(from, to)| {
        let tail = path.strip_prefix(from)?;
        (tail.is_empty() || tail.starts_with('.')).then(|| format!("{to}{tail}"))
    })
}

/// A table's rows read from right to left.
fn reversed<'t>(table: &'t [(&'t str, &'t str)]) -> impl Iterator<Item = (&'t str, &'t str)> {
    table.iter().map(|&(a, b)| (b, a))
}

fn without_weight(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
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
        put(&mut self.flat, flatten(name), hit);
        put(&mut self.dotted, name.to_owned(), hit);
        self.known.push(name.to_owned());
    }

    fn add_family(&mut self, name: &str, hit: Hit) {
        put(&mut self.family, flatten(name), hit);
        self.known.push(name.to_owned());
    }

    fn find(&self, name: &str, flat: &str) -> Option<Hit> {
        self.dotted.get(name).or_else(|| self.flat.get(flat)).or_else(|| self.family.get(flat)).copied()
    }
}

/// Every spelling of the weights of one host, built once from the host's names.
pub struct Index {
    exact: Spellings,
    aliases: HashMap<String, (usize, Option<Slice>)>,
    aliases_flat: Spellings,
    models: [Names; SLOTS],
}

impl Index {
    /// `targets`: each weight's name, with or without `.weight`, and the number of its rows (a fused q/k/v is split in three).
    /// Targets are counted from 0 in this order.
    pub fn new<S: AsRef<str>>(targets: &[(S, usize)]) -> Self {
        let places: Vec<_> =
            targets.iter().map(|(name, _)| scope::classify(without_weight(name.as_ref()))).collect();
        let layout = sd_unet::Layout::of(places.iter().filter(|p| p.scope.is_unet()).map(|p| p.rest));
        let present = scope::Present::of(places.iter().map(|p| p.scope));

        let mut exact = Spellings::new();
        let mut models: [Names; SLOTS] = Default::default();
        for (target, (place, (name, rows))) in places.iter().zip(targets).enumerate() {
            let full = without_weight(name.as_ref());
            let hit = Hit::One(target, None);
            put(&mut exact, full.to_owned(), hit);
            if clip::is_transposed(full) {
                continue;
            }
            let family = if place.scope.is_unet() {
                let other = layout.to_diffusers(place.rest).or_else(|| layout.to_checkpoint(place.rest));
                other.map(|name| (name, hit)).into_iter().collect()
            } else {
                family_of_encoder(place.rest, target, *rows)
            };
            for slot in place.scope.slots_of_target(&present) {
                let names = &mut models[slot];
                names.add(place.rest, hit);
                if full != place.rest {
                    put(&mut names.flat, flatten(full), hit);
                }
                for (name, hit) in &family {
                    names.add_family(name, *hit);
                }
            }
        }
        Index { exact, aliases: HashMap::new(), aliases_flat: Spellings::new(), models }
    }

    /// Adds a spelling of the host's own; it wins over everything built in, also when a module writes `_` for its dots. `target` is an
    /// index into the list given to [`Index::new`]. The same spelling again replaces the former.
    pub fn add_alias(&mut self, spelling: &str, target: usize, slice: Option<Slice>) {
        let spelling = without_weight(spelling);
        if self.aliases.insert(spelling.to_owned(), (target, slice)).is_some() {
            self.aliases_flat.remove(&flatten(spelling));
        }
        put(&mut self.aliases_flat, flatten(spelling), Hit::One(target, slice));
    }

    /// The target that `module` means, and the piece of it when the host fuses what the adapter keeps apart.
    ///
    /// In this order: the host's aliases, the host's names as they are, the host's names behind known prefixes (with dots, then
    /// flattened), other layouts' names. A module that names its model (`lora_te2_…`, `unet.…`) reaches no other model; a flattened
    /// name that two targets share reaches neither.
    pub fn resolve(&self, module: &str) -> Option<(usize, Option<Slice>)> {
        let module = without_weight(module);
        if let Some(&found) = self.aliases.get(module) {
            return Some(found);
        }
        match (self.aliases_flat.get(&flatten(module)), self.exact.get(module)) {
            (Some(Hit::One(target, slice)), _) => return Some((*target, *slice)),
            (_, Some(hit)) => return hit.one(),
            (Some(Hit::Many), None) => return None,
            (None, None) => {}
        }
        let place = scope::classify(module);
        let flat = flatten(place.rest);
        place
            .scope
            .slots_of_module()
            .filter_map(|slot| self.models[slot].find(place.rest, &flat))
            .reduce(Hit::and)
            .and_then(Hit::one)
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
            (name, Hit::One(target, slice))
        })
        .collect()
}

/// Bytes that two names share at the beginning and, behind that, at the end; `.` and `_` count as one.
fn shared(a: &str, b: &str) -> usize {
    let same = |(x, y): &(u8, u8)| x == y || matches!((x, y), (b'.', b'_') | (b'_', b'.'));
    let head = a.bytes().zip(b.bytes()).take_while(same).count();
    let (a, b) = (&a.as_bytes()[head..], &b.as_bytes()[head..]);
    head + a.iter().rev().copied().zip(b.iter().rev().copied()).take_while(same).count()
}

#[cfg(test)]
mod lists;
#[cfg(test)]
mod tests;
