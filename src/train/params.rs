//! The flat store: one fp32 master, one fp32 gradient and, when the compute dtype is another, one working copy. Modules are views by offset.

use crate::algo::training::{long, Parameter};
use crate::dtype::{element_count, Float};
use crate::error::{Error, Result};
use std::ops::Range;
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
    /// Shape of its values.
    pub shape: Vec<usize>,
    /// Shape that it has in the buffers, row-major: `shape`, or longer along some axes by zeros at the end.
    pub stored: Vec<usize>,
}

impl Segment {
    /// Number of elements that it takes.
    pub fn count(&self) -> usize {
        self.stored.iter().product()
    }

    /// What it takes of a flat tensor, in the stored shape.
    pub fn whole(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.f_narrow(0, self.offset as i64, self.count() as i64)?.f_view_(long(&self.stored))?)
    }

    /// Its values in a flat tensor, a view.
    pub fn view(&self, flat: &Tensor) -> Result<Tensor> {
        let mut view = self.whole(flat)?;
        for (axis, (&size, &stored)) in self.shape.iter().zip(&self.stored).enumerate() {
            if size != stored {
                view = view.f_narrow(axis as i64, 0, size as i64)?;
            }
        }
        Ok(view)
    }

    /// Its values in a flat buffer of the host, without the zeros.
    pub fn values(&self, flat: &[f32]) -> Vec<f32> {
        let taken = &flat[self.offset..][..self.count()];
        let mut values = Vec::with_capacity(self.shape.iter().product());
        for (start, length) in self.rows() {
            values.extend_from_slice(&taken[start..][..length]);
        }
        values
    }

    /// Puts values without zeros where they belong in what it takes of a buffer.
    pub fn place(&self, values: &[f32], taken: &mut [f32]) {
        for ((start, length), row) in self.rows().zip(values.chunks(self.row())) {
            taken[start..][..length].copy_from_slice(row);
        }
    }

    /// Length of a row of values.
    fn row(&self) -> usize {
        self.shape.last().copied().unwrap_or(1).max(1)
    }

    /// (start within what it takes, length) of every row of values.
    fn rows(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let outer = self.shape.len().saturating_sub(1);
        let count: usize = self.shape[..outer].iter().product();
        (0..count).map(move |row| {
            let (mut left, mut start, mut step) = (row, 0, self.stored.last().copied().unwrap_or(1));
            for axis in (0..outer).rev() {
                start += left % self.shape[axis] * step;
                left /= self.shape[axis];
                step *= self.stored[axis];
            }
            (start, self.row())
        })
    }
}

/// Offsets of all parameters, before there is memory for them.
#[derive(Debug)]
pub struct Plan {
    segments: Vec<Segment>,
    uses: Vec<Use>,
    end: usize,
    align: usize,
}

/// How forward, backward and the optimizer take a parameter.
#[derive(Clone, Copy, Debug)]
struct Use {
    precise: bool,
    frozen: bool,
    rate: f64,
}

impl Plan {
    /// Of no parameters yet; each will begin at a multiple of [`ALIGN`] or, if that is more, of `align`, a power of two up to [`ROW`].
    pub fn new(align: usize) -> Self {
        Plan { segments: Vec::new(), uses: Vec::new(), end: 0, align: align.max(ALIGN) }
    }

    /// Adds a parameter, whose learning rate has a factor, and gives its index.
    pub fn push(&mut self, parameter: &Parameter, rate: f64) -> Result<usize> {
        let (shape, stored) = (&parameter.shape, &parameter.stored);
        self.end = element_count(stored)
            .and_then(|n| n.checked_next_multiple_of(self.align)?.checked_add(self.end))
            .filter(|&end| end < i64::MAX as usize / 8)
            .ok_or_else(|| {
                Error::argument(format!("a parameter of shape {shape:?} is beyond any memory"), "")
            })?;
        self.segments.push(Segment { offset: 0, shape: shape.clone(), stored: stored.clone() });
        self.uses.push(Use { precise: parameter.precise, frozen: parameter.frozen, rate });
        Ok(self.segments.len() - 1)
    }

