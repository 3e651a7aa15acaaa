//! Adapters x targets -> work: which module changes which weight, and what keeps the others from doing so.

use super::ops::{Op, Region, Term};
use crate::adapter::{Adapter, Module};
use crate::algo::is_bias;
use crate::error::{Error, Result};
use crate::names::{part_of, related, Guess, Index, Part, Piece};
use crate::view::Slice;
use std::collections::HashMap;

/// One module on one place of one weight.
#[derive(Debug)]
pub struct Bound {
    /// Index into [`Adapter::modules`].
    pub module: usize,
    /// Index of the target.
    pub target: usize,
    /// The part of the target, if not all of it.
    pub slice: Option<Slice>,
    /// What it does there, all on the pristine weight.
    pub ops: Vec<Op>,
    /// Which of the user's strengths applies.
    pub part: Part,
}

impl Bound {
    /// The work of this module at the user's strength.
    pub fn terms(&self, strength: f64) -> impl Iterator<Item = Term<'_>> {
        self.ops.iter().map(move |op| Term { op, strength, slice: self.slice })
    }
}

/// Why a readable module, or its bias, is not applied.
#[derive(Debug)]
pub enum Problem {
    /// No target has its name.
    Unmatched {
        /// The closest name that a target has.
        nearest: Option<String>,
    },
    /// The target that has its name has another shape.
    Misfit {
        /// Both shapes.
        why: String,
    },
}

/// A place in the host: the target's name, and the part of it if not all.
pub type Place = (String, Option<Slice>);

/// An adapter matched with a set of targets.
#[derive(Debug, Default)]
pub struct Binding {
    /// What found its weight.
    pub bound: Vec<Bound>,
    /// By module; the second is about its bias.
    problems: HashMap<String, [Option<Problem>; 2]>,
    /// By module, and whether it is its bias.
    found: HashMap<(usize, bool), Vec<Place>>,
    grown: HashMap<usize, Vec<usize>>,
    may_grow: bool,
    /// The family of the targets, as far as it can be told.
    pub model: Option<Guess>,
}

/// What a binding may do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// The weights can be given another shape.
    pub may_grow: bool,
    /// An adapter of another family is bound as far as it fits.
    pub other_families: bool,
}

fn other_family(adapter: &Adapter, own: &Guess, model: &Guess) -> Error {
    Error::Key {
        key: adapter.modules().first().map_or_else(String::new, |m| m.name.clone()),
        file: Some(adapter.path().to_owned()),
        what: format!(
            "the adapter is made for {} ({}), the model is {} ({})",
            own.family, own.reason, model.family, model.reason
        ),
        hint: "choose one made for this model, or allow other families to apply what fits".into(),
    }
}

impl Binding {
    /// Matches every module of `adapter` with `targets` (name and shape). An adapter of which nothing matches is an error.
    /// So is one that is made for another family of models, unless all of it fits or the rules allow it.
    pub fn new(adapter: &Adapter, index: &Index, targets: &[(&str, &[usize])], rules: Rules) -> Result<Self> {
        let model = index.family().cloned();
        let mut binding = Binding { may_grow: rules.may_grow, model, ..Binding::default() };
        for (i, module) in adapter.modules().iter().enumerate() {
            let changes = module.algorithm.changes();
            if changes.weight {
                if let Err(problem) = binding.bind(i, module, false, index, targets) {
                    binding.problems.entry(module.name.clone()).or_default()[0] = Some(problem);
                }
            }
            if changes.bias {
                let own = module.algorithm.tensors().iter().any(|(slot, _)| is_bias(slot));
                match binding.bind(i, module, true, index, targets) {
                    Err(problem) if own => {
                        binding.problems.entry(module.name.clone()).or_default()[1] = Some(problem);
                    }
                    // A layer without a bias has nothing to scale.
                    _ => {}
                }
            }
        }
        if let (Some(own), Some(model), false) = (adapter.family(), &binding.model, rules.other_families) {
            if !binding.problems.is_empty() && !related(own.family, model.family) {
                return Err(other_family(adapter, own, model));
            }
        }
        if binding.bound.is_empty() {
            return Err(binding.nothing_matches(adapter, targets));
        }
        Ok(binding)
    }

