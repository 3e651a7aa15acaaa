//! Adapters x targets -> work: which module changes which weight, and what keeps the others from doing so.

use super::ops::{Op, Region};
use crate::adapter::Adapter;
use crate::error::{Error, Result};
use crate::names::{part_of, Index, Part};
use crate::view::Slice;
use std::collections::HashMap;

/// One module that found its weight.
#[derive(Debug)]
pub struct Bound {
    /// Index into [`Adapter::modules`].
    pub module: usize,
    /// Index of the target.
    pub target: usize,
    /// The part of the target, if not all of it.
    pub slice: Option<Slice>,
    /// What it does there.
    pub op: Op,
    /// Which of the user's strengths applies.
    pub part: Part,
}

/// Why a readable module is not applied.
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

/// An adapter matched with a set of targets.
#[derive(Debug, Default)]
pub struct Binding {
    /// The modules that found their weights.
    pub bound: Vec<Bound>,
    problems: HashMap<String, Problem>,
    found: HashMap<usize, (String, Option<Slice>)>,
}

impl Binding {
    /// Matches every module of `adapter` with `targets` (name and shape). An adapter of which nothing matches is an error.
    pub fn new(adapter: &Adapter, index: &Index, targets: &[(&str, &[usize])]) -> Result<Self> {
        let mut binding = Binding::default();
        for (i, module) in adapter.modules().iter().enumerate() {
            let Some((target, slice)) = index.resolve(&module.name) else {
                let nearest = index.nearest(&module.name);
                binding.problems.insert(module.name.clone(), Problem::Unmatched { nearest });
                continue;
            };
            let (name, shape) = targets[target];
            let lowered = Region::of(name, shape, slice)
                .and_then(|region| module.algorithm.lower(&module.name, &region.shape));
            match lowered {
                Ok(_) if binding.bound.iter().any(|b| b.target == target && b.slice == slice) => {
                    let why =
                        format!("another module of this file changes the same weight (target `{name}`)");
                    binding.problems.insert(module.name.clone(), Problem::Misfit { why });
                }
                Ok(op) => {
                    let part = part_of(&module.name, name);
                    binding.bound.push(Bound { module: i, target, slice, op, part });
                    binding.found.insert(i, (name.to_owned(), slice));
                }
                Err(e) => {
                    binding.problems.insert(
                        module.name.clone(),
                        Problem::Misfit { why: format!("{e} (target `{name}`)") },
                    );
                }
            }
        }
        if binding.bound.is_empty() {
            return Err(binding.nothing_matches(adapter, targets));
        }
        Ok(binding)
    }

    /// Why this module is not applied; `None` when it is.
    pub fn problem(&self, module: &str) -> Option<&Problem> {
        self.problems.get(module)
    }

    /// The target that module `i` changes, and the part of it.
    pub fn target(&self, module: usize) -> Option<(&str, Option<Slice>)> {
        self.found.get(&module).map(|(name, slice)| (name.as_str(), *slice))
    }

    fn nothing_matches(&self, adapter: &Adapter, targets: &[(&str, &[usize])]) -> Error {
        let count = adapter.modules().len();
        let first = adapter.modules().first().map_or("", |m| m.name.as_str());
        let (what, hint) = match self.problems.get(first) {
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
fn glob(pattern: &str, text: &str) -> bool {
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