    /// Places the parameters, those of one learning rate side by side, and among them those of one shape; gives the ranges of each rate with
    /// it.
    pub fn place(&mut self) -> Vec<(Range<usize>, f64)> {
        let mut groups: Vec<(Range<usize>, f64)> = Vec::new();
        for used in &self.uses {
            if groups.iter().all(|(_, rate)| *rate != used.rate) {
                groups.push((0..0, used.rate));
            }
        }
        let mut end = 0;
        for (range, rate) in &mut groups {
            range.start = end;
            let mut shapes: Vec<(Vec<usize>, Vec<&mut Segment>)> = Vec::new();
            for (segment, _) in self.segments.iter_mut().zip(&self.uses).filter(|(_, u)| u.rate == *rate) {
                match shapes.iter_mut().find(|(shape, _)| *shape == segment.shape) {
                    Some((_, alike)) => alike.push(segment),
                    None => shapes.push((segment.shape.clone(), vec![segment])),
                }
            }
            for segment in shapes.into_iter().flat_map(|(_, alike)| alike) {
                segment.offset = end;
                end += segment.count().next_multiple_of(self.align);
            }
            range.end = end;
        }
        if let Some((last, _)) = groups.last_mut() {
            last.end = self.length();
        }
        groups
    }

    /// Length of the buffers.
    fn length(&self) -> usize {
        self.end.next_multiple_of(ROW).max(ROW)
    }
}

/// The buffers and the views into them.
pub struct Params {
    segments: Vec<Segment>,
    master: Tensor,
    gradient: Tensor,
    working: Option<Tensor>,
    leaves: Vec<Tensor>,
    exact: Vec<Tensor>,
    gradients: Vec<Tensor>,
    compute: Kind,
}

