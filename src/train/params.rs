//! The flat store: one fp32 master, one fp32 gradient and, when the compute dtype is another, one working copy. Modules are views by offset.

use crate::dtype::{element_count, Float};
use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Every parameter begins at a multiple of so many elements: 128 bytes in 16 bits, what the fastest matrix products and copies ask for.
const ALIGN: usize = 64;
/// The buffers are whole rows of so many elements, over which norms are summed in two levels.
const ROW: usize = 1024;

/// Where one parameter lies in the flat buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First element.
    pub offset: usize,
    /// Shape; its product is the number of elements.
    pub shape: Vec<usize>,
}

impl Segment {
    /// Number of elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// The parameter in a flat tensor.
    pub fn view(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.f_narrow(0, self.offset as i64, self.count() as i64)?.f_view_(long(&self.shape))?)
    }
}

/// Offsets of all parameters, before there is memory for them.
#[derive(Debug)]
pub struct Plan {
    segments: Vec<Segment>,
    end: usize,
    align: usize,
}

impl Plan {
    /// Of no parameters yet; each will begin at a multiple of [`ALIGN`] or, if that is more, of `align`, a power of two up to [`ROW`].
    pub fn new(align: usize) -> Self {
        Plan { segments: Vec::new(), end: 0, align: align.max(ALIGN) }
    }

    /// Places a parameter behind the others and gives its index.
    pub fn push(&mut self, shape: &[usize]) -> Result<usize> {
        let end = element_count(shape)
            .and_then(|n| n.checked_next_multiple_of(self.align)?.checked_add(self.end))
            .filter(|&end| end < i64::MAX as usize / 8)
            .ok_or_else(|| {
                Error::argument(format!("a parameter of shape {shape:?} is beyond any memory"), "")
            })?;
        self.segments.push(Segment { offset: self.end, shape: shape.to_vec() });
        self.end = end;
        Ok(self.segments.len() - 1)
    }
}

/// The buffers and the views into them.
pub struct Params {
    segments: Vec<Segment>,
    master: Tensor,
    gradient: Tensor,
    working: Option<Tensor>,
    leaves: Vec<Tensor>,
    gradients: Vec<Tensor>,
}

impl Params {
    /// Allocates and fills the buffers; `fill` writes the start values of a parameter. Padding is zero and stays zero.
    pub fn new(
        plan: Plan,
        device: Device,
        compute: Float,
        mut fill: impl FnMut(usize, &mut [f32]),
    ) -> Result<Self> {
        let length = plan.end.next_multiple_of(ROW).max(ROW);
        let mut values = Vec::new();
        values
            .try_reserve_exact(length)
            .map_err(|_| Error::Backend(format!("no memory for {length} parameters")))?;
        values.resize(length, 0f32);
        for (i, segment) in plan.segments.iter().enumerate() {
            fill(i, &mut values[segment.offset..][..segment.count()]);
        }
        tch::no_grad(|| {
            let master = Tensor::f_from_slice(&values)?.f_to_device(device)?;
            let gradient = master.f_zeros_like()?;
            let working = match compute {
                Float::F32 => None,
                other => Some(master.f_to_kind(kind(other))?),
            };
            let flat = working.as_ref().unwrap_or(&master);
            let mut leaves = Vec::with_capacity(plan.segments.len());
            let mut gradients = Vec::with_capacity(plan.segments.len());
            for segment in &plan.segments {
                leaves.push(segment.view(flat)?.f_detach()?.f_set_requires_grad(true)?);
                gradients.push(segment.view(&gradient)?);
            }
            let params = Params { segments: plan.segments, master, gradient, working, leaves, gradients };
            params.settle()?;
            Ok(params)
        })
    }

    /// Where the parameters lie.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The fp32 values.
    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// The fp32 gradient.
    pub fn gradient(&self) -> &Tensor {
        &self.gradient
    }

    /// Views of the values in the compute dtype, as leaves of an autograd graph.
    pub fn leaves(&self, range: std::ops::Range<usize>) -> &[Tensor] {
        &self.leaves[range]
    }

    /// The dtype of the leaves.
    pub fn compute(&self) -> Result<Kind> {
        Ok(self.working.as_ref().unwrap_or(&self.master).f_kind()?)
    }

    /// Adds to the gradient of parameter `index`, in fp32. Called without grad mode.
    pub fn accumulate(&mut self, index: usize, gradient: &Tensor) -> Result<()> {
        let _ = self.gradients[index].f_add_(gradient)?;
        Ok(())
    }

    /// Both flat fp32 buffers for an optimizer.
    pub fn update(&mut self) -> (&mut Tensor, &mut Tensor) {
        (&mut self.master, &mut self.gradient)
    }

