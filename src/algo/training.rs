//! What an algorithm is in training: its parameters, how they start, and its formula as differentiable tch operations.

use super::draw::Draw;
use crate::error::{Error, Result};
use crate::merge::bypass::Geometry;
use std::cell::RefCell;
use std::fmt::Debug;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// What a layer computes with its weight.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// x [.., I], weight [O, I].
    Linear,
    /// x [N, I * groups, spatial..], weight [O, I, kernel..].
    Convolution {
        /// Per spatial axis.
        stride: Vec<i64>,
        /// Zeros on both sides, per spatial axis.
        padding: Vec<i64>,
        /// Between taps, per spatial axis.
        dilation: Vec<i64>,
        /// Of channels.
        groups: i64,
    },
    /// Over the last axes, which are the weight's.
    LayerNorm {
        /// Added to the variance.
        eps: f64,
    },
    /// Without a mean, over the last axes, which are the weight's.
    RmsNorm {
        /// Added to the mean square.
        eps: f64,
    },
    /// Over groups of channels, x [N, C, ..], weight [C].
    GroupNorm {
        /// Of channels.
        groups: i64,
        /// Added to the variance.
        eps: f64,
    },
}

/// The layer that a module sits on.
#[derive(Clone, Debug)]
pub struct Layer {
    /// In messages.
    pub name: String,
    /// Shape of the weight.
    pub weight: Vec<usize>,
    /// What it computes.
    pub form: Form,
    /// Whether it has a bias.
    pub bias: bool,
}

impl Layer {
    /// A Linear layer or a convolution, as the weight's shape says.
    pub fn sliding(name: &str, weight: &[usize], geometry: &Geometry, bias: bool) -> Result<Self> {
        let refuse = |what: String, hint: &str| Err(Error::argument(format!("`{name}`: {what}"), hint));
        if !(2..=5).contains(&weight.len()) || weight.contains(&0) {
            return refuse(
                format!("a weight of shape {weight:?} is neither Linear [out, in] nor a convolution [out, in, kernel..]"),
                "register only Linear, Conv1d, Conv2d and Conv3d weights",
            );
        }
        let (axes, groups) = (weight.len() - 2, geometry.groups);
        if groups == 0 || weight[0] % groups != 0 || (axes == 0 && groups != 1) {
            return refuse(
                format!("{groups} groups do not fit a weight of shape {weight:?}"),
                "groups divide the output channels; a Linear layer has one",
            );
        }
        let spread = |values: &[usize], least: usize, what: &str| {
            let values = if values.len() == 1 { vec![values[0]; axes] } else { values.to_vec() };
            if values.len() != axes || values.iter().any(|&v| v < least || i64::try_from(v).is_err()) {
                return Err(Error::argument(
                    format!("`{name}`: {what} {values:?} does not fit {axes} spatial axes"),
                    format!("pass one value, or one per axis; each is at least {least}"),
                ));
            }
            Ok(values.into_iter().map(|v| v as i64).collect())
        };
        let (stride, padding) =
            (spread(&geometry.stride, 1, "stride")?, spread(&geometry.padding, 0, "padding")?);
        let dilation = spread(&geometry.dilation, 1, "dilation")?;
        let form = match axes {
            0 => Form::Linear,
            _ => Form::Convolution { stride, padding, dilation, groups: groups as i64 },
        };
        Ok(Layer { name: name.to_owned(), weight: weight.to_vec(), form, bias })
    }

    /// Whether it is a norm, which has its own algorithm.
    pub fn is_norm(&self) -> bool {
        !matches!(self.form, Form::Linear | Form::Convolution { .. })
    }

    /// Whether it is a convolution whose kernel is larger than one point.
    pub fn large_kernel(&self) -> bool {
        self.weight.iter().skip(2).any(|&k| k != 1)
    }

    /// Groups of channels; 1 for everything but grouped convolutions.
    pub fn groups(&self) -> i64 {
        match self.form {
            Form::Convolution { groups, .. } => groups,
            _ => 1,
        }
    }

