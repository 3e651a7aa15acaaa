//! What a user wants to know of an adapter before using it, from the file's `__metadata__`: its name, the words that call it up, the model
//! it was made for, how it was trained and by which program. Trainers agree on little; this is the one place that knows their keys.
//!
//! [`json`] gives an object. Every field is optional, and a field that stands there has a value; names and meanings are stable:
//!
//! | field | content |
//! |---|---|
//! | `title`, `author`, `description`, `license`, `usage_hint`, `comment`, `tags` | text; `comment` is the trainer's user's own |
//! | `date` | as the file gives it, else the day on which training ended (UTC), `YYYY-MM-DD` |
//! | `tool` | `{name, evidence, version?}`: the program that wrote the file; `evidence` is the key that says so |
//! | `base` | `{version, model, model_hash, vae, architecture, implementation, prediction_type}`: the model trained on, texts |
//! | `trigger` | `{phrases: [text], classes: [{word, repeats?, images?}], tags: [{tag, count}], distinct_tags}`: at most 24 of each |
//! | `training` | see below; numbers, or text where the file has no number |
//! | `hashes` | `{model (sshs_model_hash), legacy (sshs_legacy_hash), sha256}`: as the file claims them, not checked |
//! | `thumbnail` | `{bytes, type?}`: the size of the embedded preview |
//! | `unreadable` | `[{key, reason}]`: metadata that claims to be JSON and is not, or is too long to be honest |
//!
//! `training` has `module`, `args` (object), `dim`, `alpha`, `dropout`, `optimizer`, `learning_rate`, `unet_lr`, `text_encoder_lr`,
//! `scheduler`, `warmup_steps`, `steps` and `epoch` (of this file), `max_steps` and `epochs` (of the plan), `images` (repeats counted),
//! `reg_images`, `batch_size`, `gradient_accumulation_steps`, `resolution` (`WxH`), `bucket_count`, `buckets: [{resolution, images}]` (at
//! most 24), `clip_skip`, `noise_offset`, `min_snr_gamma`, `mixed_precision`, `seed`, `loss_type`, `seconds` (of training).

mod tools;
pub(crate) mod values;

#[cfg(test)]
mod tests;

use serde_json::{json, Map, Value};
use std::collections::{BTreeMap, HashMap, HashSet};
use values::{field, number, text, Source};

/// Entries of a list that are kept: as many as the field's user interfaces show.
const MOST: usize = 24;
/// Entries of `training.args`.
const MOST_ARGS: usize = 64;

/// The facts of a file with this `__metadata__`. Never fails: what cannot be read is left out and listed under `unreadable`. The work is
/// linear in the metadata's length.
pub fn json(metadata: &BTreeMap<String, String>) -> Value {
    let mut source = Source::new(metadata);
    let nested = Nested::read(&mut source);
    let mut facts = Section::default();
    for (name, keys) in GENERAL {
        facts.put(name, source.text(keys));
    }
    facts.put("date", source.text(&["modelspec.date"]).or_else(|| source.day(FINISHED)));
    facts.put("tool", tools::tool(&source, &nested));
    facts.put("base", base(&source, &nested));
    facts.put("trigger", trigger(&source, &nested));
    facts.put("training", training(&source, &nested));
    let mut hashes = Section::default();
    for (name, key) in
        [("model", "sshs_model_hash"), ("legacy", "sshs_legacy_hash"), ("sha256", "modelspec.hash_sha256")]
    {
        hashes.put(name, source.text(&[key]));
    }
    facts.put("hashes", hashes.value());
    facts.put("thumbnail", source.raw("modelspec.thumbnail").map(thumbnail));
    facts.put("unreadable", source.unreadable());
    Value::Object(facts.0)
}

const STARTED: &str = "ss_training_started_at";
const FINISHED: &str = "ss_training_finished_at";

/// (fact, the keys that may hold it). `ssmd_*` is what users wrote with the Additional Networks extension of A1111, `name` is ai-toolkit's.
const GENERAL: &[(&str, &[&str])] = &[
    ("title", &["ssmd_display_name", "modelspec.title", "ss_output_name", "name"]),
    ("author", &["modelspec.author", "ssmd_author"]),
    ("description", &["modelspec.description", "ssmd_description"]),
    ("license", &["modelspec.license"]),
    ("usage_hint", &["modelspec.usage_hint"]),
    ("comment", &["ss_training_comment", "modelspec.comment"]),
    ("tags", &["modelspec.tags", "ssmd_tags"]),
];