    /// Finds the places of one module's weight or bias; all or none.
    fn bind(
        &mut self,
        i: usize,
        module: &Module,
        bias: bool,
        index: &Index,
        targets: &[(&str, &[usize])],
    ) -> std::result::Result<(), Problem> {
        let name = if bias { format!("{}.bias", module.name) } else { module.name.clone() };
        let pieces =
            index.resolve(&name).ok_or_else(|| Problem::Unmatched { nearest: index.nearest(&name) })?;
        let (mut bound, mut grown_targets) = (Vec::with_capacity(pieces.len()), Vec::new());
        for piece in pieces {
            let (target, shape) = targets[piece.target];
            let misfit = |why: String| Problem::Misfit { why: format!("{why} (target `{target}`)") };
            if self.bound.iter().any(|b| b.target == piece.target && b.slice == piece.slice) {
                return Err(misfit("another module of this file changes the same weight".into()));
            }
            let grown =
                module.algorithm.grown().filter(|to| !bias && piece.slice.is_none() && grows(shape, to));
            if let Some(grown) = grown.filter(|_| !self.may_grow) {
                let why = format!(
                    "the weight must first grow from {shape:?} to {grown:?}, which only a checkpoint's can"
                );
                return Err(misfit(why));
            }
            let shape = grown.unwrap_or(shape);
            let ops = lower(module, bias, target, shape, &piece).map_err(|e| misfit(e.to_string()))?;
            if !ops.is_empty() {
                let part = part_of(&module.name, target);
                bound.push(Bound { module: i, target: piece.target, slice: piece.slice, ops, part });
            }
            if shape != targets[piece.target].1 {
                grown_targets.push((piece.target, shape.to_vec()));
            }
        }
        let places = bound.iter().map(|b| (targets[b.target].0.to_owned(), b.slice)).collect();
        self.found.insert((i, bias), places);
        self.bound.extend(bound);
        self.grown.extend(grown_targets);
        Ok(())
    }

    /// Why this module's weight (or with `bias` its bias) is not changed; `None` when it is.
    pub fn problem(&self, module: &str, bias: bool) -> Option<&Problem> {
        self.problems.get(module)?[usize::from(bias)].as_ref()
    }

    /// The places of the weight (or with `bias` of the bias) that module `i` changes.
    pub fn places(&self, module: usize, bias: bool) -> &[Place] {
        self.found.get(&(module, bias)).map_or(&[], |places| places)
    }

    /// The shape to which a target must grow before it is merged; `None` when it stays as it is.
    pub fn grown(&self, target: usize) -> Option<&[usize]> {
        self.grown.get(&target).map(|shape| &shape[..])
    }

    fn nothing_matches(&self, adapter: &Adapter, targets: &[(&str, &[usize])]) -> Error {
        let count = adapter.modules().len();
        let first = adapter.modules().first().map_or("", |m| m.name.as_str());
        let problem = self.problem(first, false).or(self.problem(first, true));
        let (what, hint) = match problem {
            Some(Problem::Misfit { why }) => (format!("none of {count} modules fits; the first: {why}"), ""),
            Some(Problem::Unmatched { nearest: Some(nearest) }) => (
                format!(
                    "none of {count} modules matches one of {} weights; the nearest name is `{nearest}`",
                    targets.len()
                ),
                "",
            ),
            _ => (format!("none of {count} modules matches one of {} weights", targets.len()), ""),
        };
        let hint = if hint.is_empty() { "is the adapter made for this model?" } else { hint };
        Error::Key { key: first.to_owned(), file: Some(adapter.path().to_owned()), what, hint: hint.into() }
    }
}

