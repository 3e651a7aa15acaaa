//! DoRA in training: `dW = V o m / |V| - W`, `V = W + inner dW`, with m the lengths of W to begin with. Gradients go through |V|, as in
//! LyCORIS; PEFT takes it for a constant.
//!
//! On a Linear layer, with a length per output and a LoRA inside, `dW = s U D`, no matrix of the weight's size is made. With `r = m / |V|` of
//! each row the layer's output grows by `(r - 1) o (W x) + r o (s U D x)`, and
//! `|V|^2 = |W|^2 + <P + Q, U>`, `P = s W D^T`, `Q = P + s^2 U D D^T`, row by row. The gradient of a row's |V|^2 is
//! `e = -r / (2 |V|^2) dL/dr`, `dL/dr` is the sum of `dL/dy o (V x)` over a batch, and from |V|^2 it goes to U as `2 Q`, to D as `2 s U^T V`.

use super::extras::{decomposed, MAGNITUDE};
use super::training::{
    add_gradients, add_output, through_delta, Gradients, Init, Layer, Parameter, Pass, Trainable,
};
use super::ALPHA;
use crate::cuda::{self, Arg, Gpu};
use crate::error::{Error, Result};
use crate::torch_ext::{multiply, on_current_stream, product, Factor};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Puts a magnitude around `inner`, one per output channel or per input channel.
pub(super) fn decompose(
    layer: &Layer,
    inner: Box<dyn Trainable>,
    on_output: bool,
    weight: Option<&Tensor>,
) -> Result<Box<dyn Trainable>> {
    let Some(name) = decomposed(inner.name()) else {
        let what = format!("`{}`: DoRA has no meaning around {}", layer.name, inner.name());
        return Err(Error::argument(what, "it goes around lora, loha and lokr"));
    };
    let weight = weight.ok_or_else(|| {
        let what = format!("`{}`: DoRA begins with the lengths of the layer's own weight", layer.name);
        Error::argument(what, "pass the weight when the layer is registered")
    })?;
    let mut shape = vec![1; layer.weight.len()];
    let axis = usize::from(!on_output);
    shape[axis] = layer.weight[axis];
    let start = Vec::<f32>::try_from(lengths(weight, axis)?.f_flatten(0, -1)?)?.into();
    let alpha = inner.constants().iter().find(|(name, _)| *name == ALPHA).map(|(_, alpha)| *alpha);
    let scale = alpha.zip(inner.rank()).map(|(alpha, rank)| alpha / rank as f64);
    let around_lora = scale.filter(|_| inner.name() == "LoRA" && on_output);
    Ok(Box::new(Decomposed { name, inner, axis, shape, start, around_lora }))
}

/// The norms over all axes but one.
fn lengths(weight: &Tensor, axis: usize) -> Result<Tensor> {
    let others: Vec<i64> = (0..weight.dim()).filter(|&a| a != axis).map(|a| a as i64).collect();
    Ok(weight.f_norm_scalaropt_dim(2, &others[..], true)?)
}

/// A module in training with a magnitude around it.
#[derive(Debug)]
struct Decomposed {
    name: &'static str,
    inner: Box<dyn Trainable>,
    /// The channels that have a length each: of the outputs, 0, or of the inputs, 1.
    axis: usize,
    /// Of the magnitude.
    shape: Vec<usize>,
    start: Arc<[f32]>,
    /// alpha / rank of a LoRA inside, where there is a length per output.
    around_lora: Option<f64>,
}

impl Decomposed {
    /// What the inner module is computed from, and the magnitude.
    fn split<'a>(&self, pass: &Pass<'a>) -> Result<(Pass<'a>, &'a Tensor)> {
        match pass.parameters.split_last() {
            Some((magnitude, parameters)) => Ok((Pass { parameters, ..*pass }, magnitude)),
            None => Err(Error::Backend(format!("`{}` has no magnitude", pass.layer.name))),
        }
    }

    /// The rows of V and what belongs to them, on a Linear layer from which nothing is left out.
    fn rows<'a>(&self, pass: &Pass<'a>) -> Result<Option<Rows<'a>>> {
        let Some(scale) = self.around_lora.filter(|_| pass.linear()) else { return Ok(None) };
        match pass.parameters {
            [down, up, magnitude] => Rows::new(pass.base()?, [down, up], magnitude, scale).map(Some),
            _ => Ok(None),
        }
    }
}

