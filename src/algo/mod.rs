//! Every algorithm once: its keys, shapes, formula and initialisation, one file each. Nothing else knows a formula.
//!
//! To add one, write its file and put its [`Recipe`] in [`ALL`].

mod boft;
#[cfg(feature = "torch")]
mod dora;
#[cfg(feature = "torch")]
pub mod draw;
#[cfg(feature = "torch")]
mod dylora;
mod extras;
#[cfg(feature = "torch")]
mod factored;
#[cfg(feature = "torch")]
mod factorization;
pub mod full;
pub mod glora;
pub mod ia3;
pub mod loha;
pub mod lokr;
pub mod lora;
pub mod norm;
pub mod oft;
pub mod peft_oft;
pub mod set;
pub mod tlora;
#[cfg(feature = "torch")]
pub mod training;
#[cfg(all(test, feature = "torch"))]
mod training_tests;
pub mod vera;

use crate::adapter::metadata::PeftConfig;
use crate::error::{Error, Result};
use crate::merge::ops::{Dense, Op};
use crate::view::Tensor;
use std::fmt::Debug;
use std::sync::Arc;

/// One module of an adapter: what one file holds for one layer, read and checked.
pub trait Algorithm: Debug + Send + Sync {
    /// The field's name, as the report prints it.
    fn name(&self) -> &'static str;
    /// Rank of the factors; `None` where there are none.
    fn rank(&self) -> Option<usize> {
        None
    }
    /// `alpha` as the file gives it; `None` when it gives none.
    fn alpha(&self) -> Option<f32> {
        None
    }
    /// The shape of the layer's weight as far as the module's own tensors tell it: [O, I, kernel..], or [O, I * kernel] where factors are
    /// flattened. `None` when they do not.
    fn shape(&self) -> Option<Vec<usize>>;
    /// What the module does to the layer's weight of this shape, in the primitives of the executors, all on the pristine weight. Nothing for
    /// a module that has only a bias.
    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>>;
    /// What it does to the layer's bias of this shape.
    fn lower_bias(&self, _module: &str, _target: &[usize]) -> Result<Vec<Op>> {
        Ok(Vec::new())
    }
    /// Whether it changes the layer's weight, its bias.
    fn changes(&self) -> Changes {
        Changes { weight: true, bias: false }
    }
    /// The shape that the weight must first grow to, by zeros at the end of each axis.
    fn grown(&self) -> Option<&[usize]> {
        None
    }
    /// The module cut to its first `rank` ranks, for algorithms trained so that every prefix works; `None` for others.
    fn prefix(&self, _module: &str, _rank: usize) -> Option<Result<Box<dyn Algorithm>>> {
        None
    }
    /// What a user should know about how the file was read.
    fn note(&self) -> Option<String> {
        None
    }
    /// The tensors by their canonical names, as they are written to a file.
    fn tensors(&self) -> Vec<(&'static str, &Tensor)>;
}

/// Which parameters of its layer a module changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changes {
    /// The weight.
    pub weight: bool,
    /// The bias.
    pub bias: bool,
}

/// The named tensors of one module. Names are the canonical suffixes of `adapter::keys`.
#[derive(Debug, Default)]
pub struct Group {
    /// (suffix, tensor), in the order of the file.
    pub tensors: Vec<(&'static str, Tensor)>,
    /// PEFT keeps in a configuration what its files lack.
    pub config: Option<Arc<PeftConfig>>,
    /// Whether the layer's weight may have to grow to the module's own shape, without the module saying so.
    pub grows: bool,
}

impl Group {
    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|(n, _)| *n == name).map(|(_, t)| t)
    }
}

/// How one algorithm recognises its tensors and reads them.
pub struct Recipe {
    /// The field's name, as capabilities list it.
    pub name: &'static str,
    /// A module is this algorithm's when it holds any of these.
    pub marks: &'static [&'static str],
    /// Every tensor that the algorithm understands; another one in the group makes the module unsupported,
    /// since leaving it out would give a wrong picture.
    pub knows: &'static [&'static str],
    /// Reads and checks the tensors.
    pub read: fn(module: &str, group: &Group) -> Result<Box<dyn Algorithm>>,
}