    /// The layer's output for this weight, without a bias. All tensors have one dtype.
    pub fn apply(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        Ok(match &self.form {
            Form::Linear => x.f_linear(weight, None::<Tensor>)?,
            Form::Convolution { stride, padding, dilation, groups } => {
                let none = vec![0i64; stride.len()];
                x.f_convolution(
                    weight,
                    None::<Tensor>,
                    &stride[..],
                    &padding[..],
                    &dilation[..],
                    false,
                    &none[..],
                    *groups,
                )?
            }
            Form::LayerNorm { eps } => x.f_layer_norm(long(&self.weight), Some(weight), None, *eps, false)?,
            Form::RmsNorm { eps } => x.f_rms_norm(long(&self.weight), Some(weight), Some(*eps))?,
            Form::GroupNorm { groups, eps } => x.f_group_norm(*groups, Some(weight), None, *eps, false)?,
        })
    }

    /// A convolution of 1x1 weights, or a Linear layer, whatever this layer's own geometry is.
    pub fn pointwise(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let Form::Convolution { stride, .. } = &self.form else {
            return Ok(x.f_linear(weight, None::<Tensor>)?);
        };
        let (ones, zeros) = (vec![1i64; stride.len()], vec![0i64; stride.len()]);
        let convolution =
            x.f_convolution(weight, None::<Tensor>, &ones[..], &zeros[..], &ones[..], false, &zeros[..], 1);
        Ok(convolution?)
    }

    /// The shape of one value per channel of an output `y`; over the last axes of a LayerNorm or RMSNorm every value is a channel.
    pub fn channels(&self, y: &Tensor) -> Vec<i64> {
        let mut shape = long(&self.weight);
        match self.form {
            Form::Linear => shape.truncate(1),
            Form::Convolution { .. } | Form::GroupNorm { .. } => {
                shape.truncate(1);
                shape.resize(y.dim() - 1, 1);
            }
            Form::LayerNorm { .. } | Form::RmsNorm { .. } => {}
        }
        shape
    }
}

/// The start values of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// All the same.
    Constant(f32),
    /// Uniform in (-bound, bound).
    Uniform {
        /// Largest magnitude.
        bound: f64,
    },
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        deviation: f64,
    },
    /// These, row-major, in the parameter's shape.
    Values(Arc<[f32]>),
}

impl Init {
    /// All zero.
    pub const ZEROS: Init = Init::Constant(0.0);

    /// torch's kaiming_uniform_(a = sqrt(5)) for a weight of this shape: the bound is 1 / sqrt(fan_in).
    pub fn kaiming(shape: &[usize]) -> Init {
        let fan_in = shape.iter().skip(1).map(|&d| d as f64).product::<f64>();
        Init::Uniform { bound: 1.0 / fan_in.sqrt() }
    }
}

/// A tensor that a module in training has.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its name within the module: the canonical suffix of `adapter::keys`, as it is written to a file.
    pub slot: &'static str,
    /// Its shape, in the file too.
    pub shape: Vec<usize>,
    /// `shape`, or longer along some axes: with zeros at their ends that no gradient changes.
    pub stored: Vec<usize>,
    /// How it starts.
    pub init: Init,
    /// Whether the formula needs all its digits: it is computed with in fp32 also where the rest is in 16 bits.
    pub precise: bool,
    /// Whether LoRA+ (Hayou et al. 2024, arXiv:2402.12354) raises its learning rate.
    pub plus: bool,
    /// Whether it keeps its start values.
    pub frozen: bool,
    /// Whether it stands in the adapter's file.
    pub saved: bool,
}

impl Parameter {
    /// One that is trained, in the compute dtype.
    pub fn new(slot: &'static str, shape: &[usize], init: Init) -> Self {
        let (shape, stored) = (shape.to_vec(), shape.to_vec());
        Parameter { slot, shape, stored, init, precise: false, plus: false, frozen: false, saved: true }
    }

    /// The axis of this number is a rank.
    pub fn ranked(mut self, axis: usize) -> Self {
        // Tensor cores take rows of 16 bytes, 8 numbers in 16 bits.
        self.stored[axis] = self.shape[axis].next_multiple_of(8);
        self
    }

    /// See [`Parameter::precise`].
    pub fn precise(self) -> Self {
        Parameter { precise: true, ..self }
    }

    /// See [`Parameter::plus`].
    pub fn plus(self) -> Self {
        Parameter { plus: true, ..self }
    }

    /// Number of trained values.
    pub fn count(&self) -> usize {
        if self.frozen {
            return 0;
        }
        self.shape.iter().product()
    }
}

