//! Optimizers, one file each. An optimizer sees one flat parameter and one flat gradient; modules do not exist here.
//!
//! None of them waits for the device: what an algorithm derives from sums over all parameters (the d of Prodigy and D-Adaptation, the norms
//! of Adafactor) stays in tensors on the device, and what depends on the step alone is a number of the host.

pub mod adamw;
pub mod lion;
pub mod options;
pub mod sgd;

use super::params::Segment;
use crate::error::Result;
pub use options::Options;
use std::ops::Range;
use tch::Tensor;

/// Elements per pass: bounds the temporaries at 64 MiB each, without any effect on the values.
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

    /// What a resume file must hold, by name: f32, f64 or u8 of any shape. Copying into these tensors restores the state.
    fn state(&self) -> Vec<(&'static str, &Tensor)>;
}

/// How the flat buffers are divided.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The parameters, for algorithms that look at each of them or at its shape.
    pub segments: Vec<Segment>,
    /// Ranges that cover the buffers from their start to their end, each with the factor of its learning rate. Every range costs an
    /// optimizer a pass of its own, so parameters of one factor should lie side by side.
    pub groups: Vec<(Range<usize>, f64)>,
    /// The learning rate before the schedule.
    pub learning_rate: f64,
}

impl Layout {
    /// Length of the buffers.
    pub fn length(&self) -> usize {
        self.groups.last().map_or(0, |(range, _)| range.end)
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
            let segment = Segment { offset, shape: shape.to_vec() };
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

/// A piece of the flat buffers with one learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Part {
    start: usize,
    end: usize,
    factor: f64,
}

impl Part {
    /// Its view of a flat tensor.
    fn of(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.f_narrow(0, self.start as i64, (self.end - self.start) as i64)?)
    }
}

/// `to += factor * by`. tch has no `alpha=`, so the product is rounded before it is added, where torch may fuse them.
fn add_scaled(to: &mut Tensor, by: &Tensor, factor: f64) -> Result<()> {
    let _ = to.f_add_(&by.f_mul_scalar(factor)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `steps` updates of a few values under a schedule, with a group of factor `factors.1` behind one of `factors.0`; the last of each
    /// eight values is padding.
    pub(super) fn run(options: &Options, factors: (f64, f64), rate: f64, steps: u64) -> Vec<f32> {
        let layout = Layout {
            groups: vec![(0..16, factors.0), (16..32, factors.1)],
            learning_rate: rate,
            ..Layout::of(&[&[4, 2], &[8], &[2, 4], &[8]], 32)
        };
        let padded = |i: usize| i % 8 == 7;
        let start: Vec<f32> =
            (0..32).map(|i| if padded(i) { 0.0 } else { (i as f32 * 0.7).cos() + 1.5 }).collect();
        let mut master = Tensor::from_slice(&start);
        let mut optimizer = options.build(&layout, &master).unwrap();
        for t in 1..=steps {
            let wave = |i: usize| if padded(i) { 0.0 } else { (i as f32 * 1.1 + t as f32).sin() + 0.9 };
            let gradient: Vec<f32> = (0..32).map(wave).collect();
            optimizer.step(&mut master, &mut Tensor::from_slice(&gradient), rate, t).unwrap();
        }
        Vec::<f32>::try_from(&master).unwrap()
    }

    fn all() -> impl Iterator<Item = Options> {
        Options::NAMES.iter().map(|name| Options::of(name).unwrap())
    }

    #[test]
    fn padding_of_zeros_stays_zero() {
        for options in all() {
            let values = run(&options, (1.0, 3.0), 0.05, 12);
            for (i, value) in values.iter().enumerate() {
                assert_eq!(*value == 0.0, i % 8 == 7, "{}, {i}: {value}", options.name());
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
