//! The executor on libtorch: the same terms on any CUDA device, one weight after the other, on the current stream of the calling thread.
//!
//! Sums run in fp32 with TF32 off (`torch_ext::Scope` around every call from outside) and are rounded once by the final copy.

use super::bypass::{self, Geometry, Layout};
use super::ops::{Op, Region, Term};
use super::restore::BackupPlace;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::{Device, Tensor, View};
use std::collections::HashMap;
use tch::{Kind, Tensor as Torch};

/// fp32 copies of factors on their device, so that a change of strength moves no factor again.
#[derive(Default)]
pub struct Factors(HashMap<(usize, usize), (Tensor, Torch)>);

impl Factors {
    /// The factor on the device, in fp32. The entry holds the source, so its address cannot come to mean another factor.
    fn get(&mut self, factor: &Tensor, device: usize) -> Result<Torch> {
        let key = (factor.data() as usize, device);
        if let Some((source, ready)) = self.0.get(&key) {
            if source.shape() == factor.shape() && source.dtype() == factor.dtype() {
                return Ok(ready.shallow_clone());
            }
        }
        let ready = blob(factor)?.f_to_device(tch::Device::Cuda(device))?.f_to_kind(Kind::Float)?;
        self.0.insert(key, (factor.clone(), ready.shallow_clone()));
        Ok(ready)
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
        let pristine = terms
            .iter()
            .any(|t| matches!(t.op, Op::Scale(_)))
            .then(|| packed(&sum, sum.device()))
            .transpose()?;
        for term in terms {
            let Region { rows, cols, .. } = Region::of(name, base.shape(), term.slice)?;
            let region = |of: &Torch| {
                let part = of.f_narrow(0, rows.start as i64, rows.len() as i64)?;
                Ok::<_, Error>(part.f_narrow(1, cols.start as i64, cols.len() as i64)?)
            };
            let mut part = region(&sum)?;
            if let Op::LowRank(op) = term.op {
                let (up, down) = (factors.get(&op.up, device)?, factors.get(&op.down, device)?);
                let _ = part.f_addmm_(&up.f_mul_scalar(f64::from(term.coefficient(name)?))?, &down)?;
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
/// terms that multiply it.
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
    let delta = match term.op {
        Op::LowRank(op) => product(&op.up, &op.down, factors)?,
        Op::Hadamard(op) => {
            let [(up1, down1), (up2, down2)] = &op.pairs;
            product(up1, down1, factors)?.f_mul(&product(up2, down2, factors)?)?
        }
        Op::Kron(op) => factors.get(&op.w1, device)?.f_kron(&factors.get(&op.w2, device)?)?,
        Op::Dense(op) => factors.get(&op.diff, device)?,
        Op::Scale(op) => {
            let base =
                base.ok_or_else(|| Error::Backend("a term that multiplies the weight has no weight".into()))?;
            let v = factors.get(&op.v, device)?;
            let v = match op.axis {
                0 => v.f_unsqueeze(1)?,
                _ => v
                    .f_repeat_interleave_self_int(base.size()[1] / op.v.count() as i64, 0, None)?
                    .f_unsqueeze(0)?,
            };
            base.f_mul(&v)?
        }
    };
    Ok(delta.f_mul_scalar(f64::from(term.coefficient(name)?))?)
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
        BackupPlace::Device => packed(&source, source.device())?,
        BackupPlace::Host => packed(&source, tch::Device::Cpu)?,
    };
    let device = if place == BackupPlace::Device { weight.device() } else { Device::Cpu };
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
        for term in terms.iter().filter(|t| t.strength != 0.0) {
            bypass::check_slice(name, &layout, term)?;
            let Region { rows, .. } = Region::of(name, base.shape(), term.slice)?;
            let added = match term.op {
                Op::LowRank(op) => {
                    let up = factors.get(&op.up, device)?.f_mul_scalar(f64::from(term.coefficient(name)?))?;
                    product(&layout, &input, &up, &factors.get(&op.down, device)?)?
                }
                op => {
                    let part = match op {
                        Op::Scale(_) => {
                            let weight =
                                blob(base)?.f_to_device(tch::Device::Cuda(device))?.f_to_kind(Kind::Float)?;
                            let weight = weight.f_reshape([base.shape()[0] as i64, -1])?;
                            Some(weight.f_narrow(0, rows.start as i64, rows.len() as i64)?)
                        }
                        _ => None,
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