/// (fact, keys of sd-scripts and its descendants, path in OneTrainer's `ot_config`).
const TRAINING: &[(&str, &[&str], &str)] = &[
    ("module", &["ss_network_module"], "peft_type"),
    ("dim", &["ss_network_dim"], "lora_rank"),
    ("alpha", &["ss_network_alpha"], "lora_alpha"),
    ("dropout", &["ss_network_dropout"], "dropout_probability"),
    ("optimizer", &["ss_optimizer"], "optimizer.optimizer"),
    ("learning_rate", &["ss_learning_rate"], "learning_rate"),
    ("unet_lr", &["ss_unet_lr"], "unet.learning_rate"),
    ("text_encoder_lr", &["ss_text_encoder_lr"], "text_encoder.learning_rate"),
    ("scheduler", &["ss_lr_scheduler"], "learning_rate_scheduler"),
    ("warmup_steps", &["ss_lr_warmup_steps"], "learning_rate_warmup_steps"),
    ("steps", &["ss_steps"], ""),
    ("max_steps", &["ss_max_train_steps"], ""),
    ("epoch", &["ss_epoch"], ""),
    ("epochs", &["ss_num_epochs"], "epochs"),
    ("images", &["ss_num_train_images", "ss_num_train_items"], ""),
    ("reg_images", &["ss_num_reg_images"], ""),
    ("batch_size", &["ss_total_batch_size", "ss_batch_size_per_device"], "batch_size"),
    ("gradient_accumulation_steps", &["ss_gradient_accumulation_steps"], "gradient_accumulation_steps"),
    ("clip_skip", &["ss_clip_skip", "modelspec.encoder_layer"], ""),
    ("noise_offset", &["ss_noise_offset"], "offset_noise_weight"),
    ("min_snr_gamma", &["ss_min_snr_gamma"], ""),
    ("mixed_precision", &["ss_mixed_precision"], "train_dtype"),
    ("seed", &["ss_seed"], ""),
    ("loss_type", &["ss_loss_type"], ""),
];

/// The values that are JSON written as text, each parsed once.
struct Nested {
    /// `{folder: {tag: count}}`
    tags: Option<Value>,
    /// `{folder: {n_repeats, img_count}}`
    dirs: Option<Value>,
    /// `[{resolution, batch_size_per_device, bucket_info, subsets: [{class_tokens, ..}], ..}]`
    datasets: Option<Value>,
    /// `{buckets: {"0": {resolution: [w, h], count}}}`
    buckets: Option<Value>,
    args: Option<Value>,
    /// OneTrainer's whole configuration, when its user asked for it.
    one_trainer: Option<Value>,
    /// ai-toolkit's `{name, version, ..}`.
    software: Option<Value>,
    /// ai-toolkit's `{step, epoch}`.
    progress: Option<Value>,
    /// PEFT's configurations, flat, each field behind its component's name.
    peft: Option<Value>,
}

impl Nested {
    fn read(source: &mut Source) -> Self {
        Nested {
            tags: source.parsed("ss_tag_frequency", Value::is_object),
            dirs: source.parsed("ss_dataset_dirs", Value::is_object),
            datasets: source.parsed("ss_datasets", Value::is_array),
            buckets: source.parsed("ss_bucket_info", Value::is_object),
            args: source.parsed("ss_network_args", Value::is_object),
            one_trainer: source.parsed("ot_config", Value::is_object),
            software: source.braced("software"),
            progress: source.braced("training_info"),
            peft: source.parsed("lora_adapter_metadata", Value::is_object),
        }
    }

    fn datasets(&self) -> &[Value] {
        self.datasets.as_ref().and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// A field of the first component's PEFT configuration: `unet.r`, `transformer.r`, or plain `r`.
    fn peft(&self, name: &str) -> Option<&Value> {
        let map = self.peft.as_ref()?.as_object()?;
        map.iter().find(|(key, _)| key.rsplit('.').next() == Some(name)).map(|(_, v)| v)
    }
}

/// An object under construction, without empty fields.
#[derive(Default)]
struct Section(Map<String, Value>);

impl Section {
    fn put(&mut self, name: &str, value: Option<Value>) {
        if let Some(value) = value {
            self.0.insert(name.to_owned(), value);
        }
    }

