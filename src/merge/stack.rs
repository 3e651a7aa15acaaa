//! Targets + adapters + strengths: apply, change, restore.

use super::bypass::Geometry;
use super::cuda::Compact;
use super::ops::{seed_of, Region, Storage, Term};
use super::plan::{Binding, Bound, Rules, Strengths};
use super::restore::{prove, Backup, BackupPlace};
use super::{Prepared, Work};
use crate::adapter::Adapter;
use crate::cuda::Stream;
use crate::dtype::Float;
use crate::dtype::Rounding;
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
    /// Where the last copies went, and why.
    placed: Option<(BackupPlace, String)>,
    /// Of stochastic rounding, if that is wanted.
    seed: Option<u32>,
    self_check: bool,
    /// What the weights hold; of one that is changed and has nothing here it is not known.
    applied: Contents,
    prepared: Prepared,
    /// Of weights that are merged in place, by their device.
    compact: HashMap<usize, Compact>,
    rules: Rules,
}

struct Target {
    name: String,
    weight: View,
    /// Whether several indices reach the same element, which nothing can be merged into.
    repeats: bool,
    storage: Storage,
    /// The base, from when the weight is first changed until it holds the base again.
    backup: Option<Backup>,
    /// Of the base, where that was asked for.
    checksum: Option<u64>,
}

/// (adapter, index into its binding, strength)
type Content = (AdapterId, usize, f64);

/// What is added to every target.
#[derive(Default)]
struct Contents {
    /// Target by target, in the order of the adapters.
    all: Vec<Content>,
    /// Where those of each target begin, and the end.
    first: Vec<usize>,
}

impl Contents {
    /// Sorts (target, content) by target.
    fn new(targets: usize, found: &[(usize, Content)]) -> Self {
        let mut first = vec![0; targets + 1];
        found.iter().for_each(|(target, _)| first[target + 1] += 1);
        (0..targets).for_each(|i| first[i + 1] += first[i]);
        let (mut next, mut all) = (first.clone(), vec![(0, 0, 0.0); found.len()]);
        for &(target, content) in found {
            all[next[target]] = content;
            next[target] += 1;
        }
        Contents { all, first }
    }

    fn of(&self, target: usize) -> &[Content] {
        match self.first.get(target..target + 2) {
            Some(&[from, to]) => &self.all[from..to],
            _ => &[],
        }
    }
}

struct Entry {
    id: AdapterId,
    adapter: Arc<Adapter>,
    binding: Binding,
    /// By index into the binding.
    strengths: Vec<f64>,
}

