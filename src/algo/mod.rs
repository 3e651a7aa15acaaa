//! Every algorithm once: its keys, shapes, formula and initialisation, one file each. Nothing else knows a formula.
//!
//! To add one, write its file and put its [`Recipe`] in [`ALL`].

pub mod lora;

use crate::error::{Error, Result};
use crate::merge::ops::Op;
use crate::view::Tensor;
use std::fmt::Debug;

/// One module of an adapter: what one file holds for one target, read and checked.
pub trait Algorithm: Debug + Send + Sync {
    /// The field's name, as the report prints it.
    fn name(&self) -> &'static str;
    /// Rank of the factors.
    fn rank(&self) -> usize;
    /// `alpha` as the file gives it; `None` when it gives none.
    fn alpha(&self) -> Option<f32>;
    /// What the module does to a weight of this shape, in the primitives of the executors.
    fn lower(&self, module: &str, target: &[usize]) -> Result<Op>;
    /// The tensors by their canonical names, as they are written to a file.
    fn tensors(&self) -> Vec<(&'static str, &Tensor)>;
}

/// The named tensors of one module. Names are the canonical suffixes of `adapter::keys`.
#[derive(Debug, Default)]
pub struct Group {
    /// (suffix, tensor), in the order of the file.
    pub tensors: Vec<(&'static str, Tensor)>,
    /// Alpha from outside the tensors (PEFT keeps it in a config); already corrected for rank-stabilised scaling.
    pub alpha: Option<f32>,
}

impl Group {
    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|(n, _)| *n == name).map(|(_, t)| t)
    }
}

/// How one algorithm recognises its tensors and reads them.
pub struct Recipe {
    /// A module is this algorithm's when it holds any of these.
    pub marks: &'static [&'static str],
    /// Every tensor that the algorithm understands; another one in the group makes the module unsupported,
    /// since leaving it out would give a wrong picture.
    pub knows: &'static [&'static str],
    /// Reads and checks the tensors.
    pub read: fn(module: &str, group: &Group) -> Result<Box<dyn Algorithm>>,
}

/// The algorithms, in the order in which a module is tried.
pub static ALL: &[Recipe] = &[lora::RECIPE];

/// Reads one module. `Err(Unsupported)` names what this version does not know.
pub fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
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
            Some(name) => Err(unsupported(name)),
        },
        None => Err(match foreign(&["alpha"]) {
            Some(name) => unsupported(name),
            None => malformed(module, "has no factors"),
        }),
    }
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

/// The start values of a parameter.
#[cfg(feature = "torch")]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// Uniform in (-bound, bound).
    Uniform {
        /// Largest magnitude.
        bound: f64,
    },
}

/// A tensor that training changes.
#[cfg(feature = "torch")]
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its name within the module: the canonical suffix of `adapter::keys`, as it is written to a file.
    pub slot: &'static str,
    /// Its shape, also in the file.
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Init,
}

/// What a backward pass of one module gives.
#[cfg(feature = "torch")]
#[derive(Debug)]
pub struct Gradients {
    /// One per parameter, in the order of [`Trainable::parameters`].
    pub parameters: Vec<tch::Tensor>,
    /// With respect to the input, if it was asked for.
    pub input: Option<tch::Tensor>,
}

/// One module in training: the same formula as its [`Algorithm`], as tch operations. It holds shapes and constants, never values.
#[cfg(feature = "torch")]
pub trait Trainable: Debug + Send {
    /// The field's name, as [`Algorithm::name`].
    fn name(&self) -> &'static str;
    /// Rank of the factors.
    fn rank(&self) -> usize;
    /// `alpha`, as it is written to the file.
    fn alpha(&self) -> f64;
    /// The parameters, in the order in which `forward` takes them.
    fn parameters(&self) -> Vec<Parameter>;
    /// What the module adds to its layer's output for the layer's input `x`; differentiable. All tensors have one dtype.
    fn forward(&self, parameters: &[tch::Tensor], x: &tch::Tensor) -> Result<tch::Tensor>;

    /// The gradients for the layer's output gradient. `parameters` are leaves that require a gradient; `x` is none. The default
    /// differentiates `forward`; override it where a formula is cheaper.
    fn backward(
        &self,
        parameters: &[tch::Tensor],
        x: &tch::Tensor,
        grad_y: &tch::Tensor,
        want_input: bool,
    ) -> Result<Gradients> {
        differentiate(&|x| self.forward(parameters, x), parameters, x, grad_y, want_input)
    }
}

/// The gradients of any differentiable forward, by libtorch's autograd. Works whatever grad mode the calling thread is in.
#[cfg(feature = "torch")]
pub fn differentiate(
    forward: &dyn Fn(&tch::Tensor) -> Result<tch::Tensor>,
    parameters: &[tch::Tensor],
    x: &tch::Tensor,
    grad_y: &tch::Tensor,
    want_input: bool,
) -> Result<Gradients> {
    tch::with_grad(|| {
        let x = x.f_detach()?.f_set_requires_grad(want_input)?;
        // The product's sum has exactly grad_y as its gradient in the output, whatever it rounds or overflows to itself.
        let loss = forward(&x)?.f_mul(&grad_y.f_detach()?)?.f_sum(None)?;
        let mut leaves: Vec<&tch::Tensor> = parameters.iter().collect();
        leaves.extend(want_input.then_some(&x));
        let mut gradients = tch::Tensor::f_run_backward(&[loss], &leaves, false, false)?;
        let input = if want_input { gradients.pop() } else { None };
        Ok(Gradients { parameters: gradients, input })
    })
}
