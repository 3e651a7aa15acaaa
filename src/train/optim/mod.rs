//! Optimizers, one file each. An optimizer sees one flat parameter and one flat gradient; modules do not exist here.
//!
//! None of them waits for the device: what an algorithm derives from sums over all parameters (the d of Prodigy and D-Adaptation, the norms
//! of Adafactor) stays in tensors on the device. (The sums of the schedule-free ones lie on the device for the kernels; without those, on a
//! GPU, they are waited for.)
//!
//! The formula of an optimizer stands in its file. Those with an [`Optimizer::rule`] of their own have the same once more in
//! `kernels/optimizer.cu`; Adafactor and CAME take from the device also the numbers of a step ([`Now`]).

pub mod adafactor;
pub mod adamw;
pub mod adamw8bit;
pub mod adamw_schedule_free;
pub mod came;
pub mod dadapt_adam;
pub mod dadapt_lion;
mod factored;
pub mod lion;
pub mod options;
pub mod prodigy;
pub mod radam_schedule_free;
mod schedule_free;
pub mod sgd;

use super::params::Segment;
use crate::algo::training::long;
use crate::error::Result;
pub use options::Options;
use std::ops::Range;
use tch::{Kind, Tensor};

/// Elements per pass: bounds the temporaries at 64 MiB each. Nothing but the order of a sum over all parameters depends on it.
const BLOCK: usize = 1 << 24;

/// The rule by which gradients become a change of the parameters.
///
/// Zeros that have a gradient of zero stay zero, as the padding of the flat buffers must.
pub trait Optimizer: Send {
    /// One update of `master` in place; `step` counts from 1. `gradient` may be used as scratch and holds nothing useful afterwards.
    fn step(
        &mut self,
        master: &mut Tensor,
        gradient: &mut Tensor,
        learning_rate: f64,
        step: u64,
    ) -> Result<()>;

    /// How it is done on a GPU without a wait, with `kernels/optimizer.cu`; `None` where it cannot be.
    fn rule(&self) -> Option<Rule<'_>> {
        None
    }

    /// [`Way::Passes`]: one update with the numbers of a moment on the device. The gradient is as it was accumulated, and stays.
    fn pass(&mut self, _master: &Tensor, _gradient: &Tensor, _now: &Now) -> Result<()> {
        Ok(())
    }

    /// The values that an adapter file gets, where they are not those of `master`. Asked only after a first step.
    fn averaged(&self, _master: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// The parameters were set from outside in the middle of a run: whatever ties them to a point where they have been is undone.
    fn restart(&mut self, _master: &Tensor) -> Result<()> {
        Ok(())
    }

    /// What a resume file must hold, by name: f32, f64 or u8 of any shape. Copying into these tensors restores the state.
    fn state(&self) -> Vec<(&'static str, &Tensor)>;
}

/// An optimizer as `kernels/optimizer.cu` takes it.
pub struct Rule<'a> {
    /// What its kernels are called there.
    pub kernel: &'static str,
    /// Its numbers, in the order of its `Numbers` there.
    pub numbers: Vec<f64>,
    /// Its tensors, in the order in which the kernel indexes them.
    pub state: Vec<&'a Tensor>,
    /// Single numbers in f64 that a step hands on to the next.
    pub carried: Vec<&'a Tensor>,
    /// The ranges of one learning rate, ascending.
    pub ranges: Vec<Part>,
    /// Its launches.
    pub way: Way,
    /// For a state in 8 bits that is laid out otherwise than the parameters: for each range where in it that begins, and whether it keeps 32.
    pub blocks: Option<Vec<(usize, bool)>>,
}

/// What stands between the decision that an update is made and the copies of its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One launch that makes them too.
    Once,
    /// Sums over all parameters, from which the size of the step is found: the d of its formula.
    Measured,
    /// libtorch's operations, in [`Optimizer::pass`].
    Passes,
}

/// The numbers of an update where only the device knows them, each in f64.
#[derive(Debug)]
pub struct Now {
    /// The learning rate.
    pub rate: Tensor,
    /// Which update it is, counted from 1.
    pub step: Tensor,
    /// 1; 0 where nothing shall change, whatever the gradient holds.
    pub moves: Tensor,
    /// What the gradient is to be multiplied by; `None`: that is done.
    pub scale: Option<Tensor>,
}

impl Now {
    /// Of numbers that the host knows.
    fn of(learning_rate: f64, step: u64, beside: &Tensor) -> Result<Now> {
        let number = |value| scalar(value, beside);
        Ok(Now { rate: number(learning_rate)?, step: number(step as f64)?, moves: number(1.0)?, scale: None })
    }