/// m / |V|. A row of zeros stays one.
fn ratio(magnitude: &Tensor, lengths: &Tensor) -> Result<Tensor> {
    Ok(magnitude.f_div(&lengths.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?)
}

/// `V = W + s up down` by thin products alone; what is not of the compute dtype has the magnitude's. A row of V much shorter than W's has
/// fewer digits, by the ratio of their squares; training stays far from there.
struct Rows<'a> {
    base: &'a Tensor,
    down: &'a Tensor,
    up: &'a Tensor,
    scale: f64,
    /// Q [O, rank].
    crossed: Tensor,
    /// |V| [O, 1].
    lengths: Tensor,
    /// r [O, 1].
    ratio: Tensor,
    /// r o up, in the compute dtype.
    turned_up: Tensor,
    /// r - 1 as [O], in the compute dtype.
    beyond_one: Tensor,
    kernels: Option<Kernels>,
}

impl<'a> Rows<'a> {
    fn new(base: &'a Tensor, [down, up]: [&'a Tensor; 2], magnitude: &Tensor, scale: f64) -> Result<Self> {
        let (kind, compute, outputs) = (magnitude.f_kind()?, up.f_kind()?, up.size()[0]);
        let times_down = |t: &Tensor, scale: f64| {
            let out = Tensor::f_empty([t.size()[0], down.size()[0]], (kind, t.device()))?;
            product(&out, Factor(t, false), Factor(down, true), 0.0, scale)?;
            Ok::<_, Error>(out)
        };
        let (own, gram) = (times_down(base, scale)?, times_down(down, scale * scale)?);
        if let Some(kernels) = Kernels::find([base, down, up], magnitude) {
            let number = || Tensor::f_empty([outputs, 1], (kind, up.device()));
            let rows = Rows {
                base,
                down,
                up,
                scale,
                crossed: own.f_empty_like()?,
                lengths: number()?,
                ratio: number()?,
                turned_up: up.f_empty_like()?,
                beyond_one: Tensor::f_empty([outputs], (compute, up.device()))?,
                kernels: Some(kernels),
            };
            kernels.rows(&rows, [&own, &gram, magnitude])?;
            return Ok(rows);
        }
        let precise_up = up.f_to_kind(kind)?;
        let crossed = own.f_addmm(&precise_up, &gram)?;
        let added =
            { own }.f_add_(&crossed)?.f_mul_(&precise_up)?.f_sum_dim_intlist(&[1i64][..], true, None)?;
        let square =
            base.f_norm_scalaropt_dim_dtype(2, &[1i64][..], true, kind)?.f_square_()?.f_add_(&added)?;
        let lengths = { square }.f_clamp_min_(f64::from(f32::MIN_POSITIVE))?.f_sqrt_()?;
        let ratio = ratio(magnitude, &lengths)?;
        let turned_up = precise_up.f_mul(&ratio)?.f_to_kind(compute)?;
        let beyond_one = ratio.f_flatten(0, -1)?.f_sub_scalar(1.0)?.f_to_kind(compute)?;
        Ok(Rows { base, down, up, scale, crossed, lengths, ratio, turned_up, beyond_one, kernels: None })
    }

    fn add_forward(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        // Not r o (V x) - W x: that would round the small difference at the size of W x.
        let base = multiply(Factor(x, false), Factor(self.base, true))?.f_view_as(y)?;
        let _ = y.shallow_clone().f_addcmul_(&base, &self.beyond_one)?;
        let t = multiply(Factor(x, false), Factor(self.down, true))?;
        product(y, Factor(&t, false), Factor(&self.turned_up, true), 1.0, self.scale)
    }

    fn accumulate(
        &self,
        x: &Tensor,
        grad_y: &Tensor,
        want_input: bool,
        [into_down, into_up, into_magnitude]: [&Tensor; 3],
    ) -> Result<Option<Tensor>> {
        let Rows { base, down, up, scale, .. } = *self;
        let t = multiply(Factor(x, false), Factor(down, true))?;
        let mut turned = multiply(Factor(x, false), Factor(base, true))?;
        product(&turned, Factor(&t, false), Factor(up, true), 1.0, scale)?;
        let rows = turned.size();
        let moved = turned.f_mul_(&grad_y.f_view(&rows[..])?)?;
        let grad_ratio =
            moved.f_sum_dim_intlist(&[0i64][..], false, self.ratio.f_kind()?)?.f_view_as(&self.ratio)?;
        // Of r o up, which s U D x passes through.
        let grad_up = self.crossed.f_empty_like()?;
        product(&grad_up, Factor(grad_y, true), Factor(&t, false), 0.0, scale)?;
        let pulled_up = self.pull([&grad_ratio, &grad_up], [into_up, into_magnitude])?;
        let grad_t = multiply(Factor(grad_y, false), Factor(&self.turned_up, false))?;
        product(into_down, Factor(&pulled_up, true), Factor(base, false), 1.0, scale)?;
        let gram = multiply(Factor(&pulled_up, true), Factor(up, false))?;
        product(into_down, Factor(&gram, false), Factor(down, false), 1.0, scale * scale)?;
        product(into_down, Factor(&grad_t, true), Factor(x, false), 1.0, scale)?;
        if !want_input {
            return Ok(None);
        }
        let grad_x = multiply(Factor(&grad_y.f_mul(&self.beyond_one)?, false), Factor(base, false))?;
        product(&grad_x, Factor(&grad_t, false), Factor(down, false), 1.0, scale)?;
        Ok(Some(grad_x.f_view_as(x)?))
    }

    /// From the gradients of r and of r o up: adds those of up and the magnitude; gives `2 e o up`, in the compute dtype.
    fn pull(
        &self,
        [grad_ratio, grad_up]: [&Tensor; 2],
        [into_up, into_magnitude]: [&Tensor; 2],
    ) -> Result<Tensor> {
        if let Some(kernels) = self.kernels {
            let pulled_up = self.up.f_empty_like()?;
            kernels.pull(self, [grad_ratio, grad_up], [into_up, into_magnitude, &pulled_up])?;
            return Ok(pulled_up);
        }
        let twice = grad_ratio.f_mul(&self.ratio)?.f_div_(&self.lengths.f_square()?)?.f_neg_()?;
        let _ = into_magnitude.shallow_clone().f_addcdiv_(grad_ratio, &self.lengths)?;
        let mut into_up = into_up.shallow_clone();
        let _ = into_up.f_addcmul_(&self.crossed, &twice)?.f_addcmul_(grad_up, &self.ratio)?;
        Ok(self.up.f_to_kind(twice.f_kind()?)?.f_mul(&twice)?.f_to_kind(self.up.f_kind()?)?)
    }
}