/// What a module does to one piece of the host.
fn lower(module: &Module, bias: bool, target: &str, shape: &[usize], piece: &Piece) -> Result<Vec<Op>> {
    let mut region = Region::of(target, shape, piece.slice)?;
    let lower = |shape: &[usize]| match bias {
        true => module.algorithm.lower_bias(&module.name, shape),
        false => module.algorithm.lower(&module.name, shape),
    };
    let Some(part) = piece.rows else { return lower(&region.shape) };
    // The module is made for a weight of which the target is these rows.
    let rows = region.shape.first().copied().unwrap_or(0);
    let total = rows.checked_mul(part.of).filter(|total| part.count > 0 && total % part.count == 0);
    let misfit = || Error::Shape {
        tensor: module.name.clone(),
        what: format!("the target cannot be {} of {} parts of the module's weight", part.count, part.of),
        expected: vec![part.count, part.of],
        got: shape.to_vec(),
    };
    let total = total.filter(|_| !region.shape.is_empty()).ok_or_else(misfit)? / part.count;
    region.shape[0] = total;
    let start = total / part.of * part.first;
    lower(&region.shape)?.iter().map(|op| op.rows(&module.name, &(start..start + rows))).collect()
}

/// Whether `to` is `from` with some axes longer.
fn grows(from: &[usize], to: &[usize]) -> bool {
    from.len() == to.len() && from.iter().zip(to).all(|(a, b)| a <= b) && from != to
}

/// The user's numbers for one adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Strengths {
    /// For the U-Net (or whatever denoises).
    pub unet: f64,
    /// For the text encoders.
    pub text_encoder: f64,
    /// For single modules: a name as the file spells it, `*` standing for any text; the last match wins over the two above.
    pub modules: Vec<(String, f64)>,
}

impl Strengths {
    /// The same everywhere.
    pub fn uniform(strength: f64) -> Self {
        Strengths { unet: strength, text_encoder: strength, modules: Vec::new() }
    }

    /// All numbers are finite.
    pub fn check(&self) -> Result<()> {
        let all = [self.unet, self.text_encoder].into_iter().chain(self.modules.iter().map(|(_, v)| *v));
        match all.into_iter().find(|v| !v.is_finite()) {
            None => Ok(()),
            Some(v) => {
                Err(Error::argument(format!("strength is {v}"), "pass a finite number; 1 is the usual one"))
            }
        }
    }

    /// The number for one module.
    pub fn of(&self, module: &str, part: Part) -> f64 {
        let own = self.modules.iter().rev().find(|(pattern, _)| glob(pattern, module)).map(|(_, v)| *v);
        own.unwrap_or(match part {
            Part::Unet => self.unet,
            Part::TextEncoder => self.text_encoder,
        })
    }
}

/// `*` stands for any text. Linear in the text: after a mismatch only the last star is tried again.
pub fn glob(pattern: &str, text: &str) -> bool {
    let mut pieces = pattern.split('*');
    let Some(mut rest) = pieces.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let pieces: Vec<&str> = pieces.collect();
    let Some((last, middle)) = pieces.split_last() else { return rest.is_empty() };
    for piece in middle {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_matching_pattern_wins() {
        let s = Strengths {
            unet: 1.0,
            text_encoder: 0.5,
            modules: vec![("*attn2*".into(), 0.2), ("lora_unet_mid*to_q".into(), -1.0)],
        };
        assert_eq!(s.of("lora_unet_down_attn1_to_q", Part::Unet), 1.0);
        assert_eq!(s.of("lora_te_x", Part::TextEncoder), 0.5);
        assert_eq!(s.of("lora_unet_down_attn2_to_q", Part::Unet), 0.2);
        assert_eq!(s.of("lora_unet_mid_attn2_to_q", Part::Unet), -1.0);
        assert!(Strengths::uniform(f64::NAN).check().is_err());
    }

    #[test]
    fn glob_takes_stars_anywhere() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("a", "a", true),
            ("a", "ab", false),
            ("*", "", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c", false),
            ("*aab", "aaab", true),
            ("a*a", "a", false),
        ] {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }
}