    /// The gradient, and anything that was computed with it; zero where nothing shall change.
    fn finite(&self, value: Tensor) -> Result<Tensor> {
        match self.scale {
            Some(_) => Ok(value.f_where_self(
                &self.moves.f_gt(0.0)?,
                &value.f_new_zeros([0i64; 0], (value.f_kind()?, value.device()))?,
            )?),
            None => Ok(value),
        }
    }

    /// A gradient as it is to be taken.
    fn gradient(&self, given: Tensor) -> Result<Tensor> {
        match &self.scale {
            Some(scale) => self.finite(given.f_mul(scale)?),
            None => Ok(given),
        }
    }

    /// A share of something new; none of it where nothing shall change.
    fn share(&self, share: f64) -> Result<Tensor> {
        Ok(self.moves.f_mul_scalar(share)?)
    }
}

/// `mean = (1 - share) * mean + share * value`, the share on the device.
fn mix(mean: &mut Tensor, value: &Tensor, share: &Tensor) -> Result<()> {
    let _ = mean.f_mul_(&share.f_neg()?.f_add_scalar_(1.0)?)?.f_add_(&value.f_mul(share)?)?;
    Ok(())
}

/// How the flat buffers are divided.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The parameters in the order in which they lie, for algorithms that look at each of them or at its shape.
    segments: Vec<Segment>,
    /// Ranges that cover the buffers from their start to their end, each with the factor of its learning rate. Every range costs an
    /// optimizer a pass of its own, so parameters of one factor should lie side by side.
    groups: Vec<(Range<usize>, f64)>,
    /// The learning rate before the schedule.
    pub learning_rate: f64,
}

impl Layout {
    /// Of these parameters, in any order.
    pub fn new(segments: &[Segment], groups: Vec<(Range<usize>, f64)>, learning_rate: f64) -> Self {
        let mut segments = segments.to_vec();
        segments.sort_by_key(|segment| segment.offset);
        Layout { segments, groups, learning_rate }
    }

    /// The factor of a parameter's learning rate.
    fn factor(&self, segment: &Segment) -> f64 {
        self.groups
            .iter()
            .find(|(range, _)| range.contains(&segment.offset))
            .map_or(1.0, |(_, factor)| *factor)
    }

    /// The parameters, those of one shape and rate that lie side by side as one.
    fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for segment in &self.segments {
            let factor = self.factor(segment);
            if let Some(last) = runs.last_mut() {
                let alike = last.first.shape == segment.shape && last.first.stored == segment.stored;
                let distance = segment.offset - last.first.offset;
                if last.count == 1 {
                    last.distance = distance;
                }
                let next =
                    distance == last.distance * last.count && (last.count + 1) * last.distance <= BLOCK;
                if alike && next && last.factor == factor {
                    last.count += 1;
                    continue;
                }
            }
            runs.push(Run { first: segment.clone(), count: 1, distance: segment.count(), factor });
        }
        runs
    }

    /// The groups in pieces of at most [`BLOCK`] elements.
    fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        for (range, factor) in &self.groups {
            for start in range.clone().step_by(BLOCK) {
                parts.push(Part { start, end: range.end.min(start + BLOCK), factor: *factor });
            }
        }
        parts
    }

    /// One group of parameters that lie behind each other, as tests need it.
    #[cfg(test)]
    fn of(shapes: &[&[usize]], length: usize) -> Layout {
        let mut offset = 0;
        let mut place = |shape: &&[usize]| {
            let segment = Segment { offset, shape: shape.to_vec(), stored: shape.to_vec() };
            offset += segment.count();
            segment
        };
        Layout {
            segments: shapes.iter().map(&mut place).collect(),
            groups: vec![(0..length, 1.0)],
            learning_rate: 1e-2,
        }
    }
}

/// Parameters of one shape at equal distances.
#[derive(Clone, Debug)]
struct Run {
    first: Segment,
    count: usize,
    distance: usize,
    /// Of the learning rate.
    factor: f64,
}

impl Run {
    /// The shape of their values, behind an axis of the parameters.
    fn shape(&self) -> Vec<i64> {
        [&[self.count as i64], &long(&self.first.shape)[..]].concat()
    }

    /// Whether each is a matrix, or several.
    fn matrix(&self) -> bool {
        self.first.shape.len() >= 2
    }