/// The same in `kernels/dora.cu`: one launch for `Rows::new` and one for `Rows::pull`, where libtorch takes a dozen.
#[derive(Clone, Copy)]
struct Kernels {
    gpu: &'static Gpu,
    dtype: &'static str,
}

/// The kernels' Job.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Job {
    base: u64,
    up: u64,
    own: u64,
    gram: u64,
    magnitude: u64,
    crossed: u64,
    lengths: u64,
    ratio: u64,
    turned_up: u64,
    beyond_one: u64,
    grad_ratio: u64,
    grad_up: u64,
    into_up: u64,
    into_magnitude: u64,
    pulled_up: u64,
    rows: u32,
    columns: u32,
    ranks: u32,
}

impl Kernels {
    /// `None` where they do not serve: on a CPU, in a library without kernels, on a device or for a dtype that they were not compiled for.
    fn find(matrices: [&Tensor; 3], magnitude: &Tensor) -> Option<Self> {
        let Device::Cuda(index) = magnitude.device() else { return None };
        let kind = matrices[0].f_kind().ok()?;
        let alike = matrices.iter().all(|t| t.f_kind().is_ok_and(|k| k == kind) && t.is_contiguous());
        let dtype = match kind {
            Kind::Float => "f32",
            Kind::Half => "f16",
            Kind::BFloat16 => "bf16",
            _ => return None,
        };
        let serves = alike && magnitude.f_kind().is_ok_and(|kind| kind == Kind::Float);
        let gpu = cuda::gpu(index).ok().filter(|_| serves)?;
        Some(Kernels { gpu, dtype })
    }

    fn rows(self, rows: &Rows, [own, gram, magnitude]: [&Tensor; 3]) -> Result<()> {
        self.launch("rows", rows, |job| {
            (job.own, job.gram, job.magnitude) = (at(own), at(gram), at(magnitude));
        })
    }

    fn pull(
        self,
        rows: &Rows,
        [grad_ratio, grad_up]: [&Tensor; 2],
        [into_up, into_magnitude, pulled_up]: [&Tensor; 3],
    ) -> Result<()> {
        self.launch("pull", rows, |job| {
            (job.grad_ratio, job.grad_up, job.pulled_up) = (at(grad_ratio), at(grad_up), at(pulled_up));
            (job.into_up, job.into_magnitude) = (at(into_up), at(into_magnitude));
        })
    }

    fn launch(self, kernel: &str, rows: &Rows, fill: impl FnOnce(&mut Job)) -> Result<()> {
        let (shape, ranks) = (rows.base.size(), rows.up.size()[1]);
        let mut job = Job {
            base: at(rows.base),
            up: at(rows.up),
            crossed: at(&rows.crossed),
            lengths: at(&rows.lengths),
            ratio: at(&rows.ratio),
            turned_up: at(&rows.turned_up),
            beyond_one: at(&rows.beyond_one),
            rows: shape[0] as u32,
            columns: shape[1] as u32,
            ranks: ranks as u32,
            ..Job::default()
        };
        fill(&mut job);
        on_current_stream(self.gpu, |launcher| {
            let kernel = format!("{kernel}_{}", self.dtype);
            // SAFETY: the job is the kernels' only parameter; it points to contiguous tensors of the sizes that it tells, which live on this
            // stream until what was enqueued on it is done.
            unsafe { launcher.launch("dora", &kernel, job.rows.div_ceil(8), 256, &[Arg::plain(&job)]) }
        })
    }
}