/// The algorithms, in the order in which a module is tried.
pub static ALL: &[Recipe] = &[
    lora::RECIPE,
    lora::EMBEDDING,
    loha::RECIPE,
    lokr::RECIPE,
    glora::RECIPE,
    tlora::RECIPE,
    vera::RECIPE,
    oft::RECIPE,
    peft_oft::RECIPE,
    peft_oft::BUTTERFLY,
    full::RECIPE,
    norm::RECIPE,
    set::RECIPE,
    ia3::PEFT,
    ia3::RECIPE,
];

/// The algorithms that can be trained. DoRA goes around those that have a low rank: [`begin`].
#[cfg(feature = "torch")]
pub static TRAINED: &[training::Begin] = &[
    lora::BEGIN,
    lora::FROZEN_DOWN,
    dylora::BEGIN,
    loha::BEGIN,
    lokr::BEGIN,
    glora::BEGIN,
    tlora::BEGIN,
    oft::BEGIN,
    boft::BEGIN,
    ia3::BEGIN,
    full::BEGIN,
    norm::BEGIN,
];

/// A module in training for a layer, with DoRA around it where the rule says so. `weight` is the layer's own, fp32, where the host gave it.
#[cfg(feature = "torch")]
pub fn begin(
    begin: &training::Begin,
    layer: &training::Layer,
    rule: &training::Rule,
    weight: Option<&tch::Tensor>,
) -> Result<Box<dyn training::Trainable>> {
    if let Some(got) = weight.map(tch::Tensor::size).filter(|got| *got != training::long(&layer.weight)) {
        let got = got.into_iter().map(|d| d as usize).collect();
        let (tensor, expected) = (layer.name.clone(), layer.weight.clone());
        return Err(Error::Shape { tensor, what: "the layer's weight".into(), expected, got });
    }
    let inner = (begin.new)(layer, rule, weight)?;
    match rule.decompose.filter(|_| !layer.is_norm()) {
        None => Ok(inner),
        Some(on_output) => dora::decompose(layer, inner, on_output, weight),
    }
}

/// Reads one module. `Err(Unsupported)` names what this version does not know.
pub fn read(module: &str, group: Group) -> Result<Box<dyn Algorithm>> {
    let (extras, group) = extras::Extras::take(module, group)?;
    let inner = if group.tensors.iter().any(|(name, _)| *name != ALPHA) || extras.is_empty() {
        Some(read_plain(module, &group)?)
    } else {
        None
    };
    extras.around(module, inner)
}

/// Reads a module that has nothing but its algorithm's own tensors.
fn read_plain(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let has = |names: &[&str]| group.tensors.iter().any(|(n, _)| names.contains(n));
    let foreign = |knows: &[&str]| group.tensors.iter().find(|(n, _)| !knows.contains(n)).map(|(n, _)| *n);
    let unsupported = |name: &'static str| {
        let algorithm = crate::adapter::keys::algorithm_of(name).unwrap_or(name);
        Error::Unsupported {
            what: format!("`{module}`: {algorithm} (`{name}`) is not supported by this version"),
            hint: String::new(),
        }
    };
    match ALL.iter().find(|recipe| has(recipe.marks)) {
        Some(recipe) => match foreign(recipe.knows) {
            None => (recipe.read)(module, group),
            Some(name) if ALL.iter().any(|other| other.knows.contains(&name)) => Err(malformed(
                module,
                format!("`{name}` does not belong beside the tensors of {}", recipe.name),
            )),
            Some(name) => Err(unsupported(name)),
        },
        None => Err(match foreign(&["alpha"]) {
            Some(name) => unsupported(name),
            None => malformed(module, "has no factors"),
        }),
    }
}

/// The canonical name, if any algorithm has a tensor of this name.
pub fn known(slot: &str) -> Option<&'static str> {
    let mut all = ALL.iter().flat_map(|recipe| recipe.knows).chain(extras::NAMES);
    all.find(|known| **known == slot).copied()
}

