//! A load report for people: plain text of at most 100 columns, the same in every host. It reads the JSON that `report::json` makes, so a
//! host may also render a report that it kept. First what the file is, then only what needs attention.
//!
//! A file's own words are shown, never obeyed: control characters and direction marks do not reach the terminal.

mod page;

#[cfg(test)]
mod tests;

use crate::adapter::keys;
use page::{size, value, Page};
use serde_json::{Map, Value};
use std::collections::HashMap;

/// Entries of a list that are shown without `all`.
const FIRST: usize = 10;

/// Before a name that was not meant but is close.
const NEAREST: &str = "nearest: ";

/// Different values of a field that are listed one by one.
const FEW: usize = 8;

/// What became of a key, in the order of the summary.
const STATES: [&str; 5] = ["readable", "matched", "unmatched", "unsupported", "malformed"];

/// The text of a load report: of one adapter (`lycore_adapter_report`, `lycore_stack_report`) or of a merge (`lycore_checkpoint_merge`).
/// Lists are cut at ten entries unless `all`. Fields that are missing, or are not what they should be, are left out.
pub fn text(report: &Value, all: bool) -> String {
    let mut page = Page::default();
    if let Some(adapters) = report.get("adapters").and_then(Value::as_array) {
        merged(&mut page, report, adapters, all);
    } else {
        file(&mut page, report);
        about(&mut page, &report["facts"], all);
        problems(&mut page, 0, report, all);
    }
    page.finish()
}

/// A merge: what was written, then one paragraph per adapter.
fn merged(page: &mut Page, report: &Value, adapters: &[Value], all: bool) {
    let tensors = |name| value(&report["tensors"][name]).unwrap_or_default();
    let counts = format!("{} tensors changed, {} copied", tensors("changed"), tensors("copied"));
    let output = value(&report["output"]).unwrap_or_default();
    page.line(0, &format!("{output}: {counts}, {}", size(report["bytes"].as_u64().unwrap_or(0))));
    for adapter in adapters {
        let summary = &adapter["summary"];
        let name = value(&adapter["file"]).unwrap_or_default();
        let keys = value(&summary["keys"]).unwrap_or_default();
        page.line(2, &format!("{name}: {} of {keys} keys", states(summary, &STATES).join(", ")));
        problems(page, 4, adapter, all);
    }
}

/// "780 matched", "12 unmatched"
fn states(summary: &Value, names: &[&str]) -> Vec<String> {
    let count = |name: &&str| summary[*name].as_u64().filter(|n| *n > 0);
    names.iter().filter_map(|name| Some(format!("{} {name}", count(name)?))).collect()
}

/// The file and its modules.
fn file(page: &mut Page, report: &Value) {
    let modules = report["modules"].as_array().map_or(&[][..], Vec::as_slice);
    let summary = &report["summary"];
    page.path("file", value(&report["file"]));
    let mut content = vec![plural(modules.len() as u64, "module")];
    content.push(plural(summary["keys"].as_u64().unwrap_or(0), "key"));
    // A file of which everything is readable needs no word about it; of a match the good news counts too.
    content.extend(states(summary, &STATES[1..]));
    page.row("content", Some(content.join(", ")));
    for (label, field) in [
        ("algorithm", "algorithm"),
        ("rank", "rank"),
        ("alpha", "alpha"),
        ("dtype", "dtype"),
        ("spelling", "spelling"),
    ] {
        page.row(label, counted(modules.iter().map(|m| &m[field])));
    }
    let bytes = modules.iter().filter_map(|m| m["bytes"].as_u64()).fold(0, u64::saturating_add);
    page.row("size", Some(size(bytes)));
    let family = &report["family"];
    let reason = value(&family["reason"]).map(|why| format!(" ({why})")).unwrap_or_default();
    page.row("family", value(&family["name"]).map(|name| name + &reason));
}