    fn value(self) -> Option<Value> {
        (!self.0.is_empty()).then_some(Value::Object(self.0))
    }
}

fn base(source: &Source, nested: &Nested) -> Option<Value> {
    let mut base = Section::default();
    // Older trainers of Stable Diffusion 2 say no more than this.
    let v2 = || (source.raw("ss_v2") == Some("True")).then(|| json!("sd_v2"));
    base.put("version", source.text(&["ss_base_model_version", "ss_base_model"]).or_else(v2));
    let one_trainer = |name| nested.one_trainer.as_ref().and_then(|c| text(field(c, name)?));
    let peft = || nested.peft("base_model_name_or_path").and_then(text);
    base.put(
        "model",
        source.text(&["ss_sd_model_name"]).or_else(|| one_trainer("base_model_name")).or_else(peft),
    );
    base.put("model_hash", source.text(&["ss_new_sd_model_hash", "ss_sd_model_hash"]));
    base.put("vae", source.text(&["ss_vae_name"]));
    base.put("architecture", source.text(&["modelspec.architecture"]));
    base.put("implementation", source.text(&["modelspec.implementation"]));
    base.put("prediction_type", source.text(&["modelspec.prediction_type"]));
    base.value()
}

fn trigger(source: &Source, nested: &Nested) -> Option<Value> {
    let mut section = Section::default();
    // The lists are SimpleTuner's and the Additional Networks extension's.
    let lists = ["trained_words", "ssmd_keywords"].iter().filter_map(|key| source.raw(key)).flat_map(words);
    let mut seen = HashSet::new();
    let phrases = source.raw("modelspec.trigger_phrase").into_iter().chain(lists);
    let phrases =
        phrases.filter(|phrase| seen.insert(*phrase)).take(MOST).map(|p| json!(values::cut(p))).collect();
    section.put("phrases", list(phrases));
    section.put("classes", list(classes(nested)));
    let tags = tags(nested);
    let distinct = tags.len();
    let tags = tags.into_iter().take(MOST).map(|(t, n)| json!({"tag": values::cut(t), "count": n}));
    section.put("tags", list(tags.collect()));
    section.put("distinct_tags", (distinct > 0).then(|| json!(distinct)));
    section.value()
}

fn words(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).filter(|word| !word.is_empty())
}

fn list(values: Vec<Value>) -> Option<Value> {
    (!values.is_empty()).then_some(Value::Array(values))
}

/// Tags over all folders, the most frequent first.
fn tags(nested: &Nested) -> Vec<(&str, u64)> {
    let folders = nested.tags.iter().filter_map(Value::as_object).flat_map(Map::values);
    let mut counts: HashMap<&str, u64> = HashMap::new();
    for (tag, count) in folders.filter_map(Value::as_object).flatten() {
        let (tag, Some(count)) = (tag.trim(), count.as_u64()) else { continue };
        if !tag.is_empty() && count > 0 {
            let sum = counts.entry(tag).or_default();
            *sum = sum.saturating_add(count);
        }
    }
    let mut tags: Vec<_> = counts.into_iter().collect();
    tags.sort_unstable_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    tags
}

/// The words that folders (`10_word`) and configured subsets teach.
fn classes(nested: &Nested) -> Vec<Value> {
    let object = |v| Option::as_ref(v).and_then(Value::as_object).into_iter().flatten();
    let mut found: Vec<Value> = Vec::new();
    let mut seen: HashSet<String> = HashSet::new();
    let mut add = |word: &str, repeats: Option<Value>, images: Option<Value>| {
        let word = word.trim();
        if found.len() < MOST && !word.is_empty() && word != "None" && seen.insert(word.to_owned()) {
            let mut class = Section::default();
            class.put("word", Some(json!(values::cut(word))));
            class.put("repeats", repeats);
            class.put("images", images);
            found.extend(class.value());
        }
    };
    for (name, folder) in object(&nested.dirs) {
        if let Some((repeats, word)) = counted_folder(name) {
            let repeats = folder.get("n_repeats").and_then(number).unwrap_or_else(|| json!(repeats));
            add(word, Some(repeats), folder.get("img_count").and_then(number));
        }
    }
    let subsets = nested.datasets().iter().filter_map(|d| d.get("subsets")?.as_array()).flatten();
    for subset in subsets.filter(|s| s.get("is_reg").and_then(Value::as_bool) != Some(true)) {
        if let Some(word) = subset.get("class_tokens").and_then(Value::as_str) {
            let field = |name| subset.get(name).and_then(number);
            add(word, field("num_repeats"), field("img_count"));
        }
    }
    // ai-toolkit writes its trigger word as a folder here, and nowhere else.
    for (name, _) in object(&nested.tags) {
        if let Some((repeats, word)) = counted_folder(name) {
            add(word, Some(json!(repeats)), None);
        }
    }
    found
}