fn at(tensor: &Tensor) -> u64 {
    tensor.data_ptr() as u64
}

impl Trainable for Decomposed {
    fn name(&self) -> &'static str {
        self.name
    }

    fn rank(&self) -> Option<usize> {
        self.inner.rank()
    }

    fn constants(&self) -> Vec<(&'static str, f64)> {
        self.inner.constants()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let magnitude = Parameter::new(MAGNITUDE, &self.shape, Init::Values(self.start.clone())).precise();
        self.inner.parameters().into_iter().chain([magnitude]).collect()
    }

    fn needs_weight(&self) -> bool {
        true
    }

    fn delta(&self, pass: &Pass) -> Result<Tensor> {
        let (inner, magnitude) = self.split(pass)?;
        let base = pass.base()?.f_to_kind(magnitude.f_kind()?)?;
        let inner = self.inner.delta(&inner)?.f_to_kind(magnitude.f_kind()?)?;
        let ratio = ratio(magnitude, &lengths(&base.f_add(&inner)?, self.axis)?)?;
        // Not V m / |V| - W: that would round the small difference at the size of W.
        let delta = base.f_mul(&ratio.f_sub_scalar(1.0)?)?.f_addcmul(&inner, &ratio)?;
        Ok(delta.f_to_kind(pass.compute)?)
    }

    fn add_forward(&self, pass: &Pass, x: &Tensor, y: &Tensor) -> Result<()> {
        let Some(rows) = self.rows(pass)? else { return add_output(self, pass, x, y) };
        if pass.linear_into(y) {
            return rows.add_forward(x, y);
        }
        let own = Tensor::f_zeros(y.size(), (pass.compute, y.device()))?;
        rows.add_forward(x, &own)?;
        let _ = y.shallow_clone().f_add_(&own)?;
        Ok(())
    }

    fn backward(&self, pass: &Pass, x: &Tensor, grad_y: &Tensor, want_input: bool) -> Result<Gradients> {
        through_delta(self, pass, x, grad_y, want_input)
    }

    fn accumulate(
        &self,
        pass: &Pass,
        x: &Tensor,
        grad_y: &Tensor,
        want_input: bool,
        into: &[Tensor],
    ) -> Result<Option<Tensor>> {
        match (self.rows(pass)?, into) {
            (Some(rows), [down, up, magnitude]) => {
                rows.accumulate(x, grad_y, want_input, [down, up, magnitude])
            }
            _ => add_gradients(self.backward(pass, x, grad_y, want_input)?, into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algo::training::{long, Rule};
    use crate::algo::training_tests::{rule, wave};
    use crate::merge::bypass::Geometry;

    /// The lengths from squares and thin products are those of the sum, also where dW is as large as W.
    #[test]
    fn lengths_are_those_of_the_sum() {
        let (base, down) = (wave(&[96, 64], 0.4), wave(&[8, 64], 1.2));
        for size in [0.0, 1e-6, 1e-3, 1.0] {
            let parameters = [down.shallow_clone(), wave(&[96, 8], 2.3) * size];
            let delta = parameters[1].matmul(&down) * 0.3;
            let want = lengths(&(&base + &delta), 0).unwrap();
            let single = [&base, &parameters[0], &parameters[1]].map(|t| t.to_kind(Kind::Float));
            let [base, down, up] = &single;
            let rows = Rows::new(base, [down, up], &want.to_kind(Kind::Float), 0.3).unwrap();
            let off = (rows.lengths / &want - 1.0).abs().max().double_value(&[]);
            // A few roundings, as in the sum itself; V is nowhere much shorter than W.
            assert!(off <= 5e-7, "{size}: {off}");
        }
    }

    #[test]
    fn what_cannot_begin_says_why() {
        let layer = Layer::sliding("layer", &[8, 6], &Geometry::default(), false).unwrap();
        let rule = Rule { decompose: Some(true), ..rule() };
        let begin = |name: &str, weight: Option<&Tensor>| {
            let begin = crate::algo::TRAINED.iter().find(|b| b.names[0] == name).unwrap();
            crate::algo::begin(begin, &layer, &rule, weight)
        };
        let weight = wave(&long(&layer.weight), 0.4).to_kind(Kind::Float);
        assert_eq!(begin("lora", Some(&weight)).unwrap().name(), "DoRA");
        let error = begin("lora", None).unwrap_err();
        assert!(error.hint().contains("pass the weight"), "{error:?}");
        let error = begin("boft", Some(&weight)).unwrap_err();
        assert!(error.to_string().contains("no meaning around BOFT"), "{error}");
        let error = begin("lora", Some(&weight.transpose(0, 1))).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
}
