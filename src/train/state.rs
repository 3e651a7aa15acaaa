//! Resume files: everything that the next step depends on, so that a run that was stopped ends on the same bits as one that was not.
//!
//! A safetensors file: `master`, `ema` if an average is kept and, when something is accumulated, `gradient`, all flat f32; and the optimizer's
//! state, in its dtypes and shapes. Its metadata holds the counters, the options and a table of the modules, by which another network's file is recognised.

use super::config::Config;
use super::keep::Run;
use super::metadata::{Session, SESSION, STARTED};
use super::network::{not_built, Built, Network};
use crate::adapter::safetensors::{File, Writer};
use crate::dtype::{byte_len, Dtype};
use crate::error::{Error, FileFault, Result};
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

/// Marks the file and its layout; another layout is another number.
const FORMAT: (&str, &str) = ("lycore_state", "2");

impl Network {
    /// Writes the resume file; the old one stays until the new one is complete.
    pub fn save_state(&self, path: &Path) -> Result<()> {
        let steps = self.settled_steps()?;
        let tensors = self.state_tensors(self.dirty || self.micro > 0)?;
        let metadata = BTreeMap::from([
            (FORMAT.0.to_owned(), FORMAT.1.to_owned()),
            ("step".into(), steps.to_string()),
            ("micro_step".into(), self.micro.to_string()),
            ("config".into(), self.config.to_json().to_string()),
            ("modules".into(), self.table().to_string()),
            ("run".into(), json!(self.run).to_string()),
            (SESSION.into(), self.session.id.clone()),
            (STARTED.into(), self.session.started_at.to_string()),
        ]);
        let header: Vec<_> = tensors
            .iter()
            .map(|(name, tensor)| Ok((name.to_string(), dtype(tensor)?, shape(tensor))))
            .collect::<Result<_>>()?;
        let mut writer = Writer::create(path, &header, &metadata)?;
        for ((_, tensor), (_, dtype, shape)) in tensors.iter().zip(&header) {
            let mut bytes = vec![0; byte_len(*dtype, shape).unwrap_or(0)];
            tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
            writer.write(&bytes)?;
        }
        writer.finish()
    }

    /// Takes up a run where `save_state` left it, on any device. The network must have the same modules, ranks, alphas and optimizer;
    /// options of schedule, clipping, precision and naming may differ. A file that does not fit changes nothing.
    pub fn load_state(&mut self, path: &Path) -> Result<()> {
        let wrong = |why: String| Error::File { path: path.to_owned(), fault: FileFault::WrongKind { why } };
        self.built()?;
        self.settled_steps()?;
        let file = File::open(path)?;
        let field = |name: &str| {
            let lacks = || wrong(format!("is a training state without `{name}` in its metadata: damaged"));
            file.metadata().get(name).ok_or_else(lacks)
        };
        match file.metadata().get(FORMAT.0).map(String::as_str) {
            Some(version) if version == FORMAT.1 => {}
            Some(version) => {
                return Err(wrong(format!(
                    "is a training state of format {version}; this version reads {}",
                    FORMAT.1
                )))
            }
            None => return Err(wrong("is not a training state (an adapter is read by load_weights)".into())),
        }
        let count = |name: &str| {
            let text = field(name)?;
            text.parse::<u64>().map_err(|_| wrong(format!("`{name}` is `{text}`, not a count")))
        };
        let (steps, micro) = (count("step")?, count("micro_step")?);
        let session = Session { id: field(SESSION)?.clone(), started_at: count(STARTED)? };
        let mut run: Run = serde_json::from_str(field("run")?).map_err(|e| wrong(format!("`run`: {e}")))?;
        let table: Value = serde_json::from_str(field("modules")?)
            .map_err(|e| wrong(format!("`modules` is not JSON: {e}")))?;
        if let Some(difference) = difference(&table, &self.table()) {
            return Err(wrong(format!("is the state of another network: {difference}")));
        }
        let config = Config::parse(field("config")?).map_err(|e| wrong(format!("`config`: {e}")))?;
        if config.saving.dir != self.config.saving.dir {
            // Files of the same names in another folder are others'.
            run.files.clear();
        }
        let (theirs, ours) = (config.optimizer.name(), self.config.optimizer.name());
        if theirs != ours {
            return Err(wrong(format!(
                "is the state of another optimizer, {theirs}; this network has {ours}"
            )));
        }
        let (theirs, ours) = (config.gradient_accumulation_steps, self.config.gradient_accumulation_steps);
        if micro > 0 && theirs != ours {
            return Err(wrong(format!(
                "was saved after {micro} of {theirs} accumulation steps; this network accumulates {ours}, so the step cannot be finished"
            )));
        }
        if micro >= theirs {
            return Err(wrong(format!("`micro_step` is {micro} of {theirs}: damaged")));
        }
        let with_gradient = file.get("gradient").is_some();
        let mut parts = Vec::new();
        for (name, to) in self.state_tensors(with_gradient)? {
            let (dtype, shape) = (dtype(to)?, shape(to));
            let entry = file.get(name).ok_or_else(|| {
                wrong(format!("lacks `{name}`: its optimizer or ema_decay has other options"))
            })?;
            if entry.dtype != dtype || entry.shape != shape {
                return Err(wrong(format!(
                    "`{name}` is {} {:?}, expected {dtype} {shape:?}",
                    entry.dtype, entry.shape
                )));
            }
            let value = Tensor::f_from_data_size(file.bytes(entry), &to.size(), to.f_kind()?)?;
            parts.push((to.shallow_clone(), value));
        }
        if file.entries().len() != parts.len() {
            return Err(wrong(
                "holds more tensors than this network has: its optimizer or ema_decay has other options"
                    .into(),
            ));
        }
        if !with_gradient {
            self.zero_gradients()?;
        }
        tch::no_grad(|| parts.iter_mut().try_for_each(|(to, from)| to.f_copy_(from)))?;
        let schedule = &self.config.schedule;
        let Built { params, fused, .. } = self.built.as_mut().ok_or_else(not_built)?;
        fused.as_mut().map(|fused| fused.start(steps, schedule)).transpose()?;
        params.refresh()?;
        params.settle()?;
        (self.steps, self.micro, self.dirty) = (steps, micro, with_gradient);
        (self.run, self.session) = (run, session);
        Ok(())
    }