/// What the options say about one module.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Rank, or what stands in its place.
    pub dim: usize,
    /// Of the scale alpha / rank.
    pub alpha: f64,
    /// Whether convolutions get a Tucker core.
    pub tucker: bool,
    /// LoKr: size of the smaller factor; -1: as square as can be.
    pub factor: i64,
    /// LoKr: both factors whole.
    pub full_matrix: bool,
    /// LoKr: w1 too as a product of thin factors.
    pub decompose_both: bool,
    /// LoKr: the larger factor of the outputs first.
    pub unbalanced_factorization: bool,
    /// DyLoRA: ranks that are trained together.
    pub block_size: usize,
    /// DyLoRA: the blocks below the drawn one are trained with it (the paper), else frozen (sd-scripts).
    pub nested: bool,
    /// OFT, BOFT: bound of the rotations.
    pub constraint: f64,
    /// OFT, BOFT: one factor per output channel beside the rotations.
    pub rescaled: bool,
    /// (IA)^3: the input channels are scaled, else the outputs.
    pub train_on_input: bool,
    /// DoRA: the direction and the length of weights apart; whether a length is one per output channel, else per input channel.
    pub decompose: Option<bool>,
    /// T-LoRA: which singular vectors it starts from.
    pub sig_type: Spectrum,
}

/// A part of a weight's singular values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spectrum {
    /// The largest.
    Principal,
    /// The smallest.
    Last,
    /// Those between.
    Middle,
}

/// Makes a module for a layer. `weight` is the layer's own, fp32, where the host gave it.
pub type New = fn(layer: &Layer, rule: &Rule, weight: Option<&Tensor>) -> Result<Box<dyn Trainable>>;

/// How training of an algorithm begins.
pub struct Begin {
    /// As a configuration names it, the usual spelling first.
    pub names: &'static [&'static str],
    /// A module.
    pub new: New,
}

/// What one forward or backward pass of a module is computed from.
pub struct Pass<'a> {
    /// The layer.
    pub layer: &'a Layer,
    /// In the order of [`Trainable::parameters`], in their stored shapes; in the compute dtype, precise ones in fp32.
    pub parameters: &'a [Tensor],
    /// The layer's own weight in the compute dtype, for modules that need it.
    pub weight: Option<&'a Tensor>,
    /// What is left out by chance; `None` outside of training, and where nothing is.
    pub draw: Option<&'a Draw>,
    /// The share of the ranks that take part, the first ones, f32 on the device; `None`: all. Only T-LoRA looks at it.
    pub ranks: Option<&'a Tensor>,
    /// What the layer computes in.
    pub compute: Kind,
}

impl<'a> Pass<'a> {
    /// The layer's weight, for algorithms that said that they need it.
    pub fn base(&self) -> Result<&'a Tensor> {
        self.weight.ok_or_else(|| {
            let what = format!("`{}`: this algorithm computes with the layer's own weight", self.layer.name);
            Error::argument(what, "pass the weight with every forward and backward")
        })
    }

    /// Whether chance leaves nothing out.
    pub fn whole(&self) -> bool {
        !self.draw.is_some_and(Draw::leaves_out)
    }

    /// Whether it is a Linear layer from which nothing is left out: then products of matrices are all there is.
    pub fn linear(&self) -> bool {
        self.layer.form == Form::Linear && self.whole()
    }

    /// Whether it is such a layer, and products may be summed in `y`.
    pub fn linear_into(&self, y: &Tensor) -> bool {
        self.linear() && y.f_kind().is_ok_and(|kind| kind == self.compute)
    }

    /// The weight's shape.
    pub fn shape(&self) -> Vec<i64> {
        long(&self.layer.weight)
    }

    /// An output without what chance leaves out of it: channels, which are the rows of dW, and single values.
    pub fn dropped(&self, mut y: Tensor) -> Result<Tensor> {
        let Some(draw) = self.draw else { return Ok(y) };
        if let Some(mask) = draw.ranks(&self.layer.channels(&y), self.compute)? {
            y = y.f_mul(&mask)?;
        }
        draw.values(y)
    }
}

