//! The output: keys, metadata, the file, and PEFT's configuration beside it.

use super::names::Naming;
use super::rows::ALPHA;
use super::words::Method;
use super::{Configs, Source, Spelling, Target};
use crate::adapter::atomic::AtomicFile;
use crate::adapter::keys::{self, Dialect};
use crate::adapter::safetensors::Writer;
use crate::adapter::Adapter;
use crate::error::{Error, FileFault, Result};
use crate::view::Tensor;
use serde_json::{json, Map, Value};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a file holds.
pub(super) struct Spelled {
    /// Its modules, one for each target.
    pub names: Vec<String>,
    pub tensors: Vec<(String, Tensor)>,
}

/// The modules' names and all tensors with their keys.
pub(super) fn spelled(naming: &Naming, sources: &[Source<'_>], targets: &[Target]) -> Result<Spelled> {
    let by_name: HashMap<&str, &Source<'_>> = sources.iter().map(|s| (s.module.name.as_str(), s)).collect();
    let (mut names, mut tensors) = (Vec::new(), Vec::new());
    let peft = matches!(naming.to, Spelling::Peft | Spelling::Diffusers);
    for target in targets {
        let source = target.sources.iter().find_map(|name| by_name.get(name.as_str()));
        let source = source.map_or("", |s| s.module.name.as_str());
        let refused =
            |what: String| Error::Unsupported { what: format!("`{source}`: {what}"), hint: String::new() };
        let name = naming.full(source, target.component, &target.path).map_err(refused)?;
        for (slot, tensor) in &target.group.tensors {
            let key = match naming.to {
                // Not `join`, which takes some beginnings for a pipeline's component.
                Spelling::Peft => keys::join(Dialect::Peft, "x", slot).and_then(|key| {
                    Some(format!("base_model.model.{name}{}", key.strip_prefix("base_model.model.x")?))
                }),
                Spelling::Diffusers => keys::join(Dialect::Peft, &name, slot),
                Spelling::Kohya | Spelling::Comfyui => keys::join(Dialect::Kohya, &name, slot),
            };
            let key = key.ok_or_else(|| refused(format!("`{slot}` has no word in this spelling")))?;
            tensors.push((key, tensor.clone()));
        }
        let group = &target.group;
        // Programs differ on a missing alpha; none differs on one that is there. A LoKr of whole halves has no rank and alpha says nothing,
        // but LyCORIS reads a number there all the same.
        let whole = || (Method::of(group) == Some(Method::Lokr)).then_some(1);
        let rank = || group.rank.or_else(whole).map(|rank| Tensor::of_f32(vec![rank as f32], &[]));
        let alpha = group.alpha.clone().or_else(rank);
        if let Some(alpha) = alpha.filter(|_| !peft) {
            tensors.push((format!("{name}.{ALPHA}"), alpha));
        }
        names.push(name);
    }
    // Larger elements first, then by name: every tensor is aligned, as in the files of the safetensors library.
    tensors.sort_by(|a, b| b.1.dtype().bitsize().cmp(&a.1.dtype().bitsize()).then_with(|| a.0.cmp(&b.0)));
    Ok(Spelled { names, tensors })
}

/// The file's own metadata, without what spoke of its old names.
pub(super) fn metadata(adapter: &Adapter, naming: &Naming, configs: &Configs) -> BTreeMap<String, String> {
    let mut metadata = adapter.metadata().clone();
    metadata.remove("lora_adapter_metadata");
    let spellings: BTreeSet<_> = adapter.modules().iter().map(|m| m.dialect.name()).collect();
    let from = json!({
        "file": adapter.path().file_name().map(|n| n.to_string_lossy().into_owned()),
        "spelling": spellings.into_iter().collect::<Vec<_>>().join(", "),
        "family": naming.family,
    });
    metadata.insert("lycore.converted_from".into(), from.to_string());
    if naming.to == Spelling::Diffusers {
        let prefixed = configs.iter().flat_map(|(component, fields)| {
            let head = naming.called(*component);
            fields.iter().map(move |(field, value)| (format!("{head}.{field}"), value.clone()))
        });
        let all: Map<String, Value> = prefixed.collect();
        metadata.insert("lora_adapter_metadata".into(), Value::from(all).to_string());
    }
    if matches!(naming.to, Spelling::Peft | Spelling::Diffusers) {
        // transformers refuses a file that does not say it.
        metadata.entry("format".into()).or_insert_with(|| "pt".into());
    }
    metadata
}

/// Writes the file, and PEFT's configuration beside it; their paths.
pub(super) fn write(
    path: &Path,
    to: Spelling,
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
    configs: Configs,
) -> Result<(PathBuf, Option<PathBuf>)> {
    let folder = to == Spelling::Peft && path.is_dir();
    let file = if folder { path.join("adapter_model.safetensors") } else { path.to_owned() };
    let mut config = None;
    if let Some(fields) = configs.into_values().next().filter(|_| to == Spelling::Peft) {
        let path = file.with_file_name("adapter_config.json");
        // It is this file's own where this is the adapter that PEFT's folders hold, or the only one.
        let main = file.with_file_name("adapter_model.safetensors");
        let own = file.exists() && (file == main || !main.exists());
        if path.exists() && !own {
            let why = "is another adapter's configuration, which its alphas depend on; choose another folder"
                .into();
            return Err(Error::File { path, fault: FileFault::WrongKind { why } });
        }
        let mut beside = AtomicFile::create(&path)?;
        let text = serde_json::to_string_pretty(&fields).map_err(|e| Error::Backend(e.to_string()))?;
        beside.write_all(text.as_bytes()).map_err(|e| Error::io(&path, e))?;
        config = Some((beside, path));
    }
    let layout: Vec<_> = tensors.iter().map(|(k, t)| (k.clone(), t.dtype(), t.shape().to_vec())).collect();
    let mut writer = Writer::create(&file, &layout, metadata)?;
    for (key, tensor) in tensors {
        let bytes = tensor.bytes().ok_or_else(|| {
            Error::argument(format!("`{key}` is not packed in host memory"), "copy it to the CPU first")
        })?;
        writer.write(bytes)?;
    }
    writer.finish()?;
    let config = match config {
        Some((beside, path)) => {
            beside.commit()?;
            Some(path)
        }
        None => None,
    };
    Ok((file, config))
}