    /// Their values in a flat tensor, a view.
    fn view(&self, flat: &Tensor) -> Result<Tensor> {
        let stored = &self.first.stored;
        let mut strides: Vec<i64> =
            (1..=stored.len()).map(|axis| stored[axis..].iter().product::<usize>() as i64).collect();
        strides.insert(0, self.distance as i64);
        let length = (self.count - 1) * self.distance + self.first.count();
        let own = flat.f_narrow(0, self.first.offset as i64, length as i64)?;
        Ok(own.f_as_strided(self.shape(), strides, None)?)
    }
}

/// A piece of the flat buffers with one learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// First element.
    pub start: usize,
    /// Behind the last.
    pub end: usize,
    /// Of the learning rate.
    pub factor: f64,
}

impl Part {
    /// Its view of a flat tensor.
    fn of(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.f_narrow(0, self.start as i64, (self.end - self.start) as i64)?)
    }
}

/// The rule of an optimizer whose own pass moves the parameters.
fn given(parts: &[Part]) -> Rule<'static> {
    Rule {
        kernel: "given",
        numbers: Vec::new(),
        state: Vec::new(),
        carried: Vec::new(),
        ranges: parts.to_vec(),
        way: Way::Passes,
        blocks: None,
    }
}

/// `to += factor * by`. tch has no `alpha=`, so the product is rounded before it is added, where torch may fuse them.
fn add_scaled(to: &mut Tensor, by: &Tensor, factor: f64) -> Result<()> {
    let _ = to.f_add_(&by.f_mul_scalar(factor)?)?;
    Ok(())
}

/// A number in f64 beside the parameters, which no step has to wait for.
fn scalar(value: f64, beside: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_full([0i64; 0], value, (Kind::Double, beside.device()))?)
}

/// The sum of all elements, in f64.
fn sum(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_sum(Kind::Double)?)
}

/// `yes` where the condition holds, else `no`, decided on the device.
fn choose(condition: &Tensor, yes: &Tensor, no: &Tensor) -> Result<Tensor> {
    Ok(yes.f_where_self(condition, no)?)
}

/// D-Adaptation's r = q * r + (1 - q) * c * n, and r / ((1 - q) * |s|_1), which bounds the distance to the solution from below. `inner` is
/// <g, s> as the algorithm takes it, `rate` c, `length` |s|_1.
fn lower_bound(
    r: &Tensor,
    q: f64,
    rate: &Tensor,
    inner: &Tensor,
    length: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let r = r.f_mul_scalar(q)?.f_add(&inner.f_mul(rate)?.f_mul_scalar(1.0 - q)?)?;
    let bound = r.f_div(&length.f_mul_scalar(1.0 - q)?)?;
    Ok((r, bound))
}