    /// What the file holds, in its order.
    fn state_tensors(&self, with_gradient: bool) -> Result<Vec<(&'static str, &Tensor)>> {
        let built = self.built()?;
        let mut tensors = vec![("master", built.params.master())];
        tensors.extend(built.ema.as_ref().map(|ema| ("ema", ema)));
        tensors.extend(built.optimizer.state());
        tensors.extend(built.draws.as_ref().map(|draws| ("draws", draws)));
        if with_gradient {
            tensors.push(("gradient", built.params.gradient()));
        }
        Ok(tensors)
    }

    /// The modules in the order of their names, with all that decides the meaning of their values.
    fn table(&self) -> Value {
        let mut table = Map::new();
        for index in self.by_name() {
            let m = &self.modules[index];
            let shapes: Map<_, _> =
                m.parameters.iter().map(|p| (p.slot.to_owned(), json!(p.shape))).collect();
            let segments = self.built.as_ref().map_or(&[][..], |b| &b.params.segments()[m.range.clone()]);
            let offsets: Vec<usize> = segments.iter().map(|s| s.offset).collect();
            let constants: Map<_, _> = m
                .algorithm
                .constants()
                .into_iter()
                .map(|(slot, value)| (slot.to_owned(), json!(value)))
                .collect();
            let entry = json!({
                "algorithm": m.algorithm.name(), "weight": m.layer.weight, "constants": constants, "parameters": shapes, "offsets": offsets,
            });
            table.insert(m.name.clone(), entry);
        }
        Value::Object(table)
    }
}

/// How a tensor of the state stands in a file.
fn dtype(tensor: &Tensor) -> Result<Dtype> {
    match tensor.f_kind()? {
        Kind::Float => Ok(Dtype::F32),
        Kind::Double => Ok(Dtype::F64),
        Kind::Uint8 => Ok(Dtype::U8),
        Kind::Int64 => Ok(Dtype::I64),
        other => Err(Error::Backend(format!("no state file can hold {other:?}"))),
    }
}

fn shape(tensor: &Tensor) -> Vec<usize> {
    tensor.size().into_iter().map(|d| d as usize).collect()
}

/// The first difference between the table of a file and that of this network, in words.
fn difference(file: &Value, network: &Value) -> Option<String> {
    let empty = Map::new();
    let (theirs, ours) = (file.as_object().unwrap_or(&empty), network.as_object().unwrap_or(&empty));
    let only =
        |a: &Map<String, Value>, b: &Map<String, Value>| a.keys().find(|k| !b.contains_key(*k)).cloned();
    let counts = || format!("it has {} modules, this network {}", theirs.len(), ours.len());
    if let Some(name) = only(theirs, ours) {
        return Some(format!("{}; `{name}` is only in the file", counts()));
    }
    if let Some(name) = only(ours, theirs) {
        return Some(format!("{}; `{name}` is not in the file", counts()));
    }
    ours.iter().find_map(|(name, ours)| {
        let theirs = &theirs[name];
        let fields = ["algorithm", "weight", "constants", "parameters", "offsets"];
        let field = fields.into_iter().find(|&f| theirs.get(f) != ours.get(f))?;
        Some(format!(
            "`{name}` has {field} {} in the file, {} here",
            theirs.get(field).unwrap_or(&Value::Null),
            ours[field]
        ))
    })
}
