//! The load report: what became of every key of a file, as data and JSON. Nothing is dropped silently.

pub mod facts;
pub mod text;

use crate::adapter::{keys, Adapter, KeyState, KeyStatus};
use crate::algo;
use crate::merge::plan::Binding;
use crate::names::Guess;
use crate::view::{Slice, Tensor};
use serde_json::{json, Value};

/// The report of an adapter, and of its match with a model when `binding` is given.
pub fn json(adapter: &Adapter, binding: Option<&Binding>) -> Value {
    let mut counts = [0usize; 5];
    let keys: Vec<Value> = adapter
        .keys()
        .iter()
        .map(|k| {
            let (status, detail) = state(k, binding);
            counts[status as usize] += 1;
            let mut entry = json!({"key": k.key, "status": status.name()});
            if let Some((name, text)) = detail {
                entry[name] = json!(text);
            }
            entry
        })
        .collect();
    let modules: Vec<Value> = adapter
        .modules()
        .iter()
        .enumerate()
        .map(|(i, m)| {
            let tensors = m.algorithm.tensors();
            let own = tensors.iter().filter(|(slot, _)| !algo::is_shared(slot));
            let mut entry = json!({
                "module": m.name,
                "spelling": m.dialect.name(),
                "algorithm": m.algorithm.name(),
                "rank": m.algorithm.rank(),
                "alpha": m.algorithm.alpha(),
                "dtype": dtypes(&tensors),
                "shape": m.algorithm.shape(),
                "bytes": own.map(|(_, t)| t.byte_len()).sum::<usize>(),
            });
            if let Some(note) = m.algorithm.note() {
                entry["note"] = json!(note);
            }
            if let Some(binding) = binding {
                let slice = |s: &Slice| json!({"axis": s.axis, "start": s.start, "length": s.len});
                match binding.places(i, false) {
                    [] => entry["target"] = Value::Null,
                    [(target, part)] => {
                        entry["target"] = json!(target);
                        part.iter().for_each(|s| entry["slice"] = slice(s));
                    }
                    several => {
                        entry["target"] = several.iter().map(|(target, _)| json!(target)).collect();
                    }
                }
                match binding.places(i, true) {
                    [] => {}
                    [(target, part)] => {
                        entry["bias"] = json!(target);
                        part.iter().for_each(|s| entry["bias_slice"] = slice(s));
                    }
                    several => entry["bias"] = several.iter().map(|(target, _)| json!(target)).collect(),
                }
            }
            entry
        })
        .collect();
    let mut report = json!({
        "file": adapter.path().display().to_string(),
        "metadata": adapter.metadata(),
        "facts": facts::json(adapter.metadata()),
        "family": adapter.family().map(family),
        "summary": {"keys": adapter.keys().len(), "modules": modules.len()},
        "modules": modules,
        "keys": keys,
    });
    if let Some(model) = binding.and_then(|b| b.model.as_ref()) {
        report["model"] = family(model);
    }
    for status in Status::ALL {
        if (status == Status::Readable) == binding.is_none()
            || counts[status as usize] > 0
            || status > Status::Unmatched
        {
            report["summary"][status.name()] = json!(counts[status as usize]);
        }
    }
    report
}

fn family(guess: &Guess) -> Value {
    json!({"name": guess.family, "reason": guess.reason})
}

/// Whether the key is of a tensor that changes its layer's bias.
fn is_bias(key: &str) -> bool {
    keys::split(key).is_some_and(|split| algo::is_bias(split.slot))
}

/// "F16", or "F16, F32" where a module's tensors differ. Single numbers do not count: an alpha is f32 in many a file of half precision,
/// and where it came from beside the file.
fn dtypes(tensors: &[(&str, &Tensor)]) -> Option<String> {
    let all = || tensors.iter().map(|(_, tensor)| tensor);
    let numbers = all().all(|tensor| tensor.count() == 1);
    let mut names: Vec<String> =
        all().filter(|t| numbers || t.count() != 1).map(|t| t.dtype().to_string()).collect();
    let mut seen = std::collections::HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    (!names.is_empty()).then(|| names.join(", "))
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Status {
    Readable,
    Matched,
    Unmatched,
    Unsupported,
    Malformed,
}

impl Status {
    const ALL: [Status; 5] =
        [Status::Readable, Status::Matched, Status::Unmatched, Status::Unsupported, Status::Malformed];

    fn name(self) -> &'static str {
        ["readable", "matched", "unmatched", "unsupported", "malformed"][self as usize]
    }
}

fn state<'a>(key: &'a KeyState, binding: Option<&'a Binding>) -> (Status, Option<(&'static str, &'a str)>) {
    match (&key.status, binding, &key.module) {
        (KeyStatus::Unsupported(why), ..) => (Status::Unsupported, Some(("reason", why))),
        (KeyStatus::Malformed(why), ..) => (Status::Malformed, Some(("reason", why))),
        (KeyStatus::Readable, Some(binding), Some(module)) => {
            match binding.problem(module, is_bias(&key.key)) {
                None => (Status::Matched, None),
                Some(crate::merge::plan::Problem::Unmatched { nearest }) => {
                    (Status::Unmatched, nearest.as_deref().map(|n| ("nearest", n)))
                }
                Some(crate::merge::plan::Problem::Misfit { why }) => {
                    (Status::Malformed, Some(("reason", why)))
                }
            }
        }
        // Shared by modules that found their weights.
        (KeyStatus::Readable, Some(_), None) => (Status::Matched, None),
        (KeyStatus::Readable, None, _) => (Status::Readable, None),
    }
}
