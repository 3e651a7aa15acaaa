//! Targets + adapters + strengths: apply, change, restore.

use super::bypass::Geometry;
use super::ops::{Region, Term};
use super::plan::{Binding, Rules, Strengths};
use super::restore::{Backup, BackupPlace};
use super::Prepared;
use crate::adapter::Adapter;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::names::Index;
use crate::progress::Progress;
use crate::report;
use crate::view::{Device, Slice, View};
use std::collections::HashMap;
use std::sync::Arc;

/// A number that names one adapter in one stack; never used twice.
pub type AdapterId = u64;

/// Weights of a host and the adapters on them.
///
/// The weights stay the host's memory. `apply` computes every changed weight from its pristine copy, so the result depends on the
/// strengths alone and never on what was applied before.
pub struct Stack {
    targets: Vec<Target>,
    by_name: HashMap<String, usize>,
    aliases: Vec<(String, usize, Option<Slice>)>,
    index: Option<Index>,
    entries: Vec<Entry>,
    next: AdapterId,
    place: BackupPlace,
    prepared: Prepared,
    rules: Rules,
}

struct Target {
    name: String,
    weight: View,
    backup: Option<Backup>,
    /// What the live weight holds: (adapter, index into its binding, strength).
    applied: Vec<(AdapterId, usize, f64)>,
}

struct Entry {
    id: AdapterId,
    adapter: Arc<Adapter>,
    binding: Binding,
    strengths: Strengths,
}

/// What [`Stack::apply`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Weights written.
    pub changed: usize,
    /// Weights that already were as wanted.
    pub kept: usize,
}

impl Stack {
    /// An empty stack.
    pub fn new(place: BackupPlace) -> Self {
        Stack {
            targets: Vec::new(),
            by_name: HashMap::new(),
            aliases: Vec::new(),
            index: None,
            entries: Vec::new(),
            next: 1,
            place,
            prepared: Prepared::default(),
            rules: Rules::default(),
        }
    }

    /// Whether adapters of another family of models are taken as far as they fit, rather than refused.
    pub fn allow_other_families(&mut self, allow: bool) {
        self.rules.other_families = allow;
    }

    /// Registers a weight under the host's own name. All targets come before the first adapter.
    pub fn add_target(&mut self, name: &str, weight: View) -> Result<usize> {
        if !self.entries.is_empty() {
            let what = format!("target `{name}` comes after the first adapter");
            return Err(Error::argument(what, "register all targets first, then add adapters"));
        }
        Float::require(weight.dtype(), name)?;
        if self.by_name.contains_key(name) {
            return Err(Error::argument(
                format!("target `{name}` is registered already"),
                "give each weight its own name",
            ));
        }
        // The second one's copy would be taken after the first was merged.
        let writable = |w: &View| w.count() > 0 && !w.repeats_elements();
        let same = |w: &View| w.data() == weight.data() && w.device() == weight.device();
        let twin = self.targets.iter().find(|t| same(&t.weight) && writable(&t.weight));
        if let Some(other) = twin.filter(|_| writable(&weight)) {
            let what = format!("targets `{}` and `{name}` are the same memory", other.name);
            return Err(Error::argument(what, "register it once, and name it a second time with an alias"));
        }
        let index = self.targets.len();
        self.by_name.insert(name.to_owned(), index);
        self.targets.push(Target { name: name.to_owned(), weight, backup: None, applied: Vec::new() });
        self.index = None;
        Ok(index)
    }

    /// Makes `spelling` (an adapter's module name) mean `target`, or a slice of it. Wins over every built-in rule.
    pub fn add_alias(&mut self, spelling: &str, target: &str, slice: Option<Slice>) -> Result<()> {
        let index = self.target(target)?;
        Region::of(target, self.targets[index].weight.shape(), slice)?;
        self.aliases.push((spelling.to_owned(), index, slice));
        self.index = None;
        Ok(())
    }

    /// Where the work of `apply` and `restore` runs: the first weight's GPU, if any weight is on one.
    pub fn device(&self) -> Device {
        let device = self.targets.iter().map(|t| t.weight.device()).find(|&d| d != Device::Cpu);
        device.unwrap_or(Device::Cpu)
    }

    fn target(&self, name: &str) -> Result<usize> {
        self.by_name.get(name).copied().ok_or_else(|| Error::Key {
            key: name.to_owned(),
            file: None,
            what: format!("is not one of the {} registered targets", self.targets.len()),
            hint: "names are the ones given when the target was registered".into(),
        })
    }

    /// Puts an adapter on the stack; takes effect with the next `apply`. An adapter of which nothing matches is an error.
    pub fn add_adapter(&mut self, adapter: Arc<Adapter>, strengths: Strengths) -> Result<AdapterId> {
        strengths.check()?;
        let index = self.index.get_or_insert_with(|| {
            let names: Vec<(&str, &[usize])> =
                self.targets.iter().map(|t| (t.name.as_str(), t.weight.shape())).collect();
            let mut index = Index::new(&names);
            for (spelling, target, slice) in &self.aliases {
                index.add_alias(spelling, *target, *slice);
            }
            index
        });
        let targets: Vec<(&str, &[usize])> =
            self.targets.iter().map(|t| (t.name.as_str(), t.weight.shape())).collect();
        let binding = Binding::new(&adapter, index, &targets, self.rules)?;
        let id = self.next;
        self.next += 1;
        self.entries.push(Entry { id, adapter, binding, strengths });
        Ok(id)
    }

