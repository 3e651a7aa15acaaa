//! Fewer ranks for a LoRA file: every module's `up @ down` becomes the nearest product of a lower rank.
//!
//! As sd-scripts does it: `up = U S`, `down = V'`, `alpha = alpha / rank * new rank`, so that the scale of the module stays. In fp16 files powers
//! of two move between the two factors (`svd::balance`), which changes no product. Of a Tucker module the core is folded into `down`; of
//! DoRA the magnitude, of every module bias and scalar stay as they are. What would not become smaller, and every other algorithm, is
//! copied bit for bit, so that the output is never larger than its source. Only `convert`, which turns LoHa and LoKr into LoRA, may
//! make a module larger: it is exact where the rank allows.

use super::delta::{self, Pair};
use super::options::Reader;
use super::rule::{retained, Method};
use super::sheet::{self, Part};
use super::source::{Group, Source};
use super::svd::{balance, Decomposition};
use crate::adapter::Module;
use crate::algo;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::merge::ops::{Op, Term};
use crate::progress::Progress;
use crate::view::Tensor;
use serde_json::{json, Value};
use std::path::Path;

/// What to keep.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The most ranks of a module; `None`: no limit, for methods that pick them.
    pub rank: Option<usize>,
    /// The most ranks of a convolution; `None`: as `rank`.
    pub conv_rank: Option<usize>,
    /// How ranks are picked.
    pub method: Method,
    /// Of the resized factors; `None`: each module's own.
    pub dtype: Option<Float>,
    /// Whether LoHa and LoKr become LoRA.
    pub convert: bool,
}

const KEYS: &[&str] = &["rank", "conv_rank", "method", "param", "dtype", "convert"];

impl Options {
    /// Reads the JSON of the C ABI.
    pub fn parse(text: &str) -> Result<Self> {
        let mut read = Reader::new(text, KEYS)?;
        let (rank, conv_rank) = (read.rank("rank"), read.rank("conv_rank"));
        let words = [("fixed", 0), ("sv_ratio", 1), ("sv_cumulative", 2), ("sv_fro", 3)];
        let method = read.choice("method", &words).unwrap_or(0);
        let param = match method {
            1 => read.number("param", 0.0, f64::INFINITY),
            _ => read.number("param", 0.0, 1.0),
        };
        match (method, param) {
            (0, _) if read.has("param") => read.problem("`param` has no meaning with method fixed"),
            (0, _) if !read.has("rank") => read.problem("`rank` is missing"),
            (1.., None) if !read.has("param") => {
                read.problem(format!("`param` is missing: method {} needs it", words[method].0))
            }
            _ => {}
        }
        let param = param.unwrap_or(1.0);
        let method =
            [Method::Fixed, Method::Ratio(param), Method::Cumulative(param), Method::Frobenius(param)]
                [method];
        let (dtype, convert) = (read.dtype(), read.flag("convert"));
        read.finish(Options { rank, conv_rank, method, dtype, convert })
    }

    fn limit(&self, conv: bool) -> usize {
        let rank = self.rank.unwrap_or(usize::MAX);
        if conv {
            self.conv_rank.unwrap_or(rank)
        } else {
            rank
        }
    }
}

const UP: &str = "lora_up.weight";
const DOWN: &str = "lora_down.weight";
const MID: &str = "lora_mid.weight";

/// What becomes of one group of the file.
struct Made {
    /// `None`: it is copied.
    parts: Option<Vec<Part>>,
    entry: Value,
}

/// Writes `source` with fewer ranks to `output`, which appears whole or not at all and may be `source` itself. Progress counts modules.
pub fn resize(source: &Path, output: &Path, options: &Options, progress: &mut Progress<'_>) -> Result<Value> {
    let source = Source::open(source)?;
    if source.adapter.config().is_some() {
        // Its ranks and alphas would say what the new tensors contradict.
        return Err(Error::Unsupported {
            what: format!(
                "{}: ranks and alphas stand in a PEFT configuration, which cannot follow",
                source.adapter.path().display()
            ),
            hint: "`lycore convert --to kohya` first, resize that, and convert it back".into(),
        });
    }
    let (mut parts, mut entries, mut changed) = (Vec::new(), Vec::new(), 0usize);
    let groups: Vec<&Group> = source.groups().iter().collect();
    super::each(
        &groups,
        progress,
        |group| made(&source, group, options),
        |group, made| {
            source.release(group);
            changed += usize::from(made.parts.is_some());
            parts.extend(match made.parts {
                Some(parts) => parts,
                None => source.copied(group)?,
            });
            if !made.entry.is_null() {
                entries.push(made.entry);
            }
            Ok(())
        },
    )?;
    if changed == 0 && source.is_self_contained() {
        source.copy(output)?;
    } else {
        let how = json!({"method": options.method.name(), "param": options.method.param(), "rank": options.rank,
            "conv_rank": options.conv_rank});
        let ranks = match (options.method, options.rank) {
            (Method::Fixed, Some(rank)) => one_alpha(&entries).map(|alpha| (rank.to_string(), alpha)),
            _ => None,
        };
        let ranks = ranks.or_else(|| Some(("Dynamic".into(), "Dynamic".into())));
        let metadata = sheet::metadata(source.adapter.metadata(), ranks, ("lycore.resized", how));
        sheet::write(output, &parts, &metadata)?;
    }
    drop(parts);
    let mut bytes = std::fs::metadata(output).map_err(|e| Error::io(output, e))?.len();
    if bytes > source.len() && !options.convert && source.is_self_contained() {
        // A few ranks fewer of tiny modules do not pay for the words about it.
        source.copy(output)?;
        bytes = source.len();
        entries
            .iter_mut()
            .for_each(|entry| *entry = copied_entry(entry, "the whole file would not become smaller"));
        changed = 0;
    }
    Ok(json!({
        "source": source.adapter.path().display().to_string(),
        "output": output.display().to_string(),
        "method": options.method.name(),
        "bytes": {"source": source.len(), "output": bytes},
        "summary": {"modules": entries.len(), "resized": changed, "copied": entries.len() - changed},
        "modules": entries,
    }))
}

