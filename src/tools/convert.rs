//! An adapter file in another spelling: sd-scripts' (kohya), ComfyUI's, PEFT's, or that of diffusers' pipelines.
//!
//! Names are translated by the family's table, and where one layout fuses what the other keeps apart, modules are cut or put together by
//! rows. Values stay the same to the bit; computed are only alphas, the zeros between LoRAs that share a weight, and (IA)^3's `1 + w`
//! where that is exact. What a spelling cannot say is refused, all of it at once, or left out and listed when that was asked for.
//!
//! `names` says where a module goes, `rows` cuts and joins, `words` rewrites the tensors' names, `config` is what PEFT and diffusers keep
//! beside the tensors, `output` writes.

mod config;
mod names;
mod output;
mod rows;
mod words;

#[cfg(test)]
mod tests;

use crate::adapter::keys::Dialect;
use crate::adapter::{Adapter, KeyStatus, Module};
use crate::error::{Error, Result};
use crate::names::{Fraction, Guess};
use crate::progress::Progress;
use names::{Component, Naming, Place};
use output::Spelled;
use rows::{Group, Part};
use serde_json::{json, Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// So many modules of one reason are named in an error: a file may have a thousand.
const NAMED: usize = 4;

/// How the output names its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// `lora_unet_…` and `lora_te…`, flattened; alpha always written.
    Kohya,
    /// `base_model.model.…` in diffusers' layout, one model of the pipeline per file, with `adapter_config.json` beside it.
    Peft,
    /// `unet.…`, `transformer.…`, `text_encoder.…` with PEFT's words, alphas in the metadata.
    Diffusers,
    /// `diffusion_model.…` and `text_encoders.…`, dotted, with kohya's words.
    Comfyui,
}

impl Spelling {
    /// All of them.
    pub const ALL: [Spelling; 4] = [Spelling::Kohya, Spelling::Peft, Spelling::Diffusers, Spelling::Comfyui];

    /// The name in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Spelling::Kohya => "kohya",
            Spelling::Peft => "peft",
            Spelling::Diffusers => "diffusers",
            Spelling::Comfyui => "comfyui",
        }
    }

    /// The spelling of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }
}

/// What to write.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// The output's spelling.
    pub to: Spelling,
    /// The model's family, as a report names it, where the file does not tell.
    pub family: Option<&'a str>,
    /// The one model of the pipeline to write: "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3". The others are left out.
    pub component: Option<&'a str>,
    /// Leaves out what the spelling cannot say, instead of refusing the file.
    pub skip: bool,
}

/// A module that is not written, and why.
type Problem = (String, String);

/// One module on its way.
struct Source<'a> {
    module: &'a Module,
    component: Component,
    places: Vec<Place>,
    group: Group,
}

/// One module of the output.
struct Target {
    component: Component,
    path: String,
    group: Group,
    sources: BTreeSet<String>,
}

/// A weight of the output before its parts are put together: each source, by number, with its rows and the weight's.
type Gathered = BTreeMap<(Component, String), Vec<(usize, Option<Fraction>, Option<Fraction>)>>;

/// Writes `adapter` to `path` in another spelling and returns the report. The output appears whole or not at all and may be the adapter's
/// own file; for PEFT it may be a folder. Nothing is written when a module cannot be.
pub fn convert(
    adapter: &Adapter,
    path: &Path,
    options: &Options<'_>,
    progress: &mut Progress<'_>,
) -> Result<Value> {
    let family = family_of(adapter, options)?;
    let modules = adapter.modules().iter().map(|m| m.name.as_str());
    let naming = Naming::new(options.to, family.as_ref().map(|g| g.family), modules);
    let mut problems: Vec<Problem> = unread(adapter);
    let sources = sources(adapter, &naming, options, &mut problems, progress)?;
    let mut targets = put_together(&sources, &mut problems);
    let configs = loop {
        let (configs, failed) = configs(&naming, &targets);
        let complete = failed.is_empty();
        leave_out(&mut targets, failed, &mut problems);
        if !problems.is_empty() && !options.skip {
            return Err(refusal(adapter, options.to, &problems));
        }
        // What is left out may make the rest uniform: so the configuration is tried again.
        if complete {
            break configs;
        }
    };
    if targets.is_empty() {
        return Err(refusal(adapter, options.to, &problems));
    }
    let Spelled { names, tensors } = output::spelled(&naming, &sources, &targets)?;
    let metadata = output::metadata(adapter, &naming, &configs);
    // Nothing is written before; after it the output is whole.
    let total = adapter.modules().len() as u64;
    progress.at(total, total)?;
    let (file, config) = output::write(path, options.to, &tensors, &metadata, configs)?;
    let mut becomes: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (target, name) in targets.iter().zip(&names) {
        target.sources.iter().for_each(|s| becomes.entry(s).or_default().push(name));
    }
    let split = becomes.values().filter(|new| new.len() > 1).count();
    let fused = targets.iter().filter(|t| t.sources.len() > 1).count();
    let in_order = adapter.modules().iter().filter_map(|m| Some((&m.name, becomes.get(m.name.as_str())?)));
    let modules: Vec<Value> = in_order.map(|(old, new)| json!({"module": old, "becomes": new})).collect();
    let left: Vec<Value> = problems.iter().map(|(m, why)| json!({"module": m, "reason": why})).collect();
    Ok(json!({
        "input": adapter.path().display().to_string(),
        "output": file.display().to_string(),
        "config": config.map(|c| c.display().to_string()),
        "to": options.to.name(),
        "family": family.as_ref().map(|g| json!({"name": g.family, "reason": g.reason})),
        "summary": {"modules": modules.len(), "written": targets.len(), "tensors": tensors.len(), "split": split, "fused": fused, "left_out": left.len()},
        "modules": modules,
        "left_out": left,
    }))
}

