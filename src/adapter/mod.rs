//! Adapter files: bytes to modules. A file is read group by group; a bad group is reported and the rest stays usable.

pub mod atomic;
pub mod keys;
pub mod metadata;
pub mod pickle;
pub mod safetensors;

use crate::algo::{self, Algorithm, Group};
use crate::error::{Error, FileFault, Result};
use crate::names::{self, Guess};
use crate::view::Tensor;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One file's worth of modules. Never changed by being applied; share it freely between threads.
#[derive(Debug)]
pub struct Adapter {
    path: PathBuf,
    metadata: BTreeMap<String, String>,
    modules: Vec<Module>,
    keys: Vec<KeyState>,
    family: Option<Guess>,
    /// What stood beside the file, and goes into the metadata of what is written.
    config: Option<Arc<metadata::PeftConfig>>,
}

/// One adapted weight.
#[derive(Debug)]
pub struct Module {
    /// Its name as the file spells it, without the suffix.
    pub name: String,
    /// The spelling.
    pub dialect: keys::Dialect,
    /// What it does.
    pub algorithm: Arc<dyn Algorithm>,
}

/// One key of the file.
#[derive(Clone, Debug)]
pub struct KeyState {
    /// As the file spells it.
    pub key: String,
    /// The module that it belongs to, if its suffix is known.
    pub module: Option<String>,
    /// What became of it when the file was read.
    pub status: KeyStatus,
}

/// What became of a key when the file was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyStatus {
    /// Its module can be applied.
    Readable,
    /// This version does not know it; the reason.
    Unsupported(String),
    /// It contradicts itself or its neighbours; the reason.
    Malformed(String),
}

/// What a file holds, whatever its format.
struct Content {
    tensors: Vec<(String, Tensor)>,
    metadata: BTreeMap<String, String>,
}

impl From<safetensors::File> for Content {
    fn from(file: safetensors::File) -> Self {
        let tensor = |entry: &safetensors::Entry| Some((entry.name.clone(), file.tensor(entry)?));
        Content {
            tensors: file.entries().iter().filter_map(tensor).collect(),
            metadata: file.metadata().clone(),
        }
    }
}

impl From<pickle::Pickled> for Content {
    fn from(pickled: pickle::Pickled) -> Self {
        Content { tensors: pickled.tensors, metadata: pickled.metadata }
    }
}