/// The alpha of all resized modules, when they agree, as sd-scripts writes it.
fn one_alpha(entries: &[Value]) -> Option<String> {
    let mut alphas = entries.iter().filter_map(|e| e["new_alpha"].as_f64());
    let first = alphas.next()?;
    alphas.all(|a| a == first).then(|| format!("{first:?}"))
}

/// The report's line of a module that is copied.
fn copied_entry(module: &Value, why: &str) -> Value {
    json!({"module": module["module"], "algorithm": module["algorithm"], "status": "copied", "reason": why,
        "old_rank": module["old_rank"], "new_rank": module["old_rank"]})
}

fn made(source: &Source, group: &Group, options: &Options) -> Result<Made> {
    let Some(module) = source.module(group) else { return Ok(Made { parts: None, entry: Value::Null }) };
    let algorithm = &module.algorithm;
    let about = json!({"module": module.name, "algorithm": algorithm.name(), "old_rank": algorithm.rank()});
    let copy = |why: &str| Ok(Made { parts: None, entry: copied_entry(&about, why) });
    let is_lora = algorithm.tensors().iter().any(|(slot, _)| *slot == UP);
    let converts =
        options.convert && matches!(algorithm.name(), "LoHa" | "LoKr" | "DoRA (LoHa)" | "DoRA (LoKr)");
    if !is_lora && !converts {
        return copy("only LoRA and LoCon have ranks to cut");
    }
    let shape = delta::shape_of(module)?;
    let ops = algorithm.lower(&module.name, &shape)?;
    let op = match &ops[..] {
        [Op::Decompose(op)] if op.inside.len() == 1 => &op.inside[0],
        [op] => op,
        _ => return copy("is more than one product"),
    };
    match op {
        Op::LowRank(_) if is_lora => resized(source, group, module, op, &shape, options, about.clone()),
        Op::Hadamard(_) | Op::Kron(_) => converted(source, module, op, &shape, options, about.clone()),
        _ => copy("only LoRA and LoCon have ranks to cut"),
    }
}

/// A LoRA or LoCon.
fn resized(
    source: &Source,
    group: &Group,
    module: &Module,
    op: &Op,
    shape: &[usize],
    options: &Options,
    about: Value,
) -> Result<Made> {
    let copy = |why: &str| Ok(Made { parts: None, entry: copied_entry(&about, why) });
    let tensors = module.algorithm.tensors();
    let get = |slot: &str| tensors.iter().find(|(s, _)| *s == slot).map(|(_, t)| *t);
    let (Some(up), Some(down), Some(old)) = (get(UP), get(DOWN), module.algorithm.rank()) else {
        return copy("only LoRA and LoCon have ranks to cut");
    };
    let limit = options.limit(shape.len() > 2);
    let side = shape[0].min(shape.iter().skip(1).product());
    if options.method == Method::Fixed && limit >= old {
        return copy("has no more ranks than asked for");
    }
    let svd = Decomposition::product(&module.name, delta::factors(module, op)?)?;
    let new = options.method.rank(&svd.values, side, limit);
    if new >= old {
        return copy("needs all its ranks");
    }
    let float = |own: &Tensor| options.dtype.or_else(|| Float::wide(own.dtype())).unwrap_or(Float::F32);
    let coarsest = if float(up) == Float::F32 { float(down) } else { float(up) };
    let mut pair = padded(svd.cut(new), new);
    if coarsest == Float::F16 {
        balance(&mut pair);
    }
    let error = svd.error(&pair, coarsest);
    let ones = |t: &Tensor| vec![1; t.shape().len().saturating_sub(2)];
    let name = |slot: &str| source.key(module, slot);
    let mut parts = vec![
        Part::made(name(DOWN), float(down), [&[new][..], &shape[1..]].concat(), &pair.1.values)?,
        Part::made(name(UP), float(up), [vec![shape[0], new], ones(up)].concat(), &pair.0.values)?,
    ];
    let (alpha, old_scale) = (get("alpha"), algo::scale(module.algorithm.alpha(), old));
    let new_alpha = old_scale * new as f64;
    if alpha.is_some() {
        parts.push(Part::alpha(name("alpha"), alpha.map_or(&[], |t| t.shape()), new_alpha)?);
    }
    for (slot, tensor) in &tensors {
        if ![UP, DOWN, MID, "alpha"].contains(slot) {
            parts.push(Part::kept(name(slot), tensor));
        }
    }
    let before: usize = source.copied(group)?.iter().map(Part::len).sum();
    if parts.iter().map(Part::len).sum::<usize>() > before {
        return copy("would take more bytes than before");
    }
    let (sum, fro) = retained(&svd.values, new);
    let mut entry = about;
    entry["status"] = json!("resized");
    entry["new_rank"] = json!(new);
    entry["new_alpha"] = json!(new_alpha);
    entry["sum_retained"] = json!(sum);
    entry["fro_retained"] = json!(fro);
    entry["error"] = json!(error);
    if get(MID).is_some() {
        entry["note"] = json!("its Tucker core is folded into the factors");
    }
    if get("dora_scale").or(get("lora_magnitude_vector")).is_some() {
        entry["note"] = json!("its magnitude is kept as it was");
    }
    Ok(Made { parts: Some(parts), entry })
}

