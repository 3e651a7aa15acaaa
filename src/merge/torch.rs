//! The executor on libtorch: the same terms on any CUDA device, one weight after the other, on the current stream of the calling thread.
//!
//! Sums run in fp32 with TF32 off (`torch_ext::Scope` around every call from outside) and are rounded once by the final copy.

use super::bypass::{Geometry, Layout};
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
    let long = |values: &[usize]| values.iter().map(|&v| v as i64).collect::<Vec<_>>();
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
    tch::no_grad(|| {
        let (from, mut to) = (blob(base)?, blob(out)?);
        if terms.is_empty() {
            to.f_copy_(&from)?;
            return Ok(());
        }
        // A fresh matrix: `to` on another device or in another dtype copies by itself, else the clone does.
        let sum = from.f_to_device(tch::Device::Cuda(device))?.f_to_kind(Kind::Float)?;
        let fresh = sum.data_ptr() != from.data_ptr();
        let sum = if fresh { sum } else { packed(&sum, sum.device())? }.f_reshape([rows, -1])?;
        for term in terms {
            let Op::LowRank(op) = term.op;
            let Region { rows, cols, .. } = Region::of(name, base.shape(), term.slice)?;
            let part = sum.f_narrow(0, rows.start as i64, rows.len() as i64)?;
            let mut part = part.f_narrow(1, cols.start as i64, cols.len() as i64)?;
            let (up, down) = (factors.get(&op.up, device)?, factors.get(&op.down, device)?);
            let _ = part.f_addmm_(&up.f_mul_scalar(term.strength * op.scale)?, &down)?;
        }
        to.f_copy_(&sum.f_reshape(to.size())?)?;
        Ok(())
    })
}

/// A packed copy of a CUDA weight, on its device or in pinned host memory.
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

/// Keeps a libtorch tensor's memory.
pub struct Owned(#[allow(dead_code)] Torch);

/// Copies between views of the same shape and dtype, on any devices.
pub fn copy(from: &View, to: &View) -> Result<()> {
    blob(to)?.f_copy_(&blob(from)?)?;
    Ok(())
}

/// `y += sum of terms applied to x` on x's device.
pub fn forward(
    name: &str,
    weight: &[usize],
    geometry: &Geometry,
    x: &View,
    y: &View,
    terms: &[Term<'_>],
    factors: &mut Factors,
) -> Result<()> {
    let layout = Layout::check(name, weight, geometry, x.shape(), y.shape())?;
    let Device::Cuda(device) = y.device() else {
        return super::bypass::forward(name, weight, geometry, x, y, terms);
    };
    if x.device() != y.device() {
        return Err(Error::argument(
            format!("`{name}`: input on {}, output on {}", x.device(), y.device()),
            "",
        ));
    }
    tch::no_grad(|| {
        let (x, y) = (blob(x)?, blob(y)?);
        let input = x.f_to_kind(Kind::Float)?;
        let mut sum = y.f_to_kind(Kind::Float)?;
        for term in terms.iter().filter(|t| t.strength != 0.0) {
            let Op::LowRank(op) = term.op;
            let (up, down) = (factors.get(&op.up, device)?, factors.get(&op.down, device)?);
            let up = up.f_mul_scalar(term.strength * op.scale)?;
            let delta = layer(&layout, &input, &up, &down)?;
            let channel_axis = if layout.kernel.is_empty() { y.dim() as i64 - 1 } else { 1 };
            sum = match term.slice {
                None => sum.f_add(&delta)?,
                Some(s) if s.axis == 0 && layout.groups == 1 => {
                    let _ = sum.f_narrow(channel_axis, s.start as i64, s.len as i64)?.f_add_(&delta)?;
                    sum
                }
                Some(_) => {
                    let what = format!("`{name}`: a bypass on a slice of the input is not supported");
                    return Err(Error::Unsupported { what, hint: "merge it, or slice along axis 0".into() });
                }
            };
        }
        y.shallow_clone().f_copy_(&sum)?;
        Ok(())
    })
}

fn layer(l: &Layout, x: &Torch, up: &Torch, down: &Torch) -> Result<Torch> {
    if l.kernel.is_empty() {
        return Ok(x.f_matmul(&down.f_transpose(0, 1)?)?.f_matmul(&up.f_transpose(0, 1)?)?);
    }
    let long = |values: &[usize]| values.iter().map(|&v| v as i64).collect::<Vec<_>>();
    let shape = |lead: [i64; 2], kernel: &[usize]| [&lead[..], &long(kernel)].concat();
    let convolve =
        |x: &Torch, w: &Torch, stride: &[usize], padding: &[usize], dilation: &[usize], groups: usize| {
            let zeros = vec![0i64; stride.len()];
            x.f_convolution(
                w,
                None::<&Torch>,
                long(stride),
                long(padding),
                long(dilation),
                false,
                zeros,
                groups as i64,
            )
        };
    let (rank, ones) = (down.size()[0], vec![1usize; l.kernel.len()]);
    let channels = l.channels as i64;
    if l.groups == 1 {
        let down = down.f_reshape(shape([rank, channels], &l.kernel))?;
        let up = up.f_reshape(shape([up.size()[0], rank], &ones))?;
        let middle = convolve(x, &down, &l.stride, &l.padding, &l.dilation, 1)?;
        return Ok(convolve(&middle, &up, &ones, &vec![0; ones.len()], &ones, 1)?);
    }
    // Groups share `down` but not their inputs: the product of the factors is the layer's own weight.
    let delta = up.f_matmul(down)?.f_reshape(shape([up.size()[0], channels], &l.kernel))?;
    Ok(convolve(x, &delta, &l.stride, &l.padding, &l.dilation, l.groups)?)
}