impl Adapter {
    /// Opens and reads an adapter: safetensors, or what torch.save writes (`.pt`, `.ckpt`, `.bin`) as far as it holds no code.
    /// `adapter_config.json` in the same folder is read for PEFT files, which keep alpha there.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let mut head = [0u8; 24];
        let count = std::fs::File::open(path).and_then(|mut file| file.read(&mut head));
        let count = count.map_err(|e| Error::io(path, e))?;
        if pickle::is_pickle(&head[..count]) {
            return Self::read(path.to_owned(), pickle::open(path)?.into(), Some(path));
        }
        Self::read(path.to_owned(), safetensors::File::open(path)?.into(), Some(path))
    }

    /// Reads an adapter from the bytes of such a file.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Arc<Self>> {
        let content = match pickle::is_pickle(&bytes) {
            true => pickle::from_bytes(bytes)?.into(),
            false => safetensors::File::from_bytes(bytes)?.into(),
        };
        Self::read("<memory>".into(), content, None)
    }

    /// Reads an adapter from a file that is open already, and that the caller keeps for its own use.
    pub(crate) fn of_file(file: safetensors::File, path: &Path) -> Result<Arc<Self>> {
        Self::read(path.to_owned(), file.into(), Some(path))
    }

    /// Reads an adapter from tensors under the names that they have in a file.
    #[cfg(feature = "torch")]
    pub(crate) fn of_tensors(
        tensors: Vec<(String, Tensor)>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Arc<Self>> {
        Self::read("<memory>".into(), Content { tensors, metadata }, None)
    }

    fn read(path: PathBuf, content: Content, beside: Option<&Path>) -> Result<Arc<Self>> {
        let Content { tensors, metadata } = content;
        let control = keys::is_control(tensors.iter().map(|(key, _)| key.as_str()));
        let mut keys: Vec<KeyState> = Vec::with_capacity(tensors.len());
        let mut order: Vec<(String, keys::Dialect, Group, Vec<usize>)> = Vec::new();
        let mut seen: HashMap<String, usize> = HashMap::new();
        // Tensors that stand once in a file for all modules.
        let mut projections: Vec<(&'static str, Tensor, usize)> = Vec::new();
        for (key, tensor) in tensors {
            let index = keys.len();
            let split = keys::split(&key).or_else(|| control.then(|| keys::split_control(&key)).flatten());
            let module = split.as_ref().map(|s| s.module.clone());
            keys.push(KeyState { key, module, status: KeyStatus::Readable });
            let Some(split) = split else {
                keys[index].status = KeyStatus::Unsupported("no suffix that this version knows".into());
                continue;
            };
            if split.module.is_empty() {
                keys[index].module = None;
                let known = projections.iter().any(|(slot, ..)| *slot == split.slot);
                match algo::is_shared(split.slot) {
                    true if known => {
                        let why = format!("`{}` stands in the file twice", split.slot);
                        keys[index].status = KeyStatus::Malformed(why);
                    }
                    true => projections.push((split.slot, tensor, index)),
                    false => {
                        keys[index].status = KeyStatus::Malformed("belongs to no module".into());
                    }
                }
                continue;
            }
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
            true => match (metadata::PeftConfig::inside(&path, &metadata)?, beside) {
                (None, Some(path)) => metadata::PeftConfig::beside(path)?,
                (inside, _) => inside,
            },
            false => None,
        };
        let config = config.map(Arc::new);
        let (mut modules, mut used) = (Vec::with_capacity(order.len()), HashSet::new());
        for (name, dialect, mut group, members) in order {
            if lacks_alpha(dialect, &group) {
                group.config.clone_from(&config);
            }
            for (slot, tensor, index) in &projections {
                if algo::shares(&group, slot) {
                    group.tensors.push((slot, tensor.clone()));
                    used.insert(*index);
                }
            }
            group.grows = control && name.rsplit(['.', '_']).take(2).eq(["in", "img"]);
            match algo::read(&name, group) {
                Ok(algorithm) => modules.push(Module { name, dialect, algorithm: algorithm.into() }),
                Err(error) => {
                    let status = match &error {
                        Error::Unsupported { hint, .. } if hint.is_empty() => {
                            KeyStatus::Unsupported(error.to_string())
                        }
                        Error::Unsupported { hint, .. } => KeyStatus::Unsupported(format!("{error}; {hint}")),
                        _ => KeyStatus::Malformed(error.to_string()),
                    };
                    members.into_iter().for_each(|i| keys[i].status = status.clone());
                }
            }
        }
        for (_, _, index) in projections.iter().filter(|(_, _, index)| !used.contains(index)) {
            keys[*index].status = KeyStatus::Unsupported("no module of the file uses it".into());
        }
        if modules.is_empty() {
            return Err(nothing_readable(path, &keys));
        }
        let shapes: Vec<_> = modules.iter().map(|m| m.algorithm.shape().unwrap_or_default()).collect();
        let named: Vec<_> = modules.iter().zip(&shapes).map(|(m, s)| (m.name.as_str(), &s[..])).collect();
        let family = names::guess(&named);
        Ok(Arc::new(Adapter { path, metadata, modules, keys, family, config }))
    }

    /// The adapter cut to its first `rank` ranks; an error when no module has nested ranks.
    pub fn prefix(&self, rank: usize) -> Result<Arc<Self>> {
        if rank == 0 {
            return Err(Error::argument("a prefix of 0 ranks", "the rank is at least 1"));
        }
        let mut nested = false;
        let mut modules = Vec::with_capacity(self.modules.len());
        for Module { name, dialect, algorithm } in &self.modules {
            let cut = algorithm.prefix(name, rank);
            nested |= cut.is_some();
            let algorithm = match cut {
                Some(cut) => Arc::from(cut?),
                None => algorithm.clone(),
            };
            modules.push(Module { name: name.clone(), dialect: *dialect, algorithm });
        }
        if !nested {
            return Err(Error::Unsupported {
                what: format!("{}: no module has ranks that can be cut", self.path.display()),
                hint: "LoRA, DyLoRA and T-LoRA have".into(),
            });
        }
        let (path, metadata, keys) = (self.path.clone(), self.metadata.clone(), self.keys.clone());
        let (family, config) = (self.family.clone(), self.config.clone());
        Ok(Arc::new(Adapter { path, metadata, modules, keys, family, config }))
    }

    /// Writes the modules to a safetensors file, in the spelling that they were read in.
    pub fn save(&self, path: &Path) -> Result<()> {
        let tensors = self.tensors()?;
        let layout: Vec<_> =
            tensors.iter().map(|(k, t, _)| (k.clone(), t.dtype(), t.shape().to_vec())).collect();
        let mut metadata = self.metadata.clone();
        if let Some(config) = &self.config {
            metadata.entry(metadata::INSIDE.to_owned()).or_insert_with(|| config.text().to_owned());
        }
        let mut writer = safetensors::Writer::create(path, &layout, &metadata)?;
        tensors.iter().try_for_each(|(_, _, bytes)| writer.write(bytes))?;
        writer.finish()
    }

    /// Every tensor of the modules, under its key in the spelling that they were read in, and its bytes.
    pub(crate) fn tensors(&self) -> Result<Vec<(String, &Tensor, &[u8])>> {
        let (mut tensors, mut written) = (Vec::new(), HashSet::new());
        for module in &self.modules {
            for (slot, tensor) in module.algorithm.tensors() {
                let owner = if algo::is_shared(slot) { "" } else { &module.name };
                let key = keys::join(module.dialect, owner, slot).ok_or_else(|| Error::Unsupported {
                    what: format!(
                        "`{}`: `{slot}` cannot be written in the spelling of {}",
                        module.name,
                        module.dialect.name()
                    ),
                    hint: String::new(),
                })?;
                if owner.is_empty() && !written.insert(slot) {
                    continue;
                }
                let bytes = tensor.bytes().ok_or_else(|| {
                    Error::argument(
                        format!("`{key}` is not packed in host memory"),
                        "copy it to the CPU first",
                    )
                })?;
                tensors.push((key, tensor, bytes));
            }
        }
        Ok(tensors)
    }

    /// Where it came from; `<memory>` for bytes.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's own `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The modules that could be read, in the order of the file.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// The family of models that it is made for, as far as its names and shapes tell.
    pub fn family(&self) -> Option<&Guess> {
        self.family.as_ref()
    }

    /// PEFT's configuration, when the file needs one and it was found.
    pub fn config(&self) -> Option<&metadata::PeftConfig> {
        self.config.as_deref()
    }

    /// Every key of the file and what became of it.
    pub fn keys(&self) -> &[KeyState] {
        &self.keys
    }
}

/// The error of a file without one usable module: its first real defect, or that it is no adapter at all.
fn nothing_readable(path: PathBuf, keys: &[KeyState]) -> Error {
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