/// The family, from the options or the modules.
fn family_of(adapter: &Adapter, options: &Options<'_>) -> Result<Option<Guess>> {
    if let Some(name) = options.family {
        let reason = "it was given".to_owned();
        return Ok(Some(Guess { family: names::family(name)?, reason }));
    }
    Ok(adapter.family().cloned())
}

/// Keys that the library could not read would be lost silently.
fn unread(adapter: &Adapter) -> Vec<Problem> {
    let lost = adapter.keys().iter().filter_map(|key| match &key.status {
        KeyStatus::Readable => None,
        KeyStatus::Unsupported(why) | KeyStatus::Malformed(why) => Some((key.key.clone(), why.clone())),
    });
    lost.collect()
}

fn sources<'a>(
    adapter: &'a Adapter,
    naming: &Naming,
    options: &Options<'_>,
    problems: &mut Vec<Problem>,
    progress: &mut Progress<'_>,
) -> Result<Vec<Source<'a>>> {
    let (mut found, mut components) = (Vec::new(), BTreeSet::new());
    let total = adapter.modules().len() as u64;
    for (done, module) in adapter.modules().iter().enumerate() {
        progress.at(done as u64, total)?;
        let mut refuse = |why: String| problems.push((module.name.clone(), why));
        let Some(component) = names::component(&module.name) else {
            refuse("it belongs to neither the diffusion model nor a text encoder".into());
            continue;
        };
        let called = naming.called(component);
        components.insert(called);
        let wanted = |name: &str| called == name || component == Component::Model && is_model(name);
        if options.component.is_some_and(|name| !wanted(name)) {
            continue;
        }
        match source(module, component, naming) {
            Ok(source) => found.push(source),
            Err(why) => refuse(why),
        }
    }
    let list = components.iter().copied().collect::<Vec<_>>().join(", ");
    match options.component {
        Some(name) if !components.iter().any(|c| *c == name || is_model(c) && is_model(name)) => {
            Err(Error::argument(format!("the file has no component `{name}`"), format!("it has {list}")))
        }
        None if options.to == Spelling::Peft && components.len() > 1 => Err(Error::argument(
            format!("the file has {list}, a PEFT file holds one of them"),
            "name it with the option component",
        )),
        _ => Ok(found),
    }
}

fn is_model(component: &str) -> bool {
    matches!(component, "unet" | "transformer")
}

fn source<'a>(module: &'a Module, component: Component, naming: &Naming) -> Result<Source<'a>, String> {
    if module.dialect == Dialect::Bfl {
        return Err("a whole weight beside LoRAs stands in Black Forest Labs' control files only".into());
    }
    let mut group = Group::of(module);
    let grows = module.algorithm.grown().is_some_and(|_| group.get("reshape_weight").is_none());
    if grows {
        return Err(
            "its weight may grow, as in Black Forest Labs' control files, which no other spelling says"
                .into(),
        );
    }
    let places = naming.places(module, component)?;
    let lacks_bias = places.iter().all(|p| naming.lacks_bias(component, &p.path));
    words::respell(&mut group, naming.to, lacks_bias)?;
    let lokr = words::Method::of(&group) == Some(words::Method::Lokr);
    let loads_lokr = naming.family.is_none_or(|f| matches!(f, "Flux.2" | "Z-Image"));
    if naming.to == Spelling::Diffusers && lokr && !(component == Component::Model && loads_lokr) {
        return Err("diffusers loads LoKr into the transformers of Flux.2 and Z-Image only".into());
    }
    for place in &places {
        naming.full(&module.name, component, &place.path)?;
    }
    Ok(Source { module, component, places, group })
}