/// What a backward pass of one module gives.
#[derive(Debug)]
pub struct Gradients {
    /// One per parameter, in the order of [`Trainable::parameters`]; `None` is zero.
    pub parameters: Vec<Option<Tensor>>,
    /// With respect to the input, if it was asked for.
    pub input: Option<Tensor>,
}

/// One module in training: the same formula as its [`super::Algorithm`], as tch operations. It holds shapes and constants, never values.
///
/// An algorithm gives [`Trainable::delta`]; forward, backward and the norm of dW follow. It overrides what its structure makes cheaper.
pub trait Trainable: Debug + Send {
    /// The field's name, as [`super::Algorithm::name`].
    fn name(&self) -> &'static str;
    /// Rank of the factors; `None` where there are none.
    fn rank(&self) -> Option<usize> {
        None
    }
    /// Single numbers that stand in the file beside the parameters, by name: alpha, for example.
    fn constants(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
    /// The parameters, in the order in which a pass has them.
    fn parameters(&self) -> Vec<Parameter>;
    /// Whether a pass needs the layer's own weight.
    fn needs_weight(&self) -> bool {
        false
    }
    /// dW in the weight's shape, in the compute dtype; differentiable in the parameters.
    fn delta(&self, pass: &Pass) -> Result<Tensor>;

    /// What it adds to the layer's bias.
    fn shift<'a>(&self, _pass: &Pass<'a>) -> Option<&'a Tensor> {
        None
    }

    /// What the module adds to its layer's output for the layer's input `x`; differentiable. `x` has the compute dtype.
    fn forward(&self, pass: &Pass, x: &Tensor) -> Result<Tensor> {
        by_delta(self, pass, x)
    }

    /// The gradients for the layer's output gradient. The parameters are leaves that require a gradient; `x` is none. The default
    /// differentiates `forward`; override it where a formula is cheaper.
    fn backward(&self, pass: &Pass, x: &Tensor, grad_y: &Tensor, want_input: bool) -> Result<Gradients> {
        differentiate(&|x| self.forward(pass, x), pass.parameters, x, grad_y, want_input)
    }

    /// Adds forward's output to `y`, which may have another dtype.
    fn add_forward(&self, pass: &Pass, x: &Tensor, y: &Tensor) -> Result<()> {
        add_output(self, pass, x, y)
    }

    /// Adds backward's gradients of the parameters to `into`, fp32, in their stored shapes, and gives that of the input.
    fn accumulate(
        &self,
        pass: &Pass,
        x: &Tensor,
        grad_y: &Tensor,
        want_input: bool,
        into: &[Tensor],
    ) -> Result<Option<Tensor>> {
        add_gradients(self.backward(pass, x, grad_y, want_input)?, into)
    }

    /// The norm of dW over all its elements, in f64, on the device. Asked only of modules that [`Trainable::shrunk`] has factors for.
    fn norm(&self, pass: &Pass) -> Result<Tensor> {
        norm_of_delta(self, pass)
    }

    /// Factors by which the parameters shrink so that dW becomes `ratio` (a number on the device) times what it is; `None` where no
    /// factor does that.
    fn shrunk(&self, _ratio: &Tensor) -> Result<Option<Vec<Tensor>>> {
        Ok(None)
    }
}

/// `y += forward(x)`, or nothing where the module is left out.
pub fn add_output<T: Trainable + ?Sized>(module: &T, pass: &Pass, x: &Tensor, y: &Tensor) -> Result<()> {
    let mut output = module.forward(pass, x)?;
    if let Some(draw) = pass.draw {
        output = draw.module(output)?;
    }
    let _ = y.shallow_clone().f_add_(&output)?;
    Ok(())
}

/// Adds gradients of parameters to fp32 tensors; gives that of the input.
pub fn add_gradients(gradients: Gradients, into: &[Tensor]) -> Result<Option<Tensor>> {
    for (to, gradient) in into.iter().zip(&gradients.parameters) {
        if let Some(gradient) = gradient {
            let _ = to.shallow_clone().f_add_(gradient)?;
        }
    }
    Ok(gradients.input)
}

/// Any module's forward: the layer itself, with dW for its weight.
pub fn by_delta<T: Trainable + ?Sized>(module: &T, pass: &Pass, x: &Tensor) -> Result<Tensor> {
    let mut y = pass.layer.apply(x, &module.delta(pass)?)?;
    if let Some(bias) = module.shift(pass) {
        y = y.f_add(&bias.f_reshape(pass.layer.channels(&y))?)?;
    }
    pass.dropped(y)
}