    /// Carries new master values over to the working copy.
    pub fn refresh(&mut self) -> Result<()> {
        if let Some(working) = &mut self.working {
            tch::no_grad(|| working.f_copy_(&self.master))?;
        }
        Ok(())
    }

    /// Waits until the calling thread's stream has written the buffers: the host may go on with them on another stream.
    pub fn settle(&self) -> Result<()> {
        let last = self.working.as_ref().unwrap_or(&self.gradient);
        last.f_narrow(0, 0, 1)?.f_double_value(&[0])?;
        Ok(())
    }

    /// Overwrites parameter `index` in the master; `refresh` makes it effective.
    pub fn set(&mut self, index: usize, values: &[f32]) -> Result<()> {
        let segment = &self.segments[index];
        tch::no_grad(|| {
            let mut flat = self.master.f_narrow(0, segment.offset as i64, segment.count() as i64)?;
            flat.f_copy_(&Tensor::f_from_slice(values)?)
        })?;
        Ok(())
    }

    /// Sets the gradient to zero.
    pub fn zero_gradient(&mut self) -> Result<()> {
        let _ = tch::no_grad(|| self.gradient.f_zero_())?;
        Ok(())
    }

    /// The Euclidean norm of the gradient; waits for the device. Rows are summed in fp32, their norms in f64, so that the error does not
    /// grow with the number of parameters.
    pub fn gradient_norm(&self) -> Result<f64> {
        tch::no_grad(|| {
            let rows = self.gradient.f_view_([-1, ROW as i64])?.f_norm_scalaropt_dim(2, [1i64], false)?;
            Ok(rows.f_to_kind(Kind::Double)?.f_norm_scalaropt_dim(2, [0i64], false)?.f_double_value(&[])?)
        })
    }
}

/// A flat fp32 tensor in host memory.
pub fn to_host(flat: &Tensor) -> Result<Vec<f32>> {
    let length = flat.size().iter().product::<i64>() as usize;
    let mut values = vec![0f32; length];
    flat.f_copy_data(&mut values, length)?;
    Ok(values)
}

/// libtorch's name of a dtype.
pub fn kind(float: Float) -> Kind {
    match float {
        Float::F32 => Kind::Float,
        Float::F16 => Kind::Half,
        Float::BF16 => Kind::BFloat16,
        Float::E4M3 => Kind::Float8e4m3fn,
        Float::E5M2 => Kind::Float8e5m2,
    }
}

/// libtorch counts in i64. No dimension of an existing tensor exceeds it.
pub fn long(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&d| d as i64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(compute: Float) -> Params {
        let mut plan = Plan::new(1);
        plan.push(&[3, 5]).unwrap();
        plan.push(&[7]).unwrap();
        Params::new(plan, Device::Cpu, compute, |i, v| v.fill(1.0 + i as f32 / 512.0)).unwrap()
    }

    #[test]
    fn views_share_the_flat_buffers_and_padding_stays_zero() {
        let mut p = params(Float::F32);
        assert_eq!(p.segments()[1].offset, 64);
        assert_eq!(p.master().size(), [1024]);
        p.set(0, &[2.0; 15]).unwrap();
        assert_eq!(Vec::<f32>::try_from(&p.leaves(0..1)[0].flatten(0, -1)).unwrap(), [2.0; 15]);
        p.accumulate(1, &Tensor::from_slice(&[3f32; 7])).unwrap();
        p.accumulate(1, &Tensor::from_slice(&[1f32; 7])).unwrap();
        let gradient = to_host(p.gradient()).unwrap();
        assert_eq!(gradient.iter().filter(|&&g| g != 0.0).count(), 7);
        assert_eq!(gradient[64..71], [4.0; 7]);
        assert!((p.gradient_norm().unwrap() - 4.0 * 7f64.sqrt()).abs() < 1e-6);
    }

    #[test]
    fn working_copy_is_rounded_from_the_master() {
        let mut p = params(Float::BF16);
        assert_eq!(p.leaves(1..2)[0].kind(), Kind::BFloat16);
        assert_eq!(p.leaves(1..2)[0].double_value(&[0]), 1.0, "1 + 2^-9 is no bf16");
        assert_eq!(p.master().double_value(&[64]), 1.0 + 1.0 / 512.0);
        p.set(1, &[1.5; 7]).unwrap();
        p.refresh().unwrap();
        assert_eq!(p.leaves(1..2)[0].double_value(&[6]), 1.5);
        assert!(p.leaves(1..2)[0].requires_grad());
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(Plan::new(1).push(&[usize::MAX / 2, 3]).is_err());
        assert!(Plan::new(1).push(&[usize::MAX - 3]).is_err());
    }
}
