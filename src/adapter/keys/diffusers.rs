//! The spellings that diffusers wrote before it rested on PEFT: `X.lora.up.weight` on the U-Net, `X.lora_linear_layer.up.weight` on
//! text encoders, and attention processors (`attn1.processor.to_q_lora.up.weight`).

use super::is_flattened;

/// What stands between module and tensor. The last one belongs to attention processors, which spell `to_out.0` as `to_out`.
const INFIXES: &[&str] = &[".lora", ".lora_linear_layer", "_lora"];

const TAILS: &[(&str, &str)] =
    &[("lora_up.weight", ".up.weight"), ("lora_down.weight", ".down.weight"), ("alpha", ".alpha")];

/// XLabs' Flux LoRAs have their factors in the processor itself: there is no layer behind it to be named, and `names` knows the processors'.
const XLABS: &[&str] = &["qkv_lora", "proj_lora", "qkv_lora1", "proj_lora1", "qkv_lora2", "proj_lora2"];

fn is_xlabs(module: &str) -> bool {
    module.rsplit_once(".processor.").is_some_and(|(_, leaf)| XLABS.contains(&leaf))
}

/// Module and slot of a key of XLabs'.
pub(super) fn split_xlabs(key: &str) -> Option<(&str, &'static str)> {
    let (slot, module) = TAILS.iter().find_map(|(slot, tail)| Some((*slot, key.strip_suffix(tail)?)))?;
    is_xlabs(module).then_some((module, slot))
}

/// Module, slot, and whether the module is spelled the processors' way.
pub(super) fn split(key: &str) -> Option<(&str, &'static str, bool)> {
    let (slot, rest) = TAILS.iter().find_map(|(slot, tail)| Some((*slot, key.strip_suffix(tail)?)))?;
    let (infix, module) = INFIXES.iter().find_map(|infix| Some((*infix, rest.strip_suffix(infix)?)))?;
    (!module.is_empty() && !module.ends_with('.')).then_some((module, slot, infix == "_lora"))
}

pub(super) fn join(module: &str, slot: &str) -> Option<String> {
    let (_, tail) = TAILS.iter().find(|(s, _)| *s == slot)?;
    if is_flattened(module) {
        return None;
    }
    Some(match slot {
        "alpha" => format!("{module}{tail}"),
        _ if is_xlabs(module) => format!("{module}{tail}"),
        _ if module.starts_with("text_encoder") => format!("{module}.lora_linear_layer{tail}"),
        _ => format!("{module}.lora{tail}"),
    })
}
