//! An adapter file as the tools read it: its modules, the tensors of each as they stand in the file, and the way to give their pages back.

use super::sheet::{self, Part};
use crate::adapter::atomic::AtomicFile;
use crate::adapter::safetensors::{to_vec, Entry, File};
use crate::adapter::{keys, pickle, Adapter, Module};
use crate::error::{Error, Result};
use crate::view::Tensor;
use std::collections::HashMap;
use std::io::{Read, Seek};
use std::path::Path;
use std::sync::Arc;

/// An open file.
#[derive(Debug)]
pub struct Source {
    /// Its modules.
    pub adapter: Arc<Adapter>,
    file: File,
    /// Held, because the path may name the output by the time that the file is copied.
    original: std::fs::File,
    groups: Vec<Group>,
    by_name: HashMap<String, usize>,
}

/// The tensors of one module, or one tensor that belongs to none that can be used.
#[derive(Debug, Default)]
pub struct Group {
    /// Index into [`Adapter::modules`].
    pub module: Option<usize>,
    /// Index into the file's entries, and the canonical suffix where there is one.
    tensors: Vec<(usize, Option<&'static str>)>,
}

/// The file; one of torch's is turned into safetensors in memory.
fn open(path: &Path) -> Result<File> {
    let mut head = [0u8; 24];
    let count = std::fs::File::open(path).and_then(|mut file| file.read(&mut head));
    let count = count.map_err(|e| Error::io(path, e))?;
    if !pickle::is_pickle(&head[..count]) {
        return File::open(path);
    }
    // Every key as it is: what no module uses is copied or listed by the tools, as of any other file.
    let read = pickle::open(path)?;
    let row = |(key, tensor): (String, Tensor)| {
        let bytes = tensor.bytes().unwrap_or_default().to_vec();
        (key, tensor.dtype(), tensor.shape().to_vec(), bytes)
    };
    let rows: Vec<_> = read.tensors.into_iter().map(row).collect();
    File::from_bytes(to_vec(&rows, &read.metadata)?)
}

impl Source {
    /// Opens an adapter file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open(path)?;
        let original = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        let adapter = Adapter::of_file(file.clone(), path)?;
        let index: HashMap<&str, usize> =
            adapter.modules().iter().enumerate().map(|(i, m)| (m.name.as_str(), i)).collect();
        let (mut groups, mut by_name) = (Vec::<Group>::new(), HashMap::new());
        let control = keys::is_control(file.entries().iter().map(|e| e.name.as_str()));
        for (at, entry) in file.entries().iter().enumerate() {
            let split = keys::split(&entry.name);
            let split = split.or_else(|| control.then(|| keys::split_control(&entry.name)).flatten());
            let module = split.as_ref().and_then(|s| index.get(s.module.as_str()).copied());
            let slot = split.as_ref().map(|s| s.slot);
            match (split, module) {
                (Some(split), Some(_)) => {
                    let group = *by_name.entry(split.module).or_insert(groups.len());
                    if group == groups.len() {
                        groups.push(Group { module, tensors: Vec::new() });
                    }
                    groups[group].tensors.push((at, slot));
                }
                _ => groups.push(Group { module: None, tensors: vec![(at, slot)] }),
            }
        }
        Ok(Source { adapter, file, original, groups, by_name })
    }

    /// Size of the file.
    pub fn len(&self) -> u64 {
        self.file.len()
    }

    /// Everything in the file, in its order.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The group of a module.
    pub fn group(&self, module: &str) -> Option<&Group> {
        self.groups.get(*self.by_name.get(module)?)
    }

    /// The module of a group.
    pub fn module(&self, group: &Group) -> Option<&Module> {
        self.adapter.modules().get(group.module?)
    }

    fn entry(&self, at: usize) -> &Entry {
        &self.file.entries()[at]
    }

    /// The key under which the file has a module's tensor, else the one that its spelling has for it.
    pub fn key(&self, module: &Module, slot: &str) -> String {
        let group = self.group(&module.name);
        let own = group.and_then(|g| g.tensors.iter().find(|(_, s)| *s == Some(slot)));
        match own {
            Some((at, _)) => self.entry(*at).name.clone(),
            None => sheet::key(module.dialect, &module.name, slot),
        }
    }

    /// The tensors of a group, bit for bit. An alpha that the file itself lacks (PEFT keeps it beside the file) is added where it matters.
    pub fn copied(&self, group: &Group) -> Result<Vec<Part>> {
        let mut parts = Vec::with_capacity(group.tensors.len());
        for (at, _) in &group.tensors {
            parts.push(Part::kept(self.entry(*at).name.clone(), &self.tensor(*at)?));
        }
        parts.extend(self.module(group).and_then(|m| self.lacking_alpha(m)));
        Ok(parts)
    }

    /// The alpha of a module whose file does not hold it.
    fn lacking_alpha(&self, module: &Module) -> Option<Part> {
        let (alpha, rank) = (module.algorithm.alpha()?, module.algorithm.rank()?);
        let held = self.group(&module.name)?.tensors.iter().any(|(_, slot)| *slot == Some("alpha"));
        let plain = alpha == 0.0 || alpha == rank as f32;
        (!held && !plain).then(|| Part::alpha(self.key(module, "alpha"), &[], f64::from(alpha)).ok())?
    }

    /// Whether a copy of the file alone says everything about every module.
    pub fn is_self_contained(&self) -> bool {
        self.adapter.modules().iter().all(|m| self.lacking_alpha(m).is_none())
    }

    fn tensor(&self, at: usize) -> Result<Tensor> {
        let entry = self.entry(at);
        self.file
            .tensor(entry)
            .ok_or_else(|| Error::Backend(format!("`{}`: its bytes do not fit its shape", entry.name)))
    }

    /// Writes the file once more, byte for byte.
    pub fn copy(&self, path: &Path) -> Result<()> {
        if self.file.path() != self.adapter.path() {
            // It was another format.
            let entries = 0..self.file.entries().len();
            let parts = entries
                .map(|at| Ok(Part::kept(self.entry(at).name.clone(), &self.tensor(at)?)))
                .collect::<Result<Vec<_>>>();
            return sheet::write(path, &parts?, self.file.metadata());
        }
        let mut out = AtomicFile::create(path)?;
        let mut original = &self.original;
        let copied = original.rewind().and_then(|()| std::io::copy(&mut original, &mut out));
        copied.map_err(|e| Error::io(path, e))?;
        out.commit()
    }

    /// Whether a group has a tensor of this name.
    pub fn holds(&self, group: &Group, slot: &str) -> bool {
        group.tensors.iter().any(|(_, s)| *s == Some(slot))
    }

    /// The keys that belong to no module that can be used.
    pub fn unused_keys(&self) -> Vec<&str> {
        let unused = self.groups.iter().filter(|g| g.module.is_none());
        unused.flat_map(|g| &g.tensors).map(|(at, _)| self.entry(*at).name.as_str()).collect()
    }

    /// Gives back the memory of a group's tensors: to read a large file does not grow the process.
    pub fn release(&self, group: &Group) {
        for (at, _) in &group.tensors {
            let entry = self.entry(*at);
            self.file.release(entry.begin, entry.end);
        }
    }
}