impl Params {
    /// Allocates and fills the buffers; `fill` writes the start values of a parameter, row-major in its own shape. Padding is zero and stays zero.
    pub fn new(
        plan: Plan,
        device: Device,
        compute: Float,
        mut fill: impl FnMut(usize, &mut [f32]),
    ) -> Result<Self> {
        let length = plan.length();
        let mut values = Vec::new();
        values
            .try_reserve_exact(length)
            .map_err(|_| Error::Backend(format!("no memory for {length} parameters")))?;
        values.resize(length, 0f32);
        for (i, segment) in plan.segments.iter().enumerate() {
            let mut own = vec![0f32; segment.shape.iter().product()];
            fill(i, &mut own);
            segment.place(&own, &mut values[segment.offset..][..segment.count()]);
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
            let (mut exact, mut gradients) = (Vec::new(), Vec::new());
            for (segment, used) in plan.segments.iter().zip(&plan.uses) {
                let from = if used.precise { &master } else { flat };
                leaves.push(segment.whole(from)?.f_detach()?.f_set_requires_grad(!used.frozen)?);
                exact.push(segment.whole(&master)?);
                gradients.push(segment.whole(&gradient)?);
            }
            let (segments, compute) = (plan.segments, kind(compute));
            let params = Params { segments, master, gradient, working, leaves, exact, gradients, compute };
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

    /// The values in the compute dtype, where that is not fp32.
    pub fn working(&self) -> Option<&Tensor> {
        self.working.as_ref()
    }

    /// Views of the values in their stored shapes, as leaves of an autograd graph: in the compute dtype, precise ones in fp32.
    pub fn leaves(&self, range: Range<usize>) -> &[Tensor] {
        &self.leaves[range]
    }

    /// Views of the fp32 values in their stored shapes.
    pub fn exact(&self, range: Range<usize>) -> &[Tensor] {
        &self.exact[range]
    }

    /// The compute dtype.
    pub fn compute(&self) -> Kind {
        self.compute
    }

    /// The fp32 gradients of parameters, in their stored shapes: views.
    pub fn gradients(&self, range: Range<usize>) -> &[Tensor] {
        &self.gradients[range]
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

    /// Zeros what lies behind the values of parameters that are stored longer than they are; a host that writes the flat buffer may have
    /// overwritten it.
    pub fn mend(&mut self) -> Result<()> {
        tch::no_grad(|| {
            for segment in &self.segments {
                for (axis, (&size, &stored)) in segment.shape.iter().zip(&segment.stored).enumerate() {
                    if size != stored {
                        let rest = (stored - size) as i64;
                        let _ = segment
                            .whole(&self.master)?
                            .f_narrow(axis as i64, size as i64, rest)?
                            .f_zero_()?;
                    }
                }
            }
            Ok(())
        })
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
            let given = Tensor::f_from_slice(values)?.f_reshape(long(&segment.shape))?;
            segment.view(&self.master)?.f_copy_(&given)?;
            Ok(())
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algo::training::Init;

    fn parameter(shape: &[usize]) -> Parameter {
        Parameter::new("slot", shape, Init::ZEROS)
    }

    fn params(compute: Float) -> Params {
        let mut plan = Plan::new(1);
        plan.push(&parameter(&[3, 5]), 1.0).unwrap();
        plan.push(&parameter(&[7]), 1.0).unwrap();
        assert_eq!(plan.place(), [(0..1024, 1.0)]);
        Params::new(plan, Device::Cpu, compute, |i, v| v.fill(1.0 + i as f32 / 512.0)).unwrap()
    }

    #[test]
    fn views_share_the_flat_buffers_and_padding_stays_zero() {
        let mut p = params(Float::F32);
        assert_eq!(p.segments()[1].offset, 64);
        assert_eq!(p.master().size(), [1024]);
        p.set(0, &[2.0; 15]).unwrap();
        assert_eq!(Vec::<f32>::try_from(&p.leaves(0..1)[0].flatten(0, -1)).unwrap(), [2.0; 15]);
        let _ = p.gradients(1..2)[0].shallow_clone().fill_(4.0);
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
    fn a_rank_is_stored_with_zeros_behind_it() {
        let mut plan = Plan::new(1);
        let values: Vec<f32> = (1..=30).map(|v| v as f32).collect();
        let middle = parameter(&[2, 3, 5]).ranked(1);
        assert_eq!(middle.stored, [2, 8, 5]);
        plan.push(&middle, 1.0).unwrap();
        plan.push(&parameter(&[5, 6]).ranked(1), 1.0).unwrap();
        plan.place();
        let fill = |_: usize, v: &mut [f32]| v.copy_from_slice(&values);
        let mut p = Params::new(plan, Device::Cpu, Float::F32, fill).unwrap();
        let flat = to_host(p.master()).unwrap();
        assert_eq!(flat[..20], [&values[..15], &[0.0; 5]].concat());
        assert_eq!(flat[128..136], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0]);
        for (i, segment) in p.segments().to_vec().iter().enumerate() {
            assert_eq!(segment.values(&flat), values);
            let view = segment.view(p.master()).unwrap();
            assert_eq!(Vec::<f32>::try_from(view.reshape([-1])).unwrap(), values);
            p.set(i, &values.iter().map(|v| v * 2.0).collect::<Vec<_>>()).unwrap();
        }
        let twice = to_host(p.master()).unwrap();
        assert!(flat.iter().zip(twice).all(|(a, b)| 2.0 * a == b));
    }

    #[test]
    fn parameters_of_one_rate_lie_side_by_side() {
        let mut plan = Plan::new(1);
        for rate in [1.0, 0.5, 1.0, 0.0, 0.5] {
            plan.push(&parameter(&[100]), rate).unwrap();
        }
        assert_eq!(plan.place(), [(0..256, 1.0), (256..512, 0.5), (512..1024, 0.0)]);
        let offsets: Vec<usize> = plan.segments.iter().map(|s| s.offset).collect();
        assert_eq!(offsets, [0, 256, 128, 512, 384]);
    }

    #[test]
    fn parameters_of_one_shape_lie_side_by_side() {
        let mut plan = Plan::new(1);
        for shape in [[8, 10], [10, 8], [8, 10], [10, 8]] {
            plan.push(&parameter(&shape), 1.0).unwrap();
        }
        plan.place();
        let offsets: Vec<usize> = plan.segments.iter().map(|s| s.offset).collect();
        assert_eq!(offsets, [0, 256, 128, 384]);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(Plan::new(1).push(&parameter(&[usize::MAX / 2, 3]), 1.0).is_err());
        assert!(Plan::new(1).push(&parameter(&[usize::MAX - 3]), 1.0).is_err());
    }
}