/// Any module's norm: that of dW itself.
pub fn norm_of_delta<T: Trainable + ?Sized>(module: &T, pass: &Pass) -> Result<Tensor> {
    Ok(module.delta(pass)?.f_to_kind(Kind::Double)?.f_norm()?)
}

/// `t * scale`, and `t` itself for a scale of 1.
pub fn scaled(t: &Tensor, scale: f64) -> Result<Tensor> {
    Ok(if scale == 1.0 { t.shallow_clone() } else { t.f_mul_scalar(scale)? })
}

/// [`Trainable::shrunk`] of a dW that is a product of all `count` parameters: each becomes smaller by the same factor.
pub fn evenly(ratio: &Tensor, count: usize) -> Result<Option<Vec<Tensor>>> {
    let each = ratio.f_pow_tensor_scalar(1.0 / count as f64)?;
    Ok(Some((0..count).map(|_| each.shallow_clone()).collect()))
}

/// The gradients of any differentiable forward, by libtorch's autograd. Works whatever grad mode the calling thread is in.
pub fn differentiate(
    forward: &dyn Fn(&Tensor) -> Result<Tensor>,
    parameters: &[Tensor],
    x: &Tensor,
    grad_y: &Tensor,
    want_input: bool,
) -> Result<Gradients> {
    tch::with_grad(|| {
        let x = x.f_detach()?.f_set_requires_grad(want_input)?;
        // The product's sum has exactly grad_y as its gradient in the output, whatever it rounds or overflows to itself.
        let loss = forward(&x)?.f_mul(&grad_y.f_detach()?)?.f_sum(None)?;
        let trained: Vec<&Tensor> = parameters.iter().filter(|p| p.requires_grad()).collect();
        let leaves: Vec<&Tensor> = trained.iter().copied().chain(want_input.then_some(&x)).collect();
        let mut gradients = Tensor::f_run_backward(&[loss], &leaves, false, false)?;
        let input = if want_input { gradients.pop() } else { None };
        let mut gradients = gradients.into_iter();
        let next = |p: &Tensor| if p.requires_grad() { gradients.next() } else { None };
        let parameters = parameters.iter().map(next).collect();
        Ok(Gradients { parameters, input })
    })
}

/// The gradients of a module that computes with its dW. On Linear layers those of dW and of x are one product each; differentiating
/// `forward` would compute the output once more for nothing.
pub fn through_delta(
    module: &dyn Trainable,
    pass: &Pass,
    x: &Tensor,
    grad_y: &Tensor,
    want_input: bool,
) -> Result<Gradients> {
    if !pass.linear() {
        return differentiate(&|x| module.forward(pass, x), pass.parameters, x, grad_y, want_input);
    }
    let flat = |t: &Tensor, axis: usize| t.f_detach()?.f_reshape([-1, pass.layer.weight[axis] as i64]);
    let (rows, grad) = (flat(x, 1)?, flat(grad_y, 0)?);
    let grad_delta = grad.f_transpose(0, 1)?.f_matmul(&rows)?;
    let input = RefCell::new(None);
    let forward = |_: &Tensor| {
        let delta = module.delta(pass)?;
        if want_input {
            *input.borrow_mut() = Some(grad.f_matmul(&delta.f_detach()?)?.f_reshape(x.size())?);
        }
        Ok(delta)
    };
    let found = differentiate(&forward, pass.parameters, x, &grad_delta, false)?;
    Ok(Gradients { input: input.into_inner(), ..found })
}

/// A name of an algorithm without what its file does not tell: whether a LoRA is on a convolution, whether prefixes of it were trained.
pub fn family(name: &str) -> String {
    name.replace(" (LoCon)", "").replace("LoCon", "LoRA").replace("DyLoRA", "LoRA")
}

/// What a DoRA is around, by its name.
pub fn inside(name: &str) -> Option<&str> {
    let inner = name.strip_prefix("DoRA")?.trim_matches([' ', '(', ')']);
    Some(if inner.is_empty() { "LoRA" } else { inner })
}

/// libtorch counts in i64. No dimension of an existing tensor exceeds it.
pub fn long(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&d| d as i64).collect()
}