/// Whether the tensor stands once in a file for all modules.
pub fn is_shared(slot: &str) -> bool {
    vera::SHARED.contains(&slot)
}

/// Whether a tensor that stands once in a file for all modules belongs to this one too.
pub fn shares(group: &Group, slot: &str) -> bool {
    let recipe = ALL.iter().find(|recipe| recipe.marks.iter().any(|mark| group.get(mark).is_some()));
    recipe.is_some_and(|recipe| recipe.knows.contains(&slot)) && group.get(slot).is_none()
}

/// Whether the tensor changes its layer's bias.
pub fn is_bias(slot: &str) -> bool {
    matches!(slot, "diff_b" | "b_norm" | "lora_up.bias")
}

/// A module whose tensors contradict each other.
pub fn malformed(module: &str, what: impl Into<String>) -> Error {
    Error::Key {
        key: module.to_owned(),
        file: None,
        what: what.into(),
        hint: "the file was written by a faulty program, or is damaged".into(),
    }
}

/// The tensor of this name, or an error that says that it is missing.
fn required<'a>(module: &str, group: &'a Group, name: &str) -> Result<&'a Tensor> {
    let tensor = group.get(name).ok_or_else(|| malformed(module, format!("`{name}` is missing")))?;
    crate::dtype::Float::require(tensor.dtype(), module)?;
    if tensor.count() == 0 {
        return Err(malformed(module, format!("`{name}` is empty: {:?}", tensor.shape())));
    }
    Ok(tensor)
}

/// One number of a module, as f32, and its tensor as it is written back: in the file's dtype where that is a float that hosts
/// understand, else in f32.
fn number(module: &str, name: &str, tensor: &Tensor) -> Result<(Tensor, f32)> {
    let Some(value) = tensor.scalar() else {
        let (dtype, shape, device) = (tensor.dtype(), tensor.shape(), tensor.device());
        let what = format!("`{name}` must be one number in host memory, it is {dtype} {shape:?} on {device}");
        return Err(malformed(module, what));
    };
    let value = value as f32;
    if !value.is_finite() {
        return Err(malformed(module, format!("`{name}` is {value}")));
    }
    let float = crate::dtype::Float::wide(tensor.dtype()).is_some();
    Ok((if float { tensor.clone() } else { Tensor::of_f32(vec![value], &[]) }, value))
}

/// A module's `alpha`, if it has one. An alpha from beside the file (PEFT's config) becomes a tensor.
fn alpha(module: &str, group: &Group) -> Result<(Option<Tensor>, Option<f32>)> {
    let given = group.config.as_ref().and_then(|c| c.alpha(module));
    let given = given.map(|a| Tensor::of_f32(vec![a], &[]));
    let Some(tensor) = group.get(ALPHA).or(given.as_ref()) else { return Ok((None, None)) };
    number(module, ALPHA, tensor).map(|(tensor, value)| (Some(tensor), Some(value)))
}

/// alpha / rank. LyCORIS and sd-scripts read a missing or zero alpha as the rank.
pub(crate) fn scale(alpha: Option<f32>, rank: usize) -> f64 {
    match alpha {
        Some(alpha) if alpha != 0.0 => f64::from(alpha) / rank as f64,
        _ => 1.0,
    }
}

/// A difference as an op on a weight or a bias of this shape.
fn dense(module: &str, diff: &Tensor, target: &[usize], scale: f64) -> Result<Op> {
    fit(module, diff.shape(), target)?;
    let rows = target.first().copied().unwrap_or(1);
    Ok(Op::Dense(Dense { diff: matrix(module, diff, rows)?, scale }))
}

/// The tensor as a matrix of this many rows, without moving anything.
fn matrix(module: &str, tensor: &Tensor, rows: usize) -> Result<Tensor> {
    tensor.reshape(&[rows, tensor.count() / rows.max(1)]).ok_or_else(|| {
        let what = format!("`{module}`: a factor of shape {:?} is not contiguous", tensor.shape());
        Error::argument(what, "call .contiguous() on it")
    })
}