impl Entry {
    fn set(&mut self, strengths: &Strengths) {
        let modules = self.adapter.modules();
        let of = |bound: &Bound| strengths.of(&modules[bound.module].name, bound.part);
        self.strengths = self.binding.bound.iter().map(of).collect();
    }
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
            placed: None,
            seed: None,
            self_check: false,
            applied: Contents::default(),
            prepared: Prepared::default(),
            compact: HashMap::new(),
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
        let repeats = weight.repeats_elements();
        let writable = |w: &View, repeats: bool| w.count() > 0 && !repeats;
        let same = |w: &View| w.data() == weight.data() && w.device() == weight.device();
        let twin = self.targets.iter().find(|t| same(&t.weight) && writable(&t.weight, t.repeats));
        if let Some(other) = twin.filter(|_| writable(&weight, repeats)) {
            let what = format!("targets `{}` and `{name}` are the same memory", other.name);
            return Err(Error::argument(what, "register it once, and name it a second time with an alias"));
        }
        let index = self.targets.len();
        self.by_name.insert(name.to_owned(), index);
        let storage = self.storage(name);
        let name = name.to_owned();
        self.targets.push(Target { name, weight, repeats, storage, backup: None, checksum: None });
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
        let mut entry = Entry { id, adapter, binding, strengths: Vec::new() };
        entry.set(&strengths);
        self.entries.push(entry);
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
        self.entries[at].set(&strengths);
        Ok(())
    }

    /// Takes an adapter off the stack; takes effect with the next `apply`.
    pub fn remove_adapter(&mut self, id: AdapterId) -> Result<()> {
        let at = self.entry(id)?;
        self.entries.remove(at);
        self.prepared = Prepared::default();
        self.compact.values_mut().for_each(Compact::forget_ops);
        Ok(())
    }

    /// The load report of an adapter on this stack.
    pub fn report(&mut self, id: AdapterId) -> Result<serde_json::Value> {
        let at = self.entry(id)?;
        Ok(report::json(&self.entries[at].adapter, Some(&self.entries[at].binding)))
    }

    fn storage(&self, name: &str) -> Storage {
        let rounding =
            self.seed.map_or(Rounding::Nearest, |seed| Rounding::Stochastic { seed: seed_of(name, seed) });
        Storage { rounding, ..Storage::default() }
    }

    /// Results in weights of 8 bits are rounded stochastically with this seed, or to nearest. All before the first adapter.
    pub fn set_rounding(&mut self, seed: Option<u32>) -> Result<()> {
        self.before_adapters("the rounding is set")?;
        self.seed = seed;
        for i in 0..self.targets.len() {
            let rounding = self.storage(&self.targets[i].name).rounding;
            self.targets[i].storage.rounding = rounding;
        }
        Ok(())
    }

    /// The real weight is `scale` times what is stored; for weights of 8 bits. Before the first adapter.
    pub fn set_scale(&mut self, target: &str, scale: f32) -> Result<()> {
        self.before_adapters("a scale is set")?;
        let at = self.target(target)?;
        let target = &mut self.targets[at];
        if !(scale.is_finite() && scale != 0.0) {
            let what = format!("`{}`: scale is {scale}", target.name);
            return Err(Error::argument(what, "pass the number that the stored weight is multiplied with"));
        }
        if scale != 1.0 && !Float::of(target.weight.dtype()).is_some_and(Float::is_eight_bits) {
            let what = format!("`{}` is {} and has a scale", target.name, target.weight.dtype());
            return Err(Error::argument(what, "only weights of 8 bits have one"));
        }
        target.storage.scale = scale;
        Ok(())
    }

    fn before_adapters(&self, what: &str) -> Result<()> {
        match self.entries.is_empty() {
            true => Ok(()),
            false => Err(Error::argument(format!("{what} after the first adapter"), "do it before")),
        }
    }

    /// Whether every weight that gets its base back is compared with a checksum taken before it was first changed.
    pub fn self_check(&mut self, on: bool) {
        self.self_check = on;
    }

    /// What the stack holds and how it works, for people.
    pub fn info(&self) -> serde_json::Value {
        let device = self.device();
        let executor = match device {
            Device::Cpu => "cpu",
            Device::Cuda(index) if super::fused(index).is_ok() => "kernels",
            Device::Cuda(_) => "libtorch",
        };
        let copies = self.targets.iter().filter_map(|t| t.backup.as_ref());
        let copies = copies.map(|copy| (1, copy.view().byte_len()));
        let kept = copies.chain(self.compact.values().map(Compact::size));
        let (count, bytes) = kept.fold((0, 0), |(n, bytes), (more, size)| (n + more, bytes + size));
        let mode = self.placed.as_ref().map(|(place, why)| {
            let mode = match place {
                BackupPlace::Host => "host",
                BackupPlace::Compact => "compact",
                BackupPlace::Device | BackupPlace::Auto => "device",
            };
            serde_json::json!({"mode": mode, "why": why, "weights": count, "bytes": bytes})
        });
        serde_json::json!({
            "device": device.to_string(),
            "executor": executor,
            "targets": self.targets.len(),
            "adapters": self.entries.len(),
            "backup": mode,
            "self_check": self.self_check,
        })
    }

    /// What every target should hold, by the strengths as they are set.
    fn wanted(&self) -> Contents {
        let mut found = Vec::with_capacity(self.entries.iter().map(|entry| entry.strengths.len()).sum());
        for entry in &self.entries {
            let each = entry.binding.bound.iter().zip(&entry.strengths).enumerate();
            let switched_on = each.filter(|(_, (_, &strength))| strength != 0.0);
            found.extend(switched_on.map(|(i, (bound, &strength))| (bound.target, (entry.id, i, strength))));
        }
        Contents::new(self.targets.len(), &found)
    }

    /// Writes every weight whose wanted terms differ from what it holds. Reports in weights. Work on a GPU is enqueued on `stream`.
    ///
    /// On an error or a cancel all weights are the base again, bit for bit.
    pub fn apply(&mut self, stream: Stream, progress: &mut Progress<'_>) -> Result<Applied> {
        self.apply_terms(stream, progress).inspect_err(|_| {
            // What went wrong first is what the caller must hear.
            let _ = self.restore(stream);
        })
    }

    fn apply_terms(&mut self, stream: Stream, progress: &mut Progress<'_>) -> Result<Applied> {
        let wanted = self.wanted();
        let changes = |i: usize| match wanted.of(i) {
            [] => self.is_changed(i),
            content => content != self.applied.of(i),
        };
        let due: Vec<usize> = (0..self.targets.len()).filter(|&i| changes(i)).collect();
        let with = |i: usize| !wanted.of(i).is_empty();
        let kept =
            (0..self.targets.len()).filter(|&i| with(i)).count() - due.iter().filter(|&&i| with(i)).count();
        for target in due.iter().map(|&i| &self.targets[i]).filter(|target| target.repeats) {
            super::check_target(&target.name, &target.weight)?;
        }
        if !due.is_empty() {
            // Until all is written, nothing is there that could be wanted.
            self.applied = Contents::default();
        }
        let mut done = 0;
        for device in self.devices_of(&due) {
            let here = |&i: &usize| self.targets[i].weight.device() == device;
            let (merged, bare): (Vec<usize>, Vec<usize>) =
                due.iter().copied().filter(here).partition(|&i| with(i));
            self.give_back(&bare, stream)?;
            done += bare.len();
            let (in_place, copied) = self.places(device, &merged, &wanted)?;
            if !in_place.is_empty() {
                progress.at(done as u64, due.len() as u64)?;
                self.merge_in_place(device, &in_place, &wanted, stream)?;
                done += in_place.len();
            }
            let fresh = self.take_backups(&copied, stream)?;
            self.merge(device, &copied, &fresh, &wanted, stream, &mut |n| {
                progress.at((done + n) as u64, due.len() as u64)
            })?;
            done += copied.len();
        }
        progress.at(due.len() as u64, due.len() as u64)?;
        self.applied = wanted;
        Ok(Applied { changed: due.len(), kept })
    }

    /// The devices that these targets are on, each once.
    fn devices_of(&self, targets: &[usize]) -> Vec<Device> {
        let mut devices: Vec<Device> = Vec::new();
        for device in targets.iter().map(|&i| self.targets[i].weight.device()) {
            if !devices.contains(&device) {
                devices.push(device);
            }
        }
        devices
    }

    /// Whether a weight is merged in place at present.
    fn holds(&self, index: usize) -> bool {
        let weight = &self.targets[index].weight;
        matches!(weight.device(), Device::Cuda(i) if self.compact.get(&i).is_some_and(|c| c.holds(weight)))
    }

    /// Whether a weight may hold something else than its base.
    fn is_changed(&self, index: usize) -> bool {
        self.targets[index].backup.is_some() || self.holds(index)
    }

    /// Which of these weights, all on one device, are merged in place and which from copies.
    fn places(
        &mut self,
        device: Device,
        targets: &[usize],
        wanted: &Contents,
    ) -> Result<(Vec<usize>, Vec<usize>)> {
        let Device::Cuda(index) = device else { return Ok((Vec::new(), targets.to_vec())) };
        let free = |&i: &usize| self.targets[i].backup.is_none();
        let mut rest: Vec<usize> = targets.iter().copied().filter(free).collect();
        let new: Vec<usize> = rest.iter().copied().filter(|&i| !self.holds(i)).collect();
        if !new.is_empty() {
            let placed = Backup::place(&self.views(&new), self.place, true);
            if placed.0 != BackupPlace::Compact {
                rest.retain(|&i| self.holds(i));
            }
            self.placed = Some(placed);
        }
        let (none, mut in_place) = (Compact::default(), vec![false; self.targets.len()]);
        let compact = self.compact.get(&index).unwrap_or(&none);
        let terms = Terms::new(&self.entries, wanted, &rest);
        for (&i, terms) in rest.iter().zip(terms.each()) {
            let Target { name, weight, storage, .. } = &self.targets[i];
            let job = Work { name, base: weight, out: weight, storage: *storage, terms, pristine: None };
            in_place[i] = compact.takes(&job)?;
        }
        Ok(targets.iter().partition(|&&i| in_place[i]))
    }

    fn views(&self, targets: &[usize]) -> Vec<(&str, &View)> {
        targets.iter().map(|&i| (&self.targets[i].name[..], &self.targets[i].weight)).collect()
    }

    /// Copies the weights that have no copy yet, all on one device, and says which those were.
    fn take_backups(&mut self, targets: &[usize], stream: Stream) -> Result<Vec<usize>> {
        let without: Vec<usize> =
            targets.iter().copied().filter(|&i| self.targets[i].backup.is_none()).collect();
        if without.is_empty() {
            return Ok(without);
        }
        // Those that were merged in place until now.
        let held: Vec<usize> = without.iter().copied().filter(|&i| self.holds(i)).collect();
        self.give_back(&held, stream)?;
        let placed = Backup::place(&self.views(&without), self.place, false);
        let backups = Backup::take(&self.views(&without), placed.0, stream)?;
        self.remember(&without, stream)?;
        // Of some weights in place and some copies the first is worth telling.
        if self.compact.is_empty() {
            self.placed = Some(placed);
        }
        for (&i, backup) in without.iter().zip(backups) {
            self.targets[i].backup = Some(backup);
        }
        Ok(without)
    }

    /// Takes the checksums of pristine weights, all on one device, if that is wanted; waits for the stream.
    fn remember(&mut self, targets: &[usize], stream: Stream) -> Result<()> {
        if !self.self_check {
            return Ok(());
        }
        let sums = super::checksum::of(&self.views(targets), stream)?;
        for (&i, sum) in targets.iter().zip(sums) {
            self.targets[i].checksum = Some(sum);
        }
        Ok(())
    }

    /// Gives weights their base back and drops the copies; all on one device.
    fn give_back(&mut self, targets: &[usize], stream: Stream) -> Result<()> {
        let changed: Vec<usize> = targets.iter().copied().filter(|&i| self.is_changed(i)).collect();
        let pairs: Vec<(&str, &Backup, &View)> = changed
            .iter()
            .filter_map(|&i| {
                let target = &self.targets[i];
                Some((&target.name[..], target.backup.as_ref()?, &target.weight))
            })
            .collect();
        Backup::give_back(&pairs, stream)?;
        for (&index, compact) in &mut self.compact {
            let weights = changed.iter().map(|&i| &self.targets[i].weight);
            let here: Vec<&View> = weights.filter(|w| w.device() == Device::Cuda(index)).collect();
            super::restore_in_place(index, stream, &here, compact)?;
        }
        if self.self_check && !changed.is_empty() {
            let known = changed.iter().map(|&i| &self.targets[i]);
            let known: Vec<_> = known.map(|t| (&t.name[..], t.checksum, &t.weight)).collect();
            prove(&known, stream)?;
        }
        for &i in targets {
            self.targets[i].backup = None;
        }
        Ok(())
    }

    fn merge_in_place(
        &mut self,
        device: Device,
        targets: &[usize],
        wanted: &Contents,
        stream: Stream,
    ) -> Result<()> {
        let Device::Cuda(index) = device else { return Ok(()) };
        let new: Vec<usize> = targets.iter().copied().filter(|&i| !self.holds(i)).collect();
        self.remember(&new, stream)?;
        let terms = Terms::new(&self.entries, wanted, targets);
        let job = |(&i, terms)| {
            let Target { name, weight, storage, .. } = &self.targets[i];
            Work { name, base: weight, out: weight, storage: *storage, terms, pristine: None }
        };
        let jobs: Vec<Work<'_>> = targets.iter().zip(terms.each()).map(job).collect();
        let compact = self.compact.entry(index).or_default();
        super::merge_in_place(index, stream, &jobs, &mut self.prepared, compact)
    }

    /// Merges targets that all have copies; the `fresh` ones, in the same order, still hold what is in them.
    fn merge(
        &mut self,
        device: Device,
        targets: &[usize],
        fresh: &[usize],
        wanted: &Contents,
        stream: Stream,
        between: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let terms = Terms::new(&self.entries, wanted, targets);
        let (mut fresh, mut jobs) = (fresh.iter().peekable(), Vec::with_capacity(targets.len()));
        for (&i, terms) in targets.iter().zip(terms.each()) {
            let holds_base = fresh.next_if_eq(&&i).is_some();
            let Target { name, weight, backup: Some(backup), storage, .. } = &self.targets[i] else {
                continue;
            };
            // What went down to host memory a moment ago need not come up again.
            let base = match holds_base && backup.view().device() != weight.device() {
                true => weight,
                false => backup.view(),
            };
            let pristine = Some(backup.number());
            jobs.push(Work { name, base, out: weight, storage: *storage, terms, pristine });
        }
        super::merge_all(device, stream, &jobs, &mut self.prepared, between)
    }

    /// Gives every weight its base back, bit for bit, and frees the copies. Adapters and strengths stay.
    pub fn restore(&mut self, stream: Stream) -> Result<()> {
        let mut result = Ok(());
        self.applied = Contents::default();
        let with: Vec<usize> = (0..self.targets.len()).filter(|&i| self.is_changed(i)).collect();
        for device in self.devices_of(&with) {
            let here: Vec<usize> =
                with.iter().copied().filter(|&i| self.targets[i].weight.device() == device).collect();
            // The others still get their base.
            result = result.and(self.give_back(&here, stream));
        }
        self.prepared = Prepared::default();
        if result.is_ok() {
            self.compact.clear();
        }
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
                let each = entry.binding.bound.iter().zip(&entry.strengths);
                each.filter(|(bound, _)| bound.target == at)
                    .flat_map(|(bound, &strength)| bound.terms(strength))
            })
            .collect();
        if self.holds(at) && terms.iter().any(|term| term.op.reads_weight()) {
            let what =
                format!("`{target}` is merged in place, and an adapter that was added since reads its base");
            return Err(Error::argument(what, "call lycore_stack_apply or lycore_stack_restore before"));
        }
        let base = self.targets[at].backup.as_ref().map_or(&self.targets[at].weight, Backup::view);
        super::forward(target, base, geometry, x, y, &terms, &mut self.prepared)
    }
}

/// The terms of some targets, one after the other.
struct Terms<'a> {
    all: Vec<Term<'a>>,
    ends: Vec<usize>,
}

impl<'a> Terms<'a> {
    fn new(entries: &'a [Entry], contents: &Contents, targets: &[usize]) -> Self {
        let (mut all, mut ends) = (Vec::with_capacity(contents.all.len()), Vec::with_capacity(targets.len()));
        for &i in targets {
            for &(id, bound, strength) in contents.of(i) {
                let entry = entries.iter().find(|entry| entry.id == id);
                all.extend(entry.into_iter().flat_map(|e| e.binding.bound[bound].terms(strength)));
            }
            ends.push(all.len());
        }
        Terms { all, ends }
    }

    /// Those of each target.
    fn each(&self) -> impl Iterator<Item = &[Term<'a>]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.all[start..end])
    }
}