/// Cuts every source for the weights that it goes to and joins what meets there.
fn put_together(sources: &[Source<'_>], problems: &mut Vec<Problem>) -> Vec<Target> {
    let (mut gathered, mut order): (Gathered, Vec<_>) = (BTreeMap::new(), Vec::new());
    for (i, source) in sources.iter().enumerate() {
        for place in &source.places {
            let key = (source.component, place.path.clone());
            if !gathered.contains_key(&key) {
                order.push(key.clone());
            }
            gathered.entry(key).or_default().push((i, place.from, place.to));
        }
    }
    let (mut targets, mut failed) = (Vec::new(), Failed::new());
    for key in order {
        let members = gathered.get(&key).map(Vec::as_slice).unwrap_or_default();
        let names = members.iter().filter_map(|(i, ..)| Some(sources.get(*i)?.module.name.clone()));
        match whole(sources, members) {
            Ok(group) => {
                targets.push(Target { component: key.0, path: key.1, group, sources: names.collect() });
            }
            Err(why) => names.for_each(|name| {
                failed.entry(name).or_insert_with(|| why.clone());
            }),
        }
    }
    leave_out(&mut targets, failed, problems);
    targets
}

/// Modules of the file, by name, and why they cannot be written.
type Failed = BTreeMap<String, String>;

/// Drops what cannot be written. A module is written whole or not at all, so what shares a weight with it goes too.
fn leave_out(targets: &mut Vec<Target>, mut failed: Failed, problems: &mut Vec<Problem>) {
    while let Some(at) = targets.iter().position(|t| t.sources.iter().any(|s| failed.contains_key(s))) {
        for name in targets.remove(at).sources {
            failed.entry(name).or_insert_with(|| "it shares a weight with one that cannot be written".into());
        }
    }
    problems.extend(failed);
}

fn whole(
    sources: &[Source<'_>],
    members: &[(usize, Option<Fraction>, Option<Fraction>)],
) -> Result<Group, String> {
    let (mut parts, mut totals) = (Vec::new(), BTreeSet::new());
    for (i, from, to) in members {
        let Some(source) = sources.get(*i) else { continue };
        let (from, to) = (from.unwrap_or(Fraction::WHOLE), to.unwrap_or(Fraction::WHOLE));
        if from.is_whole() && to.is_whole() && members.len() == 1 {
            return Ok(source.group.clone());
        }
        let Some(rows) = source.group.rows() else {
            // Nothing in it depends on the rows: it goes whole to each, its part counted in shares.
            totals.insert(to.of);
            parts.push(Part { group: source.group.clone(), start: to.first, len: to.count });
            continue;
        };
        let uneven = || format!("its {rows} rows do not divide into the parts of the other layout");
        let (start, len) = from.range(rows).ok_or_else(uneven)?;
        let total = len.checked_mul(to.of).filter(|n| n % to.count == 0).ok_or_else(uneven)? / to.count;
        let (at, _) = to.range(total).ok_or_else(uneven)?;
        totals.insert(total);
        parts.push(Part { group: source.group.cut(start, len)?, start: at, len });
    }
    match totals.iter().copied().collect::<Vec<_>>()[..] {
        [total] => rows::join(parts, total),
        _ => Err("its parts are of weights of different size".into()),
    }
}

/// Configurations by component: one for PEFT, one per component for diffusers, none for the others.
type Configs = BTreeMap<Component, Map<String, Value>>;

fn configs(naming: &Naming, targets: &[Target]) -> (Configs, Failed) {
    let (mut found, mut failed) = (Configs::new(), Failed::new());
    if matches!(naming.to, Spelling::Kohya | Spelling::Comfyui) {
        return (found, failed);
    }
    for component in targets.iter().map(|t| t.component).collect::<BTreeSet<_>>() {
        let own = || targets.iter().filter(|t| t.component == component);
        let entries: Vec<config::Entry<'_>> = own().map(|t| (&t.path[..], &t.group)).collect();
        match config::config(&entries, component != Component::Model) {
            Ok(config) => drop(found.insert(component, config)),
            Err(odd) => {
                for (path, why) in odd {
                    let names = own().filter(|t| t.path == path).flat_map(|t| &t.sources);
                    names.for_each(|name| {
                        failed.entry(name.clone()).or_insert_with(|| why.clone());
                    });
                }
            }
        }
    }
    (found, failed)
}

/// One error for all modules, those with the same reason together: some by name, the others counted.
fn refusal(adapter: &Adapter, to: Spelling, problems: &[Problem]) -> Error {
    let mut by_reason: Vec<(&str, Vec<&str>)> = Vec::new();
    for (module, why) in problems {
        match by_reason.iter_mut().find(|(reason, _)| reason == why) {
            Some((_, modules)) => modules.push(module),
            None => by_reason.push((why, vec![module])),
        }
    }
    let reasons = by_reason.iter().map(|(why, modules)| {
        let (named, rest) = modules.split_at(modules.len().min(NAMED));
        let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
        format!("`{}`{more}: {why}", named.join("`, `"))
    });
    let list = reasons.collect::<Vec<_>>().join("; ");
    let count = match problems.len() {
        1 => "a module".to_owned(),
        n => format!("{n} modules"),
    };
    let what = format!(
        "{}: {count} cannot be written in the spelling of {}: {list}",
        adapter.path().display(),
        to.name()
    );
    let hint = match by_reason.iter().any(|(why, _)| why.contains("family cannot be told")) {
        true => "name the family with the option family",
        false => "the option skip leaves them out",
    };
    Error::Unsupported { what, hint: hint.into() }
}
