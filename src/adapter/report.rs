//! The load report: what became of every key of a file, as data and JSON. Nothing is dropped silently.

use super::Adapter;
use crate::merge::plan::Binding;
use serde_json::{json, Value};

/// One key of the file.
#[derive(Clone, Debug)]
pub struct KeyState {
    /// As the file spells it.
    pub key: String,
    /// The module that it belongs to, if its suffix is known.
    pub module: Option<String>,
    /// What became of it when the file was read.
    pub status: KeyStatus,
}

/// What became of a key when the file was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyStatus {
    /// Its module can be applied.
    Readable,
    /// This version does not know it; the reason.
    Unsupported(String),
    /// It contradicts itself or its neighbours; the reason.
    Malformed(String),
}

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
            let mut entry = json!({
                "module": m.name,
                "spelling": m.dialect.name(),
                "algorithm": m.algorithm.name(),
                "rank": m.algorithm.rank(),
                "alpha": m.algorithm.alpha(),
                "dtype": tensors.first().map(|(_, t)| t.dtype().to_string()),
                "bytes": tensors.iter().map(|(_, t)| t.byte_len()).sum::<usize>(),
            });
            if let Some(binding) = binding {
                let (target, slice) = binding.target(i).unzip();
                entry["target"] = json!(target);
                if let Some(s) = slice.flatten() {
                    entry["slice"] = json!({"axis": s.axis, "start": s.start, "length": s.len});
                }
            }
            entry
        })
        .collect();
    let mut report = json!({
        "file": adapter.path().display().to_string(),
        "metadata": adapter.metadata(),
        "summary": {"keys": adapter.keys().len(), "modules": modules.len()},
        "modules": modules,
        "keys": keys,
    });
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
        (KeyStatus::Readable, Some(binding), Some(module)) => match binding.problem(module) {
            None => (Status::Matched, None),
            Some(crate::merge::plan::Problem::Unmatched { nearest }) => {
                (Status::Unmatched, nearest.as_deref().map(|n| ("nearest", n)))
            }
            Some(crate::merge::plan::Problem::Misfit { why }) => (Status::Malformed, Some(("reason", why))),
        },
        _ => (Status::Readable, None),
    }
}