    fn entry(&mut self, id: AdapterId) -> Result<usize> {
        self.entries
            .iter()
            .position(|e| e.id == id)
            .ok_or_else(|| Error::argument(format!("no adapter {id} on this stack"), "was it removed?"))
    }

    /// Sets an adapter's strengths; takes effect with the next `apply`.
    pub fn set_strengths(&mut self, id: AdapterId, strengths: Strengths) -> Result<()> {
        strengths.check()?;
        let at = self.entry(id)?;
        self.entries[at].strengths = strengths;
        Ok(())
    }

    /// Takes an adapter off the stack; takes effect with the next `apply`.
    pub fn remove_adapter(&mut self, id: AdapterId) -> Result<()> {
        let at = self.entry(id)?;
        self.entries.remove(at);
        self.prepared = Prepared::default();
        Ok(())
    }

    /// The load report of an adapter on this stack.
    pub fn report(&mut self, id: AdapterId) -> Result<serde_json::Value> {
        let at = self.entry(id)?;
        Ok(report::json(&self.entries[at].adapter, Some(&self.entries[at].binding)))
    }

    /// What every target should hold, by the strengths as they are set.
    fn wanted(&self) -> Vec<Vec<(AdapterId, usize, f64)>> {
        let mut wanted = vec![Vec::new(); self.targets.len()];
        for entry in &self.entries {
            for (i, bound) in entry.binding.bound.iter().enumerate() {
                let strength = entry.strengths.of(&entry.adapter.modules()[bound.module].name, bound.part);
                if strength != 0.0 {
                    wanted[bound.target].push((entry.id, i, strength));
                }
            }
        }
        wanted
    }

    /// Writes every weight whose wanted terms differ from what it holds. Reports in weights.
    ///
    /// On an error or a cancel all weights are the base again, bit for bit.
    pub fn apply(&mut self, progress: &mut Progress<'_>) -> Result<Applied> {
        self.apply_terms(progress).inspect_err(|_| {
            // What went wrong first is what the caller must hear.
            let _ = self.restore();
        })
    }

    fn apply_terms(&mut self, progress: &mut Progress<'_>) -> Result<Applied> {
        let wanted = self.wanted();
        let due: Vec<usize> = (0..wanted.len()).filter(|&i| wanted[i] != self.targets[i].applied).collect();
        let kept = wanted.iter().filter(|w| !w.is_empty()).count()
            - due.iter().filter(|&&i| !wanted[i].is_empty()).count();
        for (done, &i) in due.iter().enumerate() {
            progress.at(done as u64, due.len() as u64)?;
            let target = &mut self.targets[i];
            super::check_target(&target.name, &target.weight)?;
            if target.backup.is_none() {
                target.backup = Some(Backup::of(&target.name, &target.weight, self.place)?);
            }
            let Some(backup) = &target.backup else { continue };
            // Until it is written whole, the weight holds nothing that could be wanted.
            target.applied = vec![(0, 0, f64::NAN)];
            let terms: Vec<Term<'_>> = wanted[i]
                .iter()
                .filter_map(|(id, bound, strength)| {
                    let entry = self.entries.iter().find(|e| e.id == *id)?;
                    Some(entry.binding.bound[*bound].terms(*strength))
                })
                .flatten()
                .collect();
            if terms.is_empty() {
                backup.write_back(&target.name, &target.weight)?;
                target.backup = None;
            } else {
                super::merge(&target.name, backup.view(), &target.weight, &terms, &mut self.prepared)?;
            }
            target.applied.clone_from(&wanted[i]);
        }
        progress.at(due.len() as u64, due.len() as u64)?;
        Ok(Applied { changed: due.len(), kept })
    }

    /// Gives every weight its base back, bit for bit, and frees the copies. Adapters and strengths stay.
    pub fn restore(&mut self) -> Result<()> {
        let mut result = Ok(());
        for target in &mut self.targets {
            if let Some(backup) = &target.backup {
                match backup.write_back(&target.name, &target.weight) {
                    Ok(()) => {
                        target.applied.clear();
                        target.backup = None;
                    }
                    // The others still get their base.
                    Err(e) => result = result.and(Err(e)),
                }
            }
        }
        self.prepared = Prepared::default();
        result
    }

    /// The bypass: `y += ` what the adapters add to the output of the layer with this weight, at the strengths as they are set.
    /// The weight itself is not changed; where it is merged already, the host's own output has the adapters in it.
    pub fn forward(&mut self, target: &str, geometry: &Geometry, x: &View, y: &View) -> Result<()> {
        let at = self.target(target)?;
        let terms: Vec<Term<'_>> = self
            .entries
            .iter()
            .flat_map(|entry| {
                entry.binding.bound.iter().filter(|b| b.target == at).flat_map(|bound| {
                    let module = &entry.adapter.modules()[bound.module].name;
                    bound.terms(entry.strengths.of(module, bound.part))
                })
            })
            .collect();
        let base = self.targets[at].backup.as_ref().map_or(&self.targets[at].weight, Backup::view);
        super::forward(target, base, geometry, x, y, &terms, &mut self.prepared)
    }
}
