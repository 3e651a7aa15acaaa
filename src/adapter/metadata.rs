//! What stands beside the tensors: PEFT's configuration, which holds what its files lack (alphas, the kind of a rotation).

use crate::error::{Error, FileFault, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// A PEFT `adapter_config.json` (or diffusers' `lora_adapter_metadata`).
#[derive(Debug)]
pub struct PeftConfig {
    parts: Vec<Part>,
    /// The JSON itself.
    text: String,
}

/// One configured network; diffusers prefixes its fields with the component's name (`unet.`, `text_encoder.`).
#[derive(Debug)]
struct Part {
    prefix: String,
    /// Its fields, without the prefix.
    fields: Map<String, Value>,
    /// Alpha and rank, of the methods that have them.
    scale: Option<(f64, f64)>,
    alphas: Vec<(regex_lite::Regex, f64)>,
    ranks: Vec<(regex_lite::Regex, f64)>,
    rank_stabilised: bool,
}

/// Where diffusers keeps a configuration in a file's own metadata.
pub const INSIDE: &str = "lora_adapter_metadata";

/// More than any real configuration needs; keeps a hostile neighbour file from filling memory.
const LIMIT: u64 = 16 << 20;

impl PeftConfig {
    /// Reads `adapter_config.json` in the folder of `path`, if there is one.
    pub fn beside(path: &Path) -> Result<Option<Self>> {
        let config = path.with_file_name("adapter_config.json");
        let fault = |fault| Error::File { path: config.clone(), fault };
        match std::fs::metadata(&config) {
            Ok(meta) if meta.len() > LIMIT => {
                return Err(fault(FileFault::WrongKind {
                    why: format!("is {} bytes long; the limit is {LIMIT}", meta.len()),
                }))
            }
            Ok(_) => {}
            Err(_) => return Ok(None),
        }
        let text = std::fs::read_to_string(&config).map_err(|e| Error::io(&config, e))?;
        let json: Value = serde_json::from_str(&text)
            .map_err(|e| fault(FileFault::WrongKind { why: format!("is not JSON: {e}") }))?;
        let part = Part::read("", &json).map_err(|why| fault(FileFault::WrongKind { why }))?;
        Ok(part.map(|part| PeftConfig { parts: vec![part], text }))
    }

    /// Reads `lora_adapter_metadata` from a file's own metadata, as diffusers writes it.
    pub fn inside(file: &Path, metadata: &BTreeMap<String, String>) -> Result<Option<Self>> {
        let Some(text) = metadata.get(INSIDE) else { return Ok(None) };
        let bad = |why| Error::File { path: file.to_owned(), fault: FileFault::BadMetadata { why } };
        let json: Value =
            serde_json::from_str(text).map_err(|e| bad(format!("lora_adapter_metadata is not JSON: {e}")))?;
        let Some(map) = json.as_object() else { return Ok(None) };
        let mut parts = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for prefix in
            map.keys().filter_map(|key| key.strip_suffix("peft_type").or(key.strip_suffix("lora_alpha")))
        {
            if seen.insert(prefix) {
                if seen.len() > 64 {
                    return Err(bad("lora_adapter_metadata describes more than 64 networks".into()));
                }
                parts.extend(Part::read(prefix, &json).map_err(bad)?);
            }
        }
        Ok((!parts.is_empty()).then(|| PeftConfig { parts, text: text.clone() }))
    }

    /// The JSON that it was read from.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn part(&self, module: &str) -> Option<&Part> {
        self.parts.iter().find(|p| module.starts_with(&p.prefix))
    }

    /// A field of the configuration that a module was trained under.
    pub fn field(&self, module: &str, name: &str) -> Option<&Value> {
        self.part(module)?.fields.get(name).filter(|v| !v.is_null())
    }

    /// Alpha and rank of a module, as its patterns pick them.
    fn numbers(&self, module: &str) -> Option<(f64, f64, bool)> {
        let part = self.part(module)?;
        let (alpha, rank) = part.scale?;
        // Patterns are written for the names inside the component.
        let module = module.strip_prefix(&part.prefix).unwrap_or(module);
        let pick = |table: &[(regex_lite::Regex, f64)], default| {
            table.iter().find(|(pattern, _)| pattern.is_match(module)).map_or(default, |(_, v)| *v)
        };
        Some((pick(&part.alphas, alpha), pick(&part.ranks, rank), part.rank_stabilised))
    }

    /// The alpha of a module such that alpha / rank is the scale that PEFT uses.
    pub fn alpha(&self, module: &str) -> Option<f32> {
        let (alpha, rank, stabilised) = self.numbers(module)?;
        // Rank-stabilised LoRA scales by alpha / sqrt(rank): arXiv:2312.03732.
        Some(if stabilised { alpha * rank.sqrt() } else { alpha } as f32)
    }

    /// The scale itself, for modules whose tensors have no rank.
    pub fn scale(&self, module: &str) -> Option<f64> {
        let (alpha, rank, stabilised) = self.numbers(module)?;
        (rank > 0.0).then(|| alpha / if stabilised { rank.sqrt() } else { rank })
    }

    /// Whether the module scales its layer's input: (IA)^3's `feedforward_modules`, a pattern for the whole name or a list of endings.
    pub fn is_feedforward(&self, module: &str) -> Option<bool> {
        match self.field(module, "feedforward_modules")? {
            Value::String(pattern) => {
                Some(regex_lite::Regex::new(&format!("^(?:{pattern})$")).ok()?.is_match(module))
            }
            Value::Array(names) => {
                Some(names.iter().filter_map(Value::as_str).any(|name| module.ends_with(name)))
            }
            _ => None,
        }
    }
}