/// `10_some word` is 10 repeats of "some word".
fn counted_folder(name: &str) -> Option<(u32, &str)> {
    let (repeats, word) = name.split_once('_')?;
    let digits = !repeats.is_empty() && repeats.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| repeats.parse().ok()).flatten().map(|n| (n, word))
}

fn training(source: &Source, nested: &Nested) -> Option<Value> {
    let mut section = Section::default();
    let one_trainer =
        |path: &str| nested.one_trainer.as_ref().and_then(|config| values::scalar(field(config, path)?));
    for (name, keys, path) in TRAINING {
        section.put(name, source.scalar(keys).or_else(|| one_trainer(path)));
    }
    for (name, peft) in [("dim", "r"), ("alpha", "lora_alpha")] {
        if !section.0.contains_key(name) {
            section.put(name, nested.peft(peft).and_then(number));
        }
    }
    for (name, inside) in [("steps", "step"), ("epoch", "epoch")] {
        if !section.0.contains_key(name) {
            section.put(name, nested.progress.as_ref().and_then(|p| number(p.get(inside)?)));
        }
    }
    if one_trainer("loss_weight_fn") == Some(json!("MIN_SNR_GAMMA")) {
        section.put("min_snr_gamma", one_trainer("loss_weight_strength"));
    }
    let args = nested.args.as_ref().and_then(Value::as_object).into_iter().flatten().take(MOST_ARGS);
    let args: Map<_, _> = args.filter_map(|(k, v)| Some((values::cut(k), values::scalar(v)?))).collect();
    section.put("args", (!args.is_empty()).then_some(Value::Object(args)));
    if !section.0.contains_key("batch_size") {
        section.put(
            "batch_size",
            nested.datasets().first().and_then(|d| number(d.get("batch_size_per_device")?)),
        );
    }
    let given = source.raw("ss_resolution").or(source.raw("modelspec.resolution"));
    let configured = || nested.datasets().first().and_then(|d| values::resolution_of(d.get("resolution")?));
    let resolution = given.map(values::resolution).or_else(configured);
    let resolution = resolution.or_else(|| values::resolution_of(&one_trainer("resolution")?));
    section.put("resolution", resolution.map(Value::String));
    let buckets = buckets(nested);
    section.put("bucket_count", (!buckets.is_empty()).then(|| json!(buckets.len())));
    let entry = |(resolution, images)| json!({"resolution": resolution, "images": images});
    section.put("buckets", list(buckets.into_iter().take(MOST).map(entry).collect()));
    section.put("seconds", source.seconds(STARTED).zip(source.seconds(FINISHED)).and_then(duration));
    section.value()
}

/// Buckets over all data sets, those with most images first.
fn buckets(nested: &Nested) -> Vec<(String, u64)> {
    let configured = nested.datasets().iter().filter_map(|d| d.get("bucket_info"));
    let infos = nested.buckets.iter().chain(configured);
    let entries = infos.filter_map(|info| info.get("buckets")?.as_object()).flat_map(Map::values);
    let mut counts: HashMap<String, u64> = HashMap::new();
    for bucket in entries {
        let resolution = bucket.get("resolution").and_then(values::resolution_of);
        let (Some(resolution), Some(count)) = (resolution, bucket.get("count").and_then(Value::as_u64))
        else {
            continue;
        };
        let sum = counts.entry(resolution).or_default();
        *sum = sum.saturating_add(count);
    }
    let mut buckets: Vec<_> = counts.into_iter().collect();
    buckets.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    buckets
}

/// Whole seconds between two moments, unless a clock was wrong.
fn duration((start, end): (f64, f64)) -> Option<Value> {
    const TEN_YEARS: f64 = 10.0 * 366.0 * 86400.0;
    let seconds = end - start;
    (0.0..TEN_YEARS).contains(&seconds).then(|| json!(seconds.round() as u64))
}

/// The size of an embedded picture, known without decoding it.
fn thumbnail(url: &str) -> Value {
    let Some((kind, data)) = url.strip_prefix("data:").and_then(|rest| rest.split_once(";base64,")) else {
        return json!({"bytes": url.len()});
    };
    let data = data.trim_end_matches('=');
    json!({"bytes": data.len() / 4 * 3 + data.len() % 4 * 3 / 4, "type": values::cut(kind)})
}
