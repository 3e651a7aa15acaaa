//! Which program wrote a file. Few say so outright; the others are known by keys that only they write.
//!
//! kohya_ss is not among them: it starts sd-scripts and leaves no mark of its own, so its files are sd-scripts' files.

use super::values::{cut, text};
use super::{Nested, Section};
use crate::report::facts::values::Source;
use serde_json::{json, Value};

/// Base versions that musubi-tuner trains and sd-scripts does not.
const MUSUBI_BASES: &[&str] = &[
    "hunyuan_video",
    "wan",
    "framepack",
    "flux_kontext",
    "flux_2",
    "qwen_image",
    "kandinsky",
    "z_image",
    "zimage",
];

/// `{name, evidence, version?}`: from a plain statement down to the weakest hint.
pub(super) fn tool(source: &Source, nested: &Nested) -> Option<Value> {
    let named = |name: &str, evidence: &str, version: Option<Value>| {
        let mut tool = Section::default();
        tool.put("name", Some(json!(name)));
        tool.put("evidence", Some(json!(evidence)));
        tool.put("version", version);
        tool.value()
    };
    let first = |keys: &[&'static str]| keys.iter().copied().find(|key| source.has(key));
    if let Some(key) = first(&["ot_revision", "ot_branch", "ot_config"]) {
        return named("OneTrainer", key, source.text(&["ot_revision"]));
    }
    if let Some(software) = &nested.software {
        if let Some(name) = software.get("name").and_then(text) {
            return named(name.as_str()?, "software", software.get("version").and_then(text));
        }
    }
    if let Some(name) = source.raw("software").filter(|name| !name.starts_with('{')) {
        return named(&cut(name), "software", None);
    }
    // sd-scripts writes `sd-scripts/<commit>`, LyCore `lycore/<version>`.
    const STATED: &str = "modelspec.implementation_version";
    if let Some((name, version)) =
        source.raw(STATED).and_then(|stated| stated.split_once('/')).filter(|(name, _)| !name.is_empty())
    {
        let name = if name == "lycore" { "LyCore" } else { name };
        return named(&cut(name), STATED, Some(json!(cut(version))).filter(|v| v != "unknown"));
    }
    if nested.progress.is_some() {
        return named("ai-toolkit", "training_info", None);
    }
    let base = source.raw("ss_base_model_version").unwrap_or("");
    if source.has("ss_num_train_items") {
        return named("musubi-tuner", "ss_num_train_items", None);
    }
    const COMMIT: &str = "ss_sd_scripts_commit_hash";
    if source.has(COMMIT) {
        return named("sd-scripts", COMMIT, source.text(&[COMMIT]).filter(|v| v != "(unknown)"));
    }
    if source.has("ss_network_module") && MUSUBI_BASES.iter().any(|prefix| base.starts_with(prefix)) {
        return named("musubi-tuner", "ss_base_model_version", None);
    }
    if let Some(module) = source.raw("ss_network_module") {
        // Without the training session beside it, a network's name is all that is known: a file stripped of its metadata.
        let lycoris = module.starts_with("lycoris") && !source.has("ss_session_id");
        return named(if lycoris { "LyCORIS" } else { "sd-scripts" }, "ss_network_module", None);
    }
    if let Some(key) = first(&["trained_words", "modelspec.comment"]) {
        return named("SimpleTuner", key, None);
    }
    // sd-scripts says "diffusers" here too, but never without its own keys; others that do so give a date.
    let spec = source.raw("modelspec.implementation") == Some("diffusers") && !source.has("modelspec.date");
    if spec {
        return named("SimpleTuner", "modelspec.implementation", None);
    }
    source.has("lora_adapter_metadata").then(|| named("diffusers", "lora_adapter_metadata", None)).flatten()
}