impl Part {
    /// `Ok(None)` when the configuration is of something that is no adapter.
    fn read(prefix: &str, json: &Value) -> Result<Option<Self>, String> {
        let own = json.as_object().into_iter().flatten();
        let own = own.filter_map(|(k, v)| Some((k.strip_prefix(prefix)?.to_owned(), v.clone())));
        let fields: Map<String, Value> = own.collect();
        let field = |name: &str| fields.get(name).filter(|v| !v.is_null());
        let alpha = ["lora_alpha", "alpha"].into_iter().find_map(|name| Some((name, field(name)?)));
        if alpha.is_none() && field("peft_type").is_none() {
            return Ok(None);
        }
        let number = |name: &str, v: &Value| {
            v.as_f64()
                .filter(|n| n.is_finite())
                .ok_or_else(|| format!("`{prefix}{name}` is {v}, not a number"))
        };
        let patterns = |name: &str| -> Result<Vec<_>, String> {
            let Some(table) = field(name).and_then(Value::as_object) else { return Ok(Vec::new()) };
            let entry = |(pattern, v): (&String, &Value)| {
                // PEFT matches a pattern at the end of the path, after the start or a dot.
                let regex = regex_lite::Regex::new(&format!(r"^(?:.*\.)?(?:{})$", pattern))
                    .map_err(|e| format!("`{prefix}{name}`: `{pattern}`: {e}"))?;
                Ok((regex, number(name, v)?))
            };
            table.iter().map(entry).collect()
        };
        let scale = match (alpha, field("r")) {
            (Some((name, alpha)), Some(rank)) => Some((number(name, alpha)?, number("r", rank)?)),
            _ => None,
        };
        let (alphas, ranks) = (patterns("alpha_pattern")?, patterns("rank_pattern")?);
        let rank_stabilised = field("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        Ok(Some(Part { prefix: prefix.to_owned(), scale, alphas, ranks, rank_stabilised, fields }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inside(text: &str) -> Result<Option<PeftConfig>> {
        PeftConfig::inside(Path::new("x"), &BTreeMap::from([("lora_adapter_metadata".into(), text.into())]))
    }

    #[test]
    fn alpha_follows_component_pattern_and_rank_stabilisation() {
        let config = inside(
            r#"{"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"^down.0.to_v": 3, "to_q": 2}, "unet.rank_pattern": {},
                "text_encoder.r": 16, "text_encoder.lora_alpha": 3, "text_encoder.use_rslora": true}"#,
        )
        .unwrap()
        .unwrap();
        assert_eq!(config.alpha("unet.down.0.to_k"), Some(8.0));
        assert_eq!(config.alpha("unet.down.0.to_q"), Some(2.0));
        assert_eq!(config.alpha("unet.down.0.not_to_q"), Some(8.0));
        assert_eq!(config.alpha("unet.down.0.to_v"), Some(3.0));
        assert_eq!(config.alpha("unet.up.down.0.to_v"), Some(8.0));
        assert_eq!(config.alpha("text_encoder.q_proj"), Some(12.0));
        assert_eq!(config.alpha("vae.q_proj"), None);
    }

    #[test]
    fn nonsense_is_an_error_with_the_field() {
        let text = inside(r#"{"r": 4, "lora_alpha": "much"}"#).unwrap_err().to_string();
        assert!(text.contains("lora_alpha") && text.contains("much"), "{text}");
        assert!(inside("{").is_err());
        assert!(inside("{}").unwrap().is_none());
    }
}
