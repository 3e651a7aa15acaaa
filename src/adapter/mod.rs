//! Adapter files: bytes to modules. A file is read group by group; a bad group is reported and the rest stays usable.

pub mod atomic;
pub mod keys;
pub mod metadata;
pub mod report;
pub mod safetensors;

use crate::algo::{self, Algorithm, Group};
use crate::error::{Error, FileFault, Result};
use crate::view::Tensor;
use report::{KeyState, KeyStatus};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One file's worth of modules. Never changed by being applied; share it freely between threads.
#[derive(Debug)]
pub struct Adapter {
    path: PathBuf,
    metadata: std::collections::BTreeMap<String, String>,
    modules: Vec<Module>,
    keys: Vec<KeyState>,
}

/// One adapted weight.
#[derive(Debug)]
pub struct Module {
    /// Its name as the file spells it, without the suffix.
    pub name: String,
    /// The spelling.
    pub dialect: keys::Dialect,
    /// What it does.
    pub algorithm: Box<dyn Algorithm>,
}

impl Adapter {
    /// Opens and reads a safetensors adapter. `adapter_config.json` in the same folder is read for PEFT files, which keep alpha there.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        Self::read(safetensors::File::open(path)?, Some(path))
    }

    /// Reads an adapter from the bytes of a safetensors file.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Arc<Self>> {
        Self::read(safetensors::File::from_bytes(bytes)?, None)
    }

    fn read(file: safetensors::File, path: Option<&Path>) -> Result<Arc<Self>> {
        let shared: Arc<safetensors::File> = Arc::new(file.clone());
        let mut keys: Vec<KeyState> = Vec::with_capacity(file.entries().len());
        let mut order: Vec<(String, keys::Dialect, Group, Vec<usize>)> = Vec::new();
        let mut seen: HashMap<String, usize> = HashMap::new();
        for entry in file.entries() {
            let index = keys.len();
            let split = keys::split(&entry.name);
            let module = split.as_ref().map(|s| s.module.clone());
            keys.push(KeyState { key: entry.name.clone(), module, status: KeyStatus::Readable });
            let Some(split) = split else {
                keys[index].status = KeyStatus::Unsupported("no suffix that this version knows".into());
                continue;
            };
            // SAFETY: the bytes live as long as the file, which `shared` keeps.
            let tensor =
                unsafe { Tensor::of_bytes(file.bytes(entry), entry.dtype, &entry.shape, shared.clone()) };
            let Some(tensor) = tensor else { continue };
            let at = *seen.entry(split.module.clone()).or_insert_with(|| {
                order.push((split.module.clone(), split.dialect, Group::default(), Vec::new()));
                order.len() - 1
            });
            let (_, dialect, group, members) = &mut order[at];
            // A bare `.alpha` reads as kohya's; the factors beside it know better.
            if split.dialect != keys::Dialect::Kohya {
                *dialect = split.dialect;
            }
            if group.get(split.slot).is_some() {
                let why =
                    format!("`{}` of this module stands in the file twice, in two spellings", split.slot);
                keys[index].status = KeyStatus::Malformed(why);
                continue;
            }
            group.tensors.push((split.slot, tensor));
            members.push(index);
        }
        // Only PEFT leaves alpha out of its files: a config that lies beside another program's file says nothing about it.
        let lacks_alpha =
            |dialect, group: &Group| dialect == keys::Dialect::Peft && group.get("alpha").is_none();
        let config = match order.iter().any(|(_, dialect, group, _)| lacks_alpha(*dialect, group)) {
            true => match (metadata::PeftConfig::inside(file.path(), file.metadata())?, path) {
                (None, Some(path)) => metadata::PeftConfig::beside(path)?,
                (inside, _) => inside,
            },
            false => None,
        };
        let mut modules = Vec::with_capacity(order.len());
        for (name, dialect, mut group, members) in order {
            if lacks_alpha(dialect, &group) {
                group.alpha = config.as_ref().and_then(|c| c.alpha(&name));
            }
            match algo::read(&name, &group) {
                Ok(algorithm) => modules.push(Module { name, dialect, algorithm }),
                Err(error) => {
                    let status = match &error {
                        Error::Unsupported { .. } => KeyStatus::Unsupported(error.to_string()),
                        _ => KeyStatus::Malformed(error.to_string()),
                    };
                    members.into_iter().for_each(|i| keys[i].status = status.clone());
                }
            }
        }
        if modules.is_empty() {
            return Err(nothing_readable(&file, &keys));
        }
        let (path, metadata) = (file.path().to_owned(), file.metadata().clone());
        Ok(Arc::new(Adapter { path, metadata, modules, keys }))
    }

    /// Writes the modules to a safetensors file, in the spelling that they were read in.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        for module in &self.modules {
            for (slot, tensor) in module.algorithm.tensors() {
                let key =
                    keys::join(module.dialect, &module.name, slot).ok_or_else(|| Error::Unsupported {
                        what: format!(
                            "`{}`: `{slot}` cannot be written in the spelling of {}",
                            module.name,
                            module.dialect.name()
                        ),
                        hint: String::new(),
                    })?;
                let bytes = tensor.bytes().ok_or_else(|| {
                    Error::argument(
                        format!("`{key}` is not packed in host memory"),
                        "copy it to the CPU first",
                    )
                })?;
                tensors.push((key, tensor, bytes));
            }
        }
        let layout: Vec<_> =
            tensors.iter().map(|(k, t, _)| (k.clone(), t.dtype(), t.shape().to_vec())).collect();
        let mut writer = safetensors::Writer::create(path, &layout, &self.metadata)?;
        tensors.iter().try_for_each(|(_, _, bytes)| writer.write(bytes))?;
        writer.finish()
    }

    /// Where it came from; `<memory>` for bytes.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's own `__metadata__`.
    pub fn metadata(&self) -> &std::collections::BTreeMap<String, String> {
        &self.metadata
    }

    /// The modules that could be read, in the order of the file.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// Every key of the file and what became of it.
    pub fn keys(&self) -> &[KeyState] {
        &self.keys
    }
}

/// The error of a file without one usable module: its first real defect, or that it is no adapter at all.
fn nothing_readable(file: &safetensors::File, keys: &[KeyState]) -> Error {
    let path = file.path().to_owned();
    for key in keys.iter().filter(|k| k.module.is_some()) {
        let what = match &key.status {
            KeyStatus::Malformed(why) | KeyStatus::Unsupported(why) => why.clone(),
            KeyStatus::Readable => continue,
        };
        let hint = "no module of the file can be used; `lycore info` lists all of them".into();
        return match key.status {
            KeyStatus::Unsupported(_) => {
                Error::Unsupported { what: format!("{}: {what}", path.display()), hint }
            }
            _ => Error::Key { key: key.key.clone(), file: Some(path), what, hint },
        };
    }
    let example = keys.first().map(|k| k.key.clone()).unwrap_or_default();
    Error::File { path, fault: FileFault::NoAdapter { keys: keys.len(), example } }
}
