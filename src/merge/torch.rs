//! The executor on libtorch: the same terms on any CUDA device, one weight after the other, on the current stream of the calling thread.
//!
//! Sums run in fp32 with TF32 off (`torch_ext::Scope` around every call from outside) and are rounded once by the final copy.

use super::bypass::{self, Geometry, Layout};
use super::ops::{LowRank, Op, Region, Rotate, Term};
use super::restore::BackupPlace;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::{Device, Tensor, View};
use std::collections::HashMap;
use tch::{Kind, Tensor as Torch};

/// fp32 copies of factors on their device, so that a change of strength moves no factor again.
#[derive(Default)]
pub struct Factors {
    single: HashMap<(usize, usize), (Tensor, Torch)>,
    /// Ups side by side and downs one below the other, by the addresses of the ups.
    joined: HashMap<Vec<usize>, (Torch, Torch)>,
}

impl Factors {
    /// The factor on the device, in fp32. The entry holds the source, so its address cannot come to mean another factor.
    fn get(&mut self, factor: &Tensor, device: usize) -> Result<Torch> {
        let key = (factor.data() as usize, device);
        if let Some((source, ready)) = self.single.get(&key) {
            if source.shape() == factor.shape() && source.dtype() == factor.dtype() {
                return Ok(ready.shallow_clone());
            }
        }
        let ready = blob(factor)?.f_to_device(tch::Device::Cuda(device))?.f_to_kind(Kind::Float)?;
        self.single.insert(key, (factor.clone(), ready.shallow_clone()));
        Ok(ready)
    }

    /// Several products as one: [O, sum of ranks] and [sum of ranks, C].
    fn join(&mut self, ops: &[&LowRank], device: usize) -> Result<(Torch, Torch)> {
        let key = ops.iter().map(|op| op.up.data() as usize).collect();
        if let Some((ups, downs)) = self.joined.get(&key) {
            return Ok((ups.shallow_clone(), downs.shallow_clone()));
        }
        let ups = ops.iter().map(|op| self.get(&op.up, device)).collect::<Result<Vec<_>>>()?;
        let downs = ops.iter().map(|op| self.get(&op.down, device)).collect::<Result<Vec<_>>>()?;
        let joined = (Torch::f_cat(&ups, 1)?, Torch::f_cat(&downs, 0)?);
        self.joined.insert(key, (joined.0.shallow_clone(), joined.1.shallow_clone()));
        Ok(joined)
    }
}

/// A libtorch tensor over the view's memory. It must not outlive the memory.
pub fn blob(view: &View) -> Result<Torch> {
    let kind = kind(view.dtype())?;
    let device = match view.device() {
        Device::Cpu => tch::Device::Cpu,
        Device::Cuda(index) => {
            crate::torch_ext::require_cuda()?;
            tch::Device::Cuda(index)
        }
    };
    let (shape, strides) = (long(view.shape()), long(view.strides()));
    if view.count() == 0 {
        return Ok(Torch::f_zeros(&shape, (kind, device))?);
    }
    // SAFETY: the view's maker promised memory of this device, shape and strides.
    Ok(unsafe { Torch::f_from_blob(view.data(), &shape, &strides, kind, device)? })
}

fn kind(dtype: Dtype) -> Result<Kind> {
    match dtype {
        Dtype::F32 => Ok(Kind::Float),
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        other => {
            Err(Error::Dtype { tensor: "tensor".into(), got: other.to_string(), supported: "F32, F16, BF16" })
        }
    }
}