/// The values of one field over all modules: "16"; "LoRA (192), LoCon (72)"; "1 to 320 (57 values, most often 64)".
fn counted<'v>(values: impl Iterator<Item = &'v Value>) -> Option<String> {
    let mut counts: HashMap<String, (usize, f64)> = HashMap::new();
    for v in values {
        let order = v.as_f64().unwrap_or(f64::INFINITY);
        counts.entry(value(v).unwrap_or_else(|| "none".into())).or_insert((0, order)).0 += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().map(|(text, (count, order))| (text, count, order)).collect();
    counts.sort_by(|a, b| a.2.total_cmp(&b.2).then(b.1.cmp(&a.1)).then_with(|| a.0.cmp(&b.0)));
    if let [(only, ..)] = counts.as_slice() {
        return Some(only.clone());
    }
    let (numbers, others) = counts.split_at(counts.partition_point(|(.., order)| order.is_finite()));
    // The commas here part values, so those inside a value ("F16, F32") give way.
    let each = |(text, count, _): &(String, usize, f64)| format!("{} ({count})", text.replace(", ", "+"));
    let mut parts: Vec<String> = match numbers {
        [(low, ..), .., (high, ..)] if numbers.len() > FEW => {
            let most = numbers.iter().max_by_key(|(_, count, _)| *count).map_or("", |(text, ..)| text);
            vec![format!("{low} to {high} ({} values, most often {most})", numbers.len())]
        }
        few => few.iter().map(each).collect(),
    };
    parts.extend(others.iter().take(FEW).map(each));
    parts.extend(others.len().checked_sub(FEW).filter(|n| *n > 0).map(|n| format!("{n} more")));
    joined(parts)
}

/// What the file says of itself.
fn about(page: &mut Page, facts: &Value, all: bool) {
    let of = |section: &str, names: &[&str]| -> Vec<String> {
        names.iter().filter_map(|name| value(&facts[section][*name])).collect()
    };
    page.row("title", value(&facts["title"]));
    page.row("author", value(&facts["author"]));
    page.row("about", value(&facts["description"]).map(|text| shortened(text, all)));
    page.row("hint", value(&facts["usage_hint"]).map(|text| shortened(text, all)));
    page.row("license", value(&facts["license"]));
    page.row("tags", value(&facts["tags"]).map(|text| shortened(text, all)));
    let mut base = of("base", &["version", "model", "architecture"]);
    base.dedup();
    base.extend(value(&facts["base"]["prediction_type"]).map(|kind| format!("{kind} prediction")));
    page.row("base", joined(base));
    let trigger = &facts["trigger"];
    let mut words: Vec<String> = array(&trigger["phrases"]).iter().filter_map(value).collect();
    for class in array(&trigger["classes"]).iter().filter_map(|c| value(&c["word"])) {
        if !words.contains(&class) {
            words.push(class);
        }
    }
    page.row("trigger", joined(words));
    let tag = |t: &Value| Some(format!("{} ({})", value(&t["tag"])?, value(&t["count"])?));
    let tags: Vec<String> = array(&trigger["tags"]).iter().filter_map(tag).collect();
    let shown = if all { tags.len() } else { tags.len().min(FIRST) };
    let distinct = trigger["distinct_tags"].as_u64().unwrap_or(0);
    let more = distinct.saturating_sub(shown as u64);
    let more = (more > 0).then(|| format!("{more} more"));
    page.row("captions", joined(tags.into_iter().take(shown).chain(more).collect()));
    trained(page, facts);
    page.row("comment", value(&facts["comment"]).map(|text| shortened(text, all)));
    page.row("hash", joined(of("hashes", &["model", "sha256"])));
    let kind = |kind: String| format!(", {kind}");
    let preview = |bytes| size(bytes) + &value(&facts["thumbnail"]["type"]).map(kind).unwrap_or_default();
    page.row("preview", facts["thumbnail"]["bytes"].as_u64().map(preview));
    for problem in array(&facts["unreadable"]) {
        let texts = value(&problem["key"]).zip(value(&problem["reason"]));
        page.row("unreadable", texts.map(|(key, reason)| format!("{key} {reason}")));
    }
}

/// How it was trained, one row per kind of setting.
fn trained(page: &mut Page, facts: &Value) {
    let training = &facts["training"];
    let one = |name: &str, before: &str, after: &str| {
        value(&training[name]).map(|text| format!("{before}{text}{after}"))
    };
    let tool = &facts["tool"];
    let version =
        value(&tool["version"]).map(|v| format!(" {}", v.get(..12).unwrap_or(&v))).unwrap_or_default();
    let evidence = value(&tool["evidence"]).map(|key| format!(" (by {key})")).unwrap_or_default();
    let tool = value(&tool["name"]).map(|name| name + &version + &evidence);
    let time = training["seconds"].as_u64().filter(|s| *s > 0).map(page::time);
    page.row("trained", joined([tool, value(&facts["date"]), time].into_iter().flatten().collect()));
    let mut network: Vec<String> = [
        one("module", "", ""),
        one("dim", "dim ", ""),
        one("alpha", "alpha ", ""),
        one("dropout", "dropout ", "").filter(|_| training["dropout"].as_f64() != Some(0.0)),
    ]
    .into_iter()
    .flatten()
    .collect();
    let args = training["args"].as_object().into_iter().flat_map(Map::iter);
    network.extend(args.filter_map(|(name, v)| Some(format!("{name}={}", value(v)?))));
    page.row("network", joined(network));
    // "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)" is AdamW8bit.
    let optimizer = one("optimizer", "", "").map(|text| {
        let (path, args) = text.split_at(text.find('(').unwrap_or(text.len()));
        format!("{}{args}", path.rsplit('.').next().unwrap_or(path))
    });
    let rates = [
        optimizer,
        one("learning_rate", "lr ", ""),
        one("unet_lr", "unet ", ""),
        one("text_encoder_lr", "text encoder ", ""),
        one("scheduler", "", ""),
        one("warmup_steps", "", " warm-up steps").filter(|_| training["warmup_steps"] != 0),
    ];
    page.row("optimizer", joined(rates.into_iter().flatten().collect()));
    let out_of = |part: &str, whole: &str| {
        let of = one(whole, " of ", "").filter(|_| !training[part].is_null());
        one(part, "", "").or_else(|| one(whole, "", "")).map(|text| text + &of.unwrap_or_default())
    };
    let amount = [
        out_of("steps", "max_steps").map(|steps| format!("{steps} steps")),
        out_of("epoch", "epochs").map(|epochs| format!("epoch {epochs}")),
        one("images", "", " images"),
        one("reg_images", "", " regularisation images").filter(|_| training["reg_images"] != 0),
        one("batch_size", "batch ", ""),
        one("gradient_accumulation_steps", "x ", " accumulated")
            .filter(|_| !matches!(training["gradient_accumulation_steps"].as_u64(), Some(0 | 1))),
        one("resolution", "", ""),
        training["bucket_count"].as_u64().map(|n| plural(n, "bucket")),
    ];
    page.row("amount", joined(amount.into_iter().flatten().collect()));
    let options = [
        one("mixed_precision", "", ""),
        one("clip_skip", "clip skip ", ""),
        one("noise_offset", "noise offset ", "").filter(|_| training["noise_offset"].as_f64() != Some(0.0)),
        one("min_snr_gamma", "min-SNR gamma ", ""),
        one("loss_type", "loss ", ""),
        one("seed", "seed ", ""),
    ];
    page.row("options", joined(options.into_iter().flatten().collect()));
}

/// Everything that is not applied, module by module, and the modules' notes.
fn problems(page: &mut Page, indent: usize, report: &Value, all: bool) {
    for state in &STATES[2..] {
        let mut places: HashMap<(String, Option<String>), usize> = HashMap::new();
        let mut groups: Vec<(String, Option<String>, u64)> = Vec::new();
        for key in array(&report["keys"]).iter().filter(|key| key["status"] == *state) {
            let Some(name) = key["key"].as_str() else { continue };
            // The tensors of a module that share a reason are one entry.
            let module = keys::split(name).map(|split| split.module).filter(|module| !module.is_empty());
            let (module, detail) = (module.unwrap_or_else(|| name.to_owned()), detail(key));
            let place = *places.entry((module.clone(), detail.clone())).or_insert_with(|| {
                groups.push((module, detail, 0));
                groups.len() - 1
            });
            groups[place].2 += 1;
        }
        let count = groups.iter().map(|group| group.2).sum();
        let line = |(module, detail, _): &(String, Option<String>, u64)| match detail {
            Some(text) if text.starts_with(NEAREST) => format!("{module} ({text})"),
            // An error that names the module says it all.
            Some(text) if text.contains(module.as_str()) => text.clone(),
            Some(text) => format!("{module}: {text}"),
            None => module.clone(),
        };
        let title = format!("{state}: {}", plural(count, "key"));
        page.list(indent, &title, groups.iter().map(line), limit(all));
    }
    let mut notes: Vec<(String, String, usize)> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for module in array(&report["modules"]) {
        let Some((note, name)) = value(&module["note"]).zip(value(&module["module"])) else { continue };
        let place = *places.entry(note.clone()).or_insert_with(|| {
            notes.push((note, name, 0));
            notes.len() - 1
        });
        notes[place].2 += 1;
    }
    let count = notes.iter().map(|note| note.2 as u64).sum();
    let line = |(note, first, count): &(String, String, usize)| match count {
        1 => format!("{first}: {note}"),
        _ => format!("{first} and {} more: {note}", count - 1),
    };
    page.list(indent, &format!("notes: {}", plural(count, "module")), notes.iter().map(line), limit(all));
}

fn detail(key: &Value) -> Option<String> {
    value(&key["reason"]).or_else(|| value(&key["nearest"]).map(|name| format!("{NEAREST}{name}")))
}

fn limit(all: bool) -> usize {
    if all {
        usize::MAX
    } else {
        FIRST
    }
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn joined(parts: Vec<String>) -> Option<String> {
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn plural(count: u64, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
}

/// A text that some authors make an essay of.
fn shortened(text: String, all: bool) -> String {
    const CHARACTERS: usize = 300;
    match text.char_indices().nth(CHARACTERS) {
        Some((end, _)) if !all => format!("{}…", &text[..end]),
        _ => text,
    }
}
