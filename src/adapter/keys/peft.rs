//! The PEFT dialect: `base_model.model.<module>.lora_A[.<adapter>][.weight]`; behind a pipeline component (`unet.`, `transformer.`)
//! the root is left out, which is how diffusers saves since it rests on PEFT.

use super::{component, find, is_flattened, PEFT_ROOT, SLOTS};

/// Module and slot of a key in words that only PEFT uses; words it shares with kohya are told by their root in `super::split`.
pub(super) fn split(key: &str) -> Option<(&str, &'static str)> {
    let mut end = key.len();
    // The word is followed by at most an adapter's name and the parameter's.
    for _ in 0..3 {
        let start = key[..end].rfind('.')?;
        let (word, tail) = (&key[start + 1..end], &key[end..]);
        if let Some(slot) = slot_of(word, tail) {
            return (start > 0).then_some((&key[..start], slot));
        }
        end = start;
    }
    None
}

/// What stands for a module in front of a tensor that belongs to the whole file.
pub(super) const FILE: &str = "base_model";

fn slot_of(word: &str, tail: &str) -> Option<&'static str> {
    let parameter = if tail.ends_with(".bias") { "bias" } else { "weight" };
    // Two parts after the word are an adapter's name and a parameter; anything else is not PEFT's.
    if tail.matches('.').count() > 1 && !tail.ends_with(".bias") && !tail.ends_with(".weight") {
        return None;
    }
    SLOTS.iter().find_map(|slot| {
        let peft = slot.peft.filter(|&p| p != slot.name || !is_shared(p))?;
        let fits = match peft.split_once('.') {
            Some((w, p)) => w == word && p == parameter,
            None => peft == word && parameter == "weight",
        };
        fits.then_some(slot.name)
    })
}

/// Words that PEFT took over from LyCORIS.
fn is_shared(word: &str) -> bool {
    word == "alpha" || word.starts_with("hada_") || word.starts_with("lokr_")
}

pub(super) fn join(module: &str, slot: &str) -> Option<String> {
    let word = find(slot)?.peft?;
    if module.is_empty() {
        return Some(format!("{FILE}.{word}"));
    }
    if is_flattened(module) {
        return None;
    }
    let root = if component(module).is_empty() { PEFT_ROOT } else { "" };
    Some(format!("{root}{module}.{word}"))
}
