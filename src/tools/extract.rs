//! A LoRA from two checkpoints: the difference of every Linear and convolution weight, cut to a rank.
//!
//! Weights are taken in pairs of one name and shape, of the diffusion model and of text encoders; a pair without a difference gives no module.
//! The rank is fixed, or the smallest that keeps a share of the difference's energy. Large matrices are decomposed by a random sketch
//! (arXiv:0909.4061); the report's errors are of what was written, not of what an exact decomposition would have left.

use super::delta;
use super::naming::{Namer, Spelling};
use super::options::Reader;
use super::sheet::{self, Part};
use super::svd::{balance, Decomposition};
use crate::adapter::safetensors::{Entry, File};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::linalg::Matrix;
use crate::progress::Progress;
use crate::view::Tensor;
use serde_json::{json, Value};
use std::path::Path;

/// What to extract.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The most ranks of a module.
    pub rank: usize,
    /// The most ranks of a convolution with a kernel above 1; `None`: as `rank`.
    pub conv_rank: Option<usize>,
    /// The share of a difference's energy (the square of its norm) that is enough.
    pub energy: Option<f64>,
    /// Modules of which no value differs by more are left out.
    pub min_diff: f64,
    /// Of the factors; `None`: that of the tuned weight.
    pub dtype: Option<Float>,
    /// Whether norms and biases are extracted too, as they are.
    pub norms: bool,
    /// How modules are named.
    pub spelling: Spelling,
}

const KEYS: &[&str] = &["rank", "conv_rank", "energy", "min_diff", "dtype", "norms", "spelling"];

impl Options {
    /// Reads the JSON of the C ABI.
    pub fn parse(text: &str) -> Result<Self> {
        let mut read = Reader::new(text, KEYS)?;
        let (rank, conv_rank) = (read.rank("rank"), read.rank("conv_rank"));
        if !read.has("rank") {
            read.problem("`rank` is missing");
        }
        let energy = read.number("energy", 0.0, 1.0);
        // Zero is as good as absent, and is what people write.
        let min_diff =
            if read.is_zero("min_diff") { None } else { read.number("min_diff", 0.0, f64::INFINITY) };
        let (dtype, norms) = (read.dtype(), read.flag("norms"));
        let words = [("kohya", Spelling::Kohya), ("checkpoint", Spelling::Checkpoint)];
        let spelling = read.choice("spelling", &words).unwrap_or(Spelling::Kohya);
        let (rank, min_diff) = (rank.unwrap_or(1), min_diff.unwrap_or(0.0));
        read.finish(Options { rank, conv_rank, energy, min_diff, dtype, norms, spelling })
    }
}

/// One weight in both checkpoints.
struct Pair<'a> {
    tuned: &'a Entry,
    base: &'a Entry,
    kind: Kind,
}

enum Kind {
    /// Names of the modules, of which each has as many rows.
    Weight(Vec<String>),
    /// Key of a tensor that is taken as it is.
    Plain(String),
}

