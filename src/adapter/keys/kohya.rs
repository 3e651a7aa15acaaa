//! The kohya dialect: `<module>.<slot>`, the slot spelled canonically; sd-scripts, LyCORIS and ComfyUI's own files.

use super::{is_flattened, SLOTS};

/// Words so common that they are an adapter's only behind a flattened module name; a checkpoint is full of them.
const COMMON: &[&str] = &["weight", "bias", "scale"];

pub(super) fn split(key: &str) -> Option<(&str, &'static str)> {
    SLOTS
        .iter()
        .filter_map(|slot| Some((key.strip_suffix(slot.name)?.strip_suffix('.')?, slot.name)))
        // `a1.weight` ends in `weight`: the longest suffix is meant.
        .max_by_key(|(_, slot)| slot.len())
        .filter(|(module, slot)| !module.is_empty() && (!COMMON.contains(slot) || is_flattened(module)))
}

pub(super) fn join(module: &str, slot: &str) -> String {
    format!("{module}.{slot}")
}