/// A LoHa or LoKr as a LoRA: exact, or the nearest.
fn converted(
    source: &Source,
    module: &Module,
    op: &Op,
    shape: &[usize],
    options: &Options,
    about: Value,
) -> Result<Made> {
    if op.scale() == 0.0 {
        return Ok(Made {
            parts: None,
            entry: copied_entry(&about, "its scalar is 0, which no alpha can say"),
        });
    }
    let [rows, cols] = delta::size(op).unwrap_or_default();
    let (side, exact) = (rows.min(cols), delta::exact_rank(module, op).unwrap_or(usize::MAX));
    let limit = options.limit(shape.len() > 2).min(side);
    let tensors = module.algorithm.tensors();
    let float = options.dtype.unwrap_or_else(|| delta::float_of(tensors.iter().map(|(_, t)| *t)));
    let (pair, error, new, note) = if exact <= limit && options.method == Method::Fixed {
        let mut pair = delta::factors(module, op)?;
        if float == Float::F16 {
            balance(&mut pair);
        }
        (pair, 0.0, exact, "exact but for the rounding into its dtype")
    } else {
        let all = options.method != Method::Fixed;
        let svd = match op {
            Op::Kron(op) => {
                let (w1, w2) = (delta::matrix(&module.name, &op.w1)?, delta::matrix(&module.name, &op.w2)?);
                Decomposition::kron(&module.name, &w1, &w2)?
            }
            _ if exact < side => Decomposition::product(&module.name, delta::factors(module, op)?)?,
            _ => {
                let bare = op.clone().scaled(1.0 / op.scale()).unwrap_or_else(|| op.clone());
                let term = Term { op: &bare, strength: 1.0, slice: None };
                let whole = delta::sum(&module.name, &[rows, cols], &[term], None)?;
                Decomposition::whole(&module.name, &whole, limit, all)?
            }
        };
        let new = options.method.rank(&svd.values, side, limit).min(side);
        let mut pair = padded(svd.cut(new), new);
        if float == Float::F16 {
            balance(&mut pair);
        }
        let error = svd.error(&pair, float);
        (pair, error, new, "nearest of its rank")
    };
    let name = |slot: &str| sheet::key(module.dialect, &module.name, slot);
    let ones = vec![1; shape.len().saturating_sub(2)];
    let scalar = op.scale();
    let mut parts = vec![
        Part::made(name(DOWN), float, [&[new][..], &shape[1..]].concat(), &pair.1.values)?,
        Part::made(name(UP), float, [vec![shape[0], new], ones].concat(), &pair.0.values)?,
        Part::alpha(name("alpha"), &[], scalar * new as f64)?,
    ];
    for (slot, tensor) in &tensors {
        // The op's scale has the scalar in it already.
        if matches!(*slot, "dora_scale" | "lora_magnitude_vector" | "diff_b" | "reshape_weight") {
            parts.push(Part::kept(source.key(module, slot), tensor));
        }
    }
    let mut entry = about;
    entry["status"] = json!("converted");
    entry["new_rank"] = json!(new);
    entry["new_alpha"] = json!(scalar * new as f64);
    entry["error"] = json!(error);
    entry["note"] = json!(note);
    Ok(Made { parts: Some(parts), entry })
}

/// The pair with zeros up to this rank, where a matrix has fewer singular values.
fn padded((up, down): Pair, rank: usize) -> Pair {
    if up.cols >= rank {
        return (up, down);
    }
    let (had, width) = (up.cols, down.cols);
    let mut wide = crate::linalg::Matrix::zeros(up.rows, rank);
    for (to, from) in wide.values.chunks_exact_mut(rank).zip(up.values.chunks_exact(had.max(1))) {
        to[..had].copy_from_slice(from);
    }
    let mut down = down;
    down.values.resize(rank * width, 0.0);
    (wide, crate::linalg::Matrix::new(down.values, rank, width))
}