/// Writes what `tuned` has beyond `base` to `output`, which appears whole or not at all. Progress counts weights.
pub fn extract(
    tuned: &Path,
    base: &Path,
    output: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Value> {
    let (tuned, base) = (File::open(tuned)?, File::open(base)?);
    let (pairs, skipped) = pairs(&tuned, &base, options)?;
    let (mut parts, mut entries, mut same) = (Vec::new(), Vec::new(), 0usize);
    super::each(
        &pairs,
        progress,
        |pair| made(&tuned, &base, pair, options),
        |pair, made| {
            tuned.release(pair.tuned.begin, pair.tuned.end);
            base.release(pair.base.begin, pair.base.end);
            same += usize::from(made.is_empty());
            for (own, entry) in made {
                parts.extend(own);
                entries.push(entry);
            }
            Ok(())
        },
    )?;
    if entries.is_empty() {
        let what = format!(
            "{} and {} do not differ in any of the {} weights that both have by more than {}",
            tuned.path().display(),
            base.path().display(),
            pairs.len(),
            options.min_diff
        );
        return Err(Error::argument(what, "are these the tuned checkpoint and its base?"));
    }
    let how = json!({"tuned": name_of(&tuned), "base": name_of(&base), "rank": options.rank, "conv_rank": options.conv_rank,
        "energy": options.energy});
    let mut metadata = sheet::metadata(&Default::default(), None, ("lycore.extracted", how));
    let rank = if options.energy.is_some() { "Dynamic".to_owned() } else { options.rank.to_string() };
    metadata.insert("ss_network_module".into(), "networks.lora".into());
    metadata.insert("ss_network_dim".into(), rank.clone());
    metadata.insert("ss_network_alpha".into(), rank);
    sheet::write(output, &parts, &metadata)?;
    Ok(json!({
        "tuned": tuned.path().display().to_string(),
        "base": base.path().display().to_string(),
        "output": output.display().to_string(),
        "bytes": std::fs::metadata(output).map_err(|e| Error::io(output, e))?.len(),
        "summary": {"weights": pairs.len(), "modules": entries.len(), "unchanged": same, "skipped": skipped.len()},
        "modules": entries,
        "skipped": skipped,
    }))
}

fn name_of(file: &File) -> String {
    file.path().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The weights that both files have, and those of the tuned one that are left out, with the reason.
fn pairs<'a>(tuned: &'a File, base: &'a File, options: &Options) -> Result<(Vec<Pair<'a>>, Vec<Value>)> {
    let namer = Namer::of(tuned.entries().iter().map(|e| e.name.as_str()), options.spelling);
    let (mut pairs, mut skipped) = (Vec::new(), Vec::new());
    for entry in tuned.entries() {
        let kind = match namer.module(&entry.name) {
            Some(names) if entry.shape.len() > 1 => Kind::Weight(names),
            Some(names) if options.norms => match &names[..] {
                [name] => Kind::Plain(format!("{name}.w_norm")),
                _ => continue,
            },
            None if options.norms => {
                // A norm's bias stands beside a weight of one axis, a layer's beside one of more.
                let weight = entry.name.strip_suffix(".bias").map(|root| format!("{root}.weight"));
                let beside = weight.and_then(|weight| tuned.get(&weight));
                match beside.and_then(|w| Some((w.shape.len(), namer.module(&w.name)?))) {
                    Some((axes, names)) if names.len() == 1 => {
                        let slot = if axes == 1 { "b_norm" } else { "diff_b" };
                        Kind::Plain(format!("{}.{slot}", names[0]))
                    }
                    _ => continue,
                }
            }
            _ => continue,
        };
        let mut skip = |why: String| skipped.push(json!({"weight": entry.name, "reason": why}));
        if matches!(&kind, Kind::Weight(names) if entry.shape[0] % names.len().max(1) != 0) {
            skip(format!("its {} rows are not those of three weights", entry.shape[0]));
            continue;
        }
        let Some(other) = base.get(&entry.name) else {
            skip("the base does not have it".into());
            continue;
        };
        if other.shape != entry.shape {
            skip(format!("its shape is {:?}, the base's {:?}", entry.shape, other.shape));
            continue;
        }
        if Float::wide(entry.dtype).is_none() || Float::wide(other.dtype).is_none() {
            skip(format!(
                "its dtype is {}, the base's {}; fp32, fp16 and bf16 are compared",
                entry.dtype, other.dtype
            ));
            continue;
        }
        pairs.push(Pair { tuned: entry, base: other, kind });
    }
    if pairs.is_empty() {
        let what = format!(
            "{} and {} have no weight of one name and shape",
            tuned.path().display(),
            base.path().display()
        );
        return Err(Error::argument(what, "both must be checkpoints of one model, in one layout"));
    }
    Ok((pairs, skipped))
}

fn tensor(file: &File, entry: &Entry) -> Result<Tensor> {
    file.tensor(entry)
        .ok_or_else(|| Error::Backend(format!("`{}`: its bytes do not fit its shape", entry.name)))
}

/// The modules of one weight, each with its line of the report.
fn made(tuned: &File, base: &File, pair: &Pair<'_>, options: &Options) -> Result<Vec<(Vec<Part>, Value)>> {
    let entry = pair.tuned;
    if pair.tuned.dtype == pair.base.dtype && tuned.bytes(pair.tuned) == base.bytes(pair.base) {
        return Ok(Vec::new());
    }
    let mut diff = tensor(tuned, pair.tuned)?.to_f32(&entry.name)?;
    diff.iter_mut().zip(tensor(base, pair.base)?.to_f32(&entry.name)?).for_each(|(d, b)| *d -= b);
    let differs = |part: &[f32]| part.iter().any(|d| f64::from(d.abs()) > options.min_diff || d.is_nan());
    let float = options.dtype.or(Float::of(entry.dtype)).unwrap_or(Float::F32);
    let names = match &pair.kind {
        Kind::Plain(_) if !differs(&diff) => return Ok(Vec::new()),
        Kind::Plain(key) => {
            if diff.iter().any(|d| !d.is_finite()) {
                return Err(delta::not_finite(&entry.name));
            }
            let part = Part::made(key.clone(), float, entry.shape.clone(), &diff)?;
            return Ok(vec![(vec![part], json!({"module": key, "weight": entry.name, "error": 0.0}))]);
        }
        Kind::Weight(names) => names,
    };
    let rows = entry.shape[0] / names.len().max(1);
    let cols: usize = entry.shape.iter().skip(1).product();
    let has_kernel = entry.shape.iter().skip(2).any(|&k| k != 1);
    let limit = options.conv_rank.filter(|_| has_kernel).unwrap_or(options.rank).min(rows).min(cols);
    let mut made = Vec::new();
    for (name, part) in names.iter().zip(diff.chunks_exact((rows * cols).max(1))) {
        if !differs(part) {
            continue;
        }
        let svd = Decomposition::whole(name, &Matrix::new(part.to_vec(), rows, cols), limit, false)?;
        let rank = match options.energy {
            Some(energy) => (1..limit).find(|&k| svd.energy(k) >= energy).unwrap_or(limit),
            None => limit,
        };
        let mut factors = svd.cut(rank);
        if float == Float::F16 {
            balance(&mut factors);
        }
        let error = svd.error(&factors, float);
        let (up, down) = factors;
        let ones = vec![1; entry.shape.len() - 2];
        let parts = vec![
            Part::made(
                format!("{name}.lora_down.weight"),
                float,
                [&[rank][..], &entry.shape[1..]].concat(),
                &down.values,
            )?,
            Part::made(
                format!("{name}.lora_up.weight"),
                float,
                [vec![rows, rank], ones].concat(),
                &up.values,
            )?,
            Part::alpha(format!("{name}.alpha"), &[], rank as f64)?,
        ];
        made.push((parts, json!({"module": name, "weight": entry.name, "rank": rank, "error": error})));
    }
    Ok(made)
}