/// Adam's sqrt(1 - b2^t) / (1 - b1^t) with t = `updates` + 1.
fn bias_correction(updates: &Tensor, (b1, b2): (f64, f64)) -> Result<Tensor> {
    let t = updates.f_add_scalar(1.0)?;
    let rest = |b: f64| -> Result<Tensor> { Ok(Tensor::f_pow_scalar(b, &t)?.f_neg()?.f_add_scalar_(1.0)?) };
    Ok(rest(b2)?.f_sqrt_()?.f_div(&rest(b1)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: usize = 32;

    fn padded(i: usize) -> bool {
        i % 8 == 7
    }

    /// Twelve updates of a few values; those of the second half start `unit` times as high, have gradients that are divided by `unit`,
    /// and a learning rate of `factor`. The last of each eight values is padding.
    fn run(options: &Options, unit: f32, factor: f64) -> Vec<f32> {
        let layout = Layout {
            groups: vec![(0..N / 2, 1.0), (N / 2..N, factor)],
            ..Layout::of(&[&[4, 2], &[8], &[2, 4], &[8]], N)
        };
        let unit = |i: usize| if i < N / 2 { 1.0 } else { unit };
        let values = |value: &dyn Fn(usize) -> f32| {
            Tensor::from_slice(&(0..N).map(|i| if padded(i) { 0.0 } else { value(i) }).collect::<Vec<_>>())
        };
        let mut master = values(&|i| ((i as f32 * 0.7).cos() + 1.5) * unit(i));
        let mut optimizer = options.build(&layout, &master).unwrap();
        for t in 1..=12 {
            let mut gradient = values(&|i| ((i as f32 * 1.1 + t as f32).sin() + 0.9) / unit(i));
            optimizer.step(&mut master, &mut gradient, 0.05, t).unwrap();
        }
        Vec::<f32>::try_from(&master).unwrap()
    }

    fn all() -> impl Iterator<Item = Options> {
        Options::NAMES.iter().map(|name| Options::of(name).unwrap())
    }

    #[test]
    fn padding_of_zeros_stays_zero() {
        for options in all() {
            for (i, value) in run(&options, 1.0, 3.0).iter().enumerate() {
                assert_eq!(*value == 0.0, padded(i), "{}, {i}: {value}", options.name());
            }
        }
    }

    #[test]
    fn a_factor_changes_the_rate_of_its_range_alone() {
        for options in all() {
            let (once, thrice) = (run(&options, 1.0, 1.0), run(&options, 1.0, 3.0));
            let none = run(&options, 1.0, 0.0);
            let name = options.name();
            assert_ne!(once[N / 2..], thrice[N / 2..], "{name}");
            let start: Vec<f32> =
                (N / 2..N).map(|i| if padded(i) { 0.0 } else { (i as f32 * 0.7).cos() + 1.5 }).collect();
            assert_eq!(none[N / 2..], start, "{name}: a factor of 0 is no training");
            // One d for all is found from all.
            if !name.starts_with("DAdapt") && name != "Prodigy" {
                assert_eq!(once[..N / 2], thrice[..N / 2], "{name}");
            }
        }
    }

    /// In units of its factor a group is like any other: p = 4 w with a rate of 4 goes the way of w with a rate of 1.
    #[test]
    fn a_shared_d_counts_a_group_in_units_of_its_factor() {
        let decaying = |name: &str, decay: f64| {
            let options = Options::of(name).unwrap();
            let mut arguments = options.arguments();
            arguments.insert("weight_decay".into(), decay.into());
            arguments.insert("d0".into(), 0.01.into());
            options.with(arguments).unwrap()
        };
        for name in ["Prodigy", "DAdaptAdam", "DAdaptLion"] {
            let options = decaying(name, 0.0);
            let (plain, scaled) = (run(&options, 1.0, 1.0), run(&options, 4.0, 4.0));
            let other = run(&options, 4.0, 1.0);
            assert!(
                plain.iter().zip(&other).any(|(a, b)| (a / b - 1.0).abs() > 0.5),
                "{name}: the test is blind"
            );
            for (i, (plain, scaled)) in plain.iter().zip(scaled).enumerate() {
                let scaled = if i < N / 2 { scaled } else { scaled / 4.0 };
                // eps is not scaled with the gradients.
                assert!((plain - scaled).abs() <= 1e-5 * plain.abs(), "{name}, {i}: {plain} beside {scaled}");
            }
            assert_ne!(run(&decaying(name, 0.5), 1.0, 1.0), plain, "{name}");
        }
    }

    #[test]
    fn runs_are_the_parameters() {
        let segment = |offset, shape: &[usize], stored: &[usize]| Segment {
            offset,
            shape: shape.to_vec(),
            stored: stored.to_vec(),
        };
        let segments = vec![
            segment(64, &[2, 3], &[2, 8]),
            segment(0, &[2, 3], &[2, 8]),
            segment(32, &[2, 3], &[2, 8]),
            segment(80, &[2, 3], &[2, 8]),
            segment(96, &[6], &[8]),
            segment(104, &[6], &[8]),
        ];
        let layout = Layout::new(&segments, vec![(0..104, 1.0), (104..112, 0.5)], 1.0);
        let runs = layout.runs();
        let counts: Vec<(usize, usize, f64)> =
            runs.iter().map(|run| (run.first.offset, run.count, run.factor)).collect();
        assert_eq!(counts, [(0, 3, 1.0), (80, 1, 1.0), (96, 1, 1.0), (104, 1, 0.5)]);
        let flat = Tensor::arange(128, (Kind::Float, tch::Device::Cpu)).narrow(0, 8, 112);
        for run in &runs {
            let view = run.view(&flat).unwrap();
            for (i, one) in (0..run.count).map(|i| view.get(i as i64)).enumerate() {
                let offset = run.first.offset + i * run.distance;
                let alone = Segment { offset, ..run.first.clone() }.view(&flat).unwrap();
                assert_eq!(one, alone);
            }
        }
    }

    #[test]
    fn parts_cover_every_group_once() {
        let mut layout = Layout::of(&[], 0);
        layout.groups = vec![(0..7, 1.0), (7..BLOCK * 2 + 9, 0.5)];
        let part = |start, end, factor| Part { start, end, factor };
        let want = [
            part(0, 7, 1.0),
            part(7, BLOCK + 7, 0.5),
            part(BLOCK + 7, 2 * BLOCK + 7, 0.5),
            part(2 * BLOCK + 7, 2 * BLOCK + 9, 0.5),
        ];
        assert_eq!(layout.parts(), want);
    }
}