/// Checks that a module's delta, `shape` by its own tensors, fits the weight. The flattened sizes decide, so that a 1x1 convolution fits a
/// Linear layer of the same size and the reverse; where both name a kernel, the kernels must agree too.
fn fit(module: &str, shape: &[usize], target: &[usize]) -> Result<()> {
    let flat = |s: &[usize]| (s.first().copied().unwrap_or(1), s.iter().skip(1).product::<usize>());
    let kernels_agree = shape.len() < 3 || target.len() != shape.len() || shape[2..] == target[2..];
    if flat(shape) == flat(target) && kernels_agree {
        return Ok(());
    }
    Err(Error::Shape {
        tensor: module.to_owned(),
        what: "the module does not fit the weight (module's shape first)".into(),
        expected: shape.to_vec(),
        got: target.to_vec(),
    })
}

/// A Tucker core and its inner factor as one: `[p, i, k] = sum_q core[p, q, k] inner[q, i]`, as a [p, i * k] matrix, computed in f64
/// and rounded once.
fn fold(module: &str, core: &Tensor, inner: &Tensor) -> Result<Tensor> {
    let (&[p, q, ref kernel @ ..], cols) = (core.shape(), inner.count() / inner.shape()[0]) else {
        return Err(malformed(
            module,
            format!("a Tucker core must be [r, r, kernel], it is {:?}", core.shape()),
        ));
    };
    let taps: usize = kernel.iter().product();
    if q != inner.shape()[0] {
        let what = format!("core {:?} and factor {:?} have different ranks", core.shape(), inner.shape());
        return Err(malformed(module, what));
    }
    let (core, inner) = (core.to_f32(module)?, inner.to_f32(module)?);
    let mut folded = vec![0f64; p * cols * taps];
    for (row, core) in folded.chunks_exact_mut(cols * taps).zip(core.chunks_exact(q * taps)) {
        for (core, inner) in core.chunks_exact(taps).zip(inner.chunks_exact(cols)) {
            for (out, &d) in row.chunks_exact_mut(taps).zip(inner) {
                out.iter_mut().zip(core).for_each(|(o, &c)| *o += f64::from(c) * f64::from(d));
            }
        }
    }
    Ok(Tensor::of_f32(folded.into_iter().map(|v| v as f32).collect(), &[p, cols * taps]))
}

/// The first `count` columns of a tensor seen as [first axis, rest], packed, in its own dtype.
fn columns(module: &str, tensor: &Tensor, count: usize) -> Result<Tensor> {
    let (rows, bytes) = (tensor.shape()[0], tensor.bytes());
    let width = bytes.map_or(0, |b| b.len() / rows.max(1));
    let each = crate::dtype::byte_len(tensor.dtype(), &[1]).filter(|size| count * size <= width);
    let (Some(bytes), Some(size)) = (bytes, each) else {
        let what = format!("`{module}`: a factor of shape {:?} is not packed in host memory", tensor.shape());
        return Err(Error::argument(what, "copy it to the CPU first"));
    };
    let cut = bytes.chunks_exact(width).flat_map(|row| &row[..count * size]).copied().collect();
    let mut shape = tensor.shape().to_vec();
    shape[1] = count;
    Tensor::of_vec(cut, tensor.dtype(), &shape).ok_or_else(|| malformed(module, "a factor cannot be cut"))
}

/// The transpose of a matrix, in f32.
fn transposed(module: &str, tensor: &Tensor) -> Result<Tensor> {
    let (rows, cols) = (tensor.shape()[0], tensor.count() / tensor.shape()[0]);
    let values = tensor.to_f32(module)?;
    let turned = (0..rows * cols).map(|i| values[i % rows * cols + i / rows]).collect();
    Ok(Tensor::of_f32(turned, &[cols, rows]))
}

/// One number per module: alpha.
const ALPHA: &str = "alpha";