/// `out = base + sum of terms`, computed on CUDA device `device`.
pub fn merge(
    device: usize,
    name: &str,
    base: &View,
    out: &View,
    terms: &[Term<'_>],
    factors: &mut Factors,
) -> Result<()> {
    crate::torch_ext::require_cuda()?;
    let terms: Vec<&Term<'_>> = terms.iter().filter(|t| t.strength != 0.0).collect();
    let rows = base.shape().first().copied().unwrap_or(1) as i64;
    without_graph(|| {
        let (from, mut to) = (blob(base)?, blob(out)?);
        if terms.is_empty() {
            to.f_copy_(&from)?;
            return Ok(());
        }
        // A fresh matrix: another device or dtype makes a copy by itself, else `packed` does.
        let sum = from.f_to_device(tch::Device::Cuda(device))?.f_to_kind(Kind::Float)?;
        let fresh = sum.data_ptr() != from.data_ptr();
        let sum = if fresh { sum } else { packed(&sum, sum.device())? }.f_reshape([rows, -1])?;
        let pristine =
            terms.iter().any(|t| t.op.reads_weight()).then(|| packed(&sum, sum.device())).transpose()?;
        // What moves W towards a value comes first and takes W out of it before: the difference would be rounded at W's size.
        let (towards, others): (Vec<&Term<'_>>, Vec<&Term<'_>>) =
            terms.into_iter().partition(|t| matches!(t.op, Op::Replace(_)));
        for term in towards.into_iter().chain(others) {
            let Region { rows, cols, .. } = Region::of(name, base.shape(), term.slice)?;
            let region = |of: &Torch| {
                let part = of.f_narrow(0, rows.start as i64, rows.len() as i64)?;
                Ok::<_, Error>(part.f_narrow(1, cols.start as i64, cols.len() as i64)?)
            };
            let mut part = region(&sum)?;
            if let Op::LowRank(op) = term.op {
                let (up, down) = (factors.get(&op.up, device)?, factors.get(&op.down, device)?);
                let _ = part.f_addmm_(&up.f_mul_scalar(f64::from(term.coefficient(name)?))?, &down)?;
            } else if let (Op::Replace(op), Some(base)) = (term.op, &pristine) {
                let s = f64::from(term.coefficient(name)?);
                let _ = part.f_sub_(&region(base)?.f_mul_scalar(s)?)?;
                let _ = part.f_add_(&factors.get(&op.value, device)?.f_mul_scalar(s)?)?;
            } else {
                let base = pristine.as_ref().map(region).transpose()?;
                let _ = part.f_add_(&delta(name, term, base.as_ref(), device, factors)?)?;
            }
        }
        to.f_copy_(&sum.f_reshape(to.size())?)?;
        Ok(())
    })
}

/// strength * delta of a term that is no plain product, as the matrix of its region. `base` is that part of the pristine weight, for the
/// terms that read it.
fn delta(
    name: &str,
    term: &Term<'_>,
    base: Option<&Torch>,
    device: usize,
    factors: &mut Factors,
) -> Result<Torch> {
    let product = |up: &Tensor, down: &Tensor, factors: &mut Factors| {
        Ok::<_, Error>(factors.get(up, device)?.f_matmul(&factors.get(down, device)?)?)
    };
    let base =
        || base.ok_or_else(|| Error::Backend(format!("`{name}`: a term that reads the weight has none")));
    let delta = match term.op {
        Op::LowRank(op) => product(&op.up, &op.down, factors)?,
        Op::Hadamard(op) => {
            let [(up1, down1), (up2, down2)] = &op.pairs;
            product(up1, down1, factors)?.f_mul(&product(up2, down2, factors)?)?
        }
        Op::Kron(op) => factors.get(&op.w1, device)?.f_kron(&factors.get(&op.w2, device)?)?,
        Op::Dense(op) => factors.get(&op.diff, device)?,
        Op::Scale(op) => {
            let v = spread(&factors.get(&op.v, device)?, op.axis, base()?)?;
            base()?.f_mul(&v)?
        }
        Op::RightLowRank(op) => {
            let (rows, channels) = (base()?.size()[0], op.a1.shape()[0] as i64);
            // [rows, I, taps] with the channels last, so that each tap is a row of the product.
            let left = base()?.f_reshape([rows, channels, -1])?.f_transpose(1, 2)?;
            let (a1, a2) = (factors.get(&op.a1, device)?, factors.get(&op.a2, device)?);
            left.f_matmul(&a1)?.f_matmul(&a2)?.f_transpose(1, 2)?.f_reshape(base()?.size())?
        }
        Op::Replace(op) => factors.get(&op.value, device)?.f_sub(base()?)?,
        Op::Rotate(op) if op.interpolate => {
            return Ok(rotated(op, term.strength, base()?, device, factors)?.f_sub(base()?)?);
        }
        Op::Rotate(op) => rotated(op, 1.0, base()?, device, factors)?.f_sub(base()?)?,
        Op::Decompose(op) => {
            let mut v = base()?.shallow_clone();
            for inner in &op.inside {
                let inner = Term { op: inner, strength: 1.0, slice: None };
                v = v.f_add(&delta(name, &inner, None, device, factors)?)?;
            }
            // Per row the other axis is all columns; per channel it is the rows and the taps of the kernel.
            let count = op.magnitude.count() as i64;
            let grid = if op.axis == 0 { v.f_unsqueeze(0)? } else { v.f_reshape([v.size()[0], count, -1])? };
            let squares = grid.f_to_kind(Kind::Double)?.f_square()?;
            let norm = squares.f_sum_dim_intlist(&[0i64, 2][..], false, Kind::Double)?.f_sqrt()?;
            let magnitude = factors.get(&op.magnitude, device)?.f_to_kind(Kind::Double)?;
            let zero = norm.f_zeros_like()?;
            let factor =
                magnitude.f_div(&norm)?.f_where_self(&norm.f_gt(0.0)?, &zero)?.f_to_kind(Kind::Float)?;
            v.f_mul(&spread(&factor, op.axis, &v)?)?.f_sub(base()?)?
        }
        Op::Principal(op) => {
            let w = base()?.f_to_kind(Kind::Double)?;
            let tall = w.size()[0] >= w.size()[1];
            let turned = w.f_transpose(0, 1)?;
            let gram = if tall { turned.f_matmul(&w)? } else { w.f_matmul(&turned)? };
            let (_, vectors) = gram.f_linalg_eigh("L")?;
            let n = vectors.size()[1];
            let rank = (op.rank as i64).min(n);
            let lead = vectors.f_narrow(1, n - rank, rank)?;
            let back = lead.f_transpose(0, 1)?;
            let near = match tall {
                true => w.f_matmul(&lead)?.f_matmul(&back)?,
                false => lead.f_matmul(&back.f_matmul(&w)?)?,
            };
            near.f_to_kind(Kind::Float)?
        }
    };
    Ok(delta.f_mul_scalar(f64::from(term.coefficient(name)?))?)
}

/// One value per row (axis 0) or input channel (axis 1) as a tensor that multiplies a matrix like `of`.
fn spread(v: &Torch, axis: usize, of: &Torch) -> Result<Torch> {
    Ok(match axis {
        0 => v.f_unsqueeze(1)?,
        _ => v.f_repeat_interleave_self_int(of.size()[1] / v.size()[0], 0, None)?.f_unsqueeze(0)?,
    })
}

/// What a rotation makes of `w`; at strength 1, or at `s` when it interpolates.
fn rotated(op: &Rotate, s: f64, w: &Torch, device: usize, factors: &mut Factors) -> Result<Torch> {
    // Columns are turned as the rows of the transpose.
    let mut x = if op.axis == 0 { w.shallow_clone() } else { w.f_transpose(0, 1)?.f_contiguous()? };
    let cols = x.size()[1];
    for stage in &op.stages {
        let order = stage.order.as_ref().map(|order| {
            Torch::f_from_slice(&long(order)).and_then(|t| t.f_to_device(tch::Device::Cuda(device)))
        });
        let order = order.transpose()?;
        let gathered = match &order {
            Some(order) => x.f_index_select(0, order)?,
            None => x.shallow_clone(),
        };
        let (mut at, mut turned) = (0, Vec::new());
        for blocks in &stage.blocks {
            let (n, b) = (blocks.shape()[0] as i64, blocks.shape()[1] as i64);
            let mut blocks = factors.get(blocks, device)?;
            if op.interpolate {
                let one = Torch::f_eye(b, (Kind::Float, tch::Device::Cuda(device)))?;
                blocks = blocks.f_mul_scalar(s)?.f_add(&one.f_mul_scalar(1.0 - s)?)?;
            }
            let rows = gathered.f_narrow(0, at, n * b)?.f_reshape([n, b, cols])?;
            turned.push(blocks.f_bmm(&rows)?.f_reshape([n * b, cols])?);
            at += n * b;
        }
        x = Torch::f_cat(&turned, 0)?;
        if let Some(order) = &order {
            x = x.f_index_select(0, &order.f_argsort(0, false)?)?;
        }
    }
    let x = if op.axis == 0 { x } else { x.f_transpose(0, 1)? };
    let Some(rescale) = &op.rescale else { return Ok(x) };
    let factor = factors.get(rescale, device)?.f_sub_scalar(1.0)?.f_mul_scalar(s)?.f_add_scalar(1.0)?;
    Ok(x.f_mul(&factor.f_unsqueeze(1)?)?)
}

/// Runs `work` without recording a graph; the thread's own mode comes back also after a panic.
fn without_graph<T>(work: impl FnOnce() -> T) -> T {
    let _guard = tch::no_grad_guard();
    work()
}

/// A packed copy of a CUDA weight, on its device or in host memory.
pub fn backup(weight: &View, place: BackupPlace) -> Result<(View, Owned)> {
    let source = blob(weight)?;
    let copy = match place {
        BackupPlace::Device | BackupPlace::Auto | BackupPlace::Compact => packed(&source, source.device())?,
        BackupPlace::Host => packed(&source, tch::Device::Cpu)?,
    };
    let device = if place == BackupPlace::Host { Device::Cpu } else { weight.device() };
    // SAFETY: the memory of `copy`, which the caller keeps beside the view.
    let view =
        unsafe { View::from_raw(copy.data_ptr().cast(), device, weight.dtype(), weight.shape(), None)? };
    Ok((view, Owned(copy)))
}

/// A row-major copy that shares nothing with `source`.
fn packed(source: &Torch, device: tch::Device) -> Result<Torch> {
    let mut copy = Torch::f_empty(source.size(), (source.kind(), device))?;
    copy.f_copy_(source)?;
    Ok(copy)
}

/// All elements, row-major, as f32.
pub fn to_host(view: &View) -> Result<Vec<f32>> {
    let values = blob(view)?.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?.f_reshape([-1])?;
    let mut out = vec![0f32; view.count()];
    values.f_copy_data(&mut out, view.count())?;
    Ok(out)
}

/// Keeps a libtorch tensor's memory.
pub struct Owned(#[allow(dead_code)] Torch);

/// Copies between views of the same shape and dtype, on any devices.
pub fn copy(from: &View, to: &View) -> Result<()> {
    blob(to)?.f_copy_(&blob(from)?)?;
    Ok(())
}

/// `y += sum of terms applied to x` on x's device. `base` is the pristine weight.
pub fn forward(
    name: &str,
    base: &View,
    geometry: &Geometry,
    x: &View,
    y: &View,
    terms: &[Term<'_>],
    factors: &mut Factors,
) -> Result<()> {
    let layout = Layout::check(name, base.shape(), geometry, x.shape(), y.shape())?;
    let Device::Cuda(device) = y.device() else {
        return Err(Error::argument(format!("`{name}`: the output is not on a GPU"), ""));
    };
    if x.device() != y.device() {
        let what = format!("`{name}`: input on {}, output on {}", x.device(), y.device());
        return Err(Error::argument(what, "both must be on one device"));
    }
    if terms.iter().all(|t| t.strength == 0.0) {
        return Ok(());
    }
    without_graph(|| {
        let (x, y) = (blob(x)?, blob(y)?);
        let input = x.f_to_kind(Kind::Float)?;
        let sum = packed(&y.f_to_kind(Kind::Float)?, y.device())?;
        // All thin products on the whole weight are one pair of products, whose middle is as wide as their ranks together.
        let (mut thin, mut coefficients) = (Vec::new(), Vec::new());
        for term in terms.iter().filter(|t| t.strength != 0.0) {
            if let (Op::LowRank(op), None) = (term.op, term.slice) {
                thin.push(op);
                coefficients.extend(std::iter::repeat_n(term.coefficient(name)?, op.up.shape()[1]));
            }
        }
        if !thin.is_empty() {
            let (ups, downs) = factors.join(&thin, device)?;
            let scale = Torch::f_from_slice(&coefficients)?.f_to_device(tch::Device::Cuda(device))?;
            let _ = sum.shallow_clone().f_add_(&product(&layout, &input, &ups.f_mul(&scale)?, &downs)?)?;
        }
        for term in terms.iter().filter(|t| t.strength != 0.0) {
            bypass::check_slice(name, &layout, term)?;
            let Region { rows, .. } = Region::of(name, base.shape(), term.slice)?;
            let added = match term.op {
                Op::LowRank(_) if term.slice.is_none() => continue,
                Op::LowRank(op) => {
                    let up = factors.get(&op.up, device)?.f_mul_scalar(f64::from(term.coefficient(name)?))?;
                    product(&layout, &input, &up, &factors.get(&op.down, device)?)?
                }
                op => {
                    let part = match op.reads_weight() {
                        true => {
                            let weight =
                                blob(base)?.f_to_device(tch::Device::Cuda(device))?.f_to_kind(Kind::Float)?;
                            let weight = weight.f_reshape([base.shape()[0] as i64, -1])?;
                            Some(weight.f_narrow(0, rows.start as i64, rows.len() as i64)?)
                        }
                        false => None,
                    };
                    layer(&layout, &input, &delta(name, term, part.as_ref(), device, factors)?)?
                }
            };
            let channels = if layout.kernel.is_empty() { y.dim() as i64 - 1 } else { 1 };
            let _ = sum.f_narrow(channels, rows.start as i64, rows.len() as i64)?.f_add_(&added)?;
        }
        y.shallow_clone().f_copy_(&sum)?;
        Ok(())
    })
}

fn long(values: &[usize]) -> Vec<i64> {
    values.iter().map(|&v| v as i64).collect()
}

/// A layer with this weight, given as a matrix, without bias.
fn layer(l: &Layout, x: &Torch, weight: &Torch) -> Result<Torch> {
    if l.kernel.is_empty() {
        return Ok(x.f_matmul(&weight.f_transpose(0, 1)?)?);
    }
    let weight = weight.f_reshape([&[weight.size()[0], l.channels as i64][..], &long(&l.kernel)].concat())?;
    let (stride, padding, dilation) = (long(&l.stride), long(&l.padding), long(&l.dilation));
    convolve(x, &weight, [stride, padding, dilation], l.groups)
}

/// A convolution in fp32, whatever the process allows.
fn convolve(
    x: &Torch,
    weight: &Torch,
    [stride, padding, dilation]: [Vec<i64>; 3],
    groups: usize,
) -> Result<Torch> {
    let none = vec![0i64; stride.len()];
    let (transposed, benchmark, deterministic, cudnn, tf32) = (false, false, true, true, false);
    Ok(x.f_internal_convolution(
        weight,
        None::<&Torch>,
        stride,
        padding,
        dilation,
        transposed,
        none,
        groups as i64,
        benchmark,
        deterministic,
        cudnn,
        tf32,
    )?)
}

/// A layer with the weight `up @ down`, one factor after the other.
fn product(l: &Layout, x: &Torch, up: &Torch, down: &Torch) -> Result<Torch> {
    if l.groups != 1 {
        // Groups share `down` but not their inputs: only the product can be split among them.
        return layer(l, x, &up.f_matmul(down)?);
    }
    let middle = layer(l, x, down)?;
    if l.kernel.is_empty() {
        return Ok(middle.f_matmul(&up.f_transpose(0, 1)?)?);
    }
    let [ones, none] = [1i64, 0].map(|v| vec![v; l.kernel.len()]);
    let up = up.f_reshape([&up.size()[..], &ones].concat())?;
    convolve(&middle, &up, [ones.clone(), none, ones], 1)
}
