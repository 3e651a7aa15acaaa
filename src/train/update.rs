//! An update: when it is due, how it is made, and what it tells.

use super::config::Config;
use super::fused::Fused;
use super::network::{not_built, train, Built, Network};
use super::schedule::Schedule;
use crate::error::{Error, Result};
use tch::Tensor;

/// What [`Network::step`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Step {
    /// Updates done so far, this one included.
    pub step: u64,
    /// Learning rate of this update; in the middle of an accumulation that of the coming one.
    pub learning_rate: f64,
    /// Norm of the averaged gradient before clipping; 0 in the middle of an accumulation.
    pub grad_norm: f64,
    /// Whether the parameters changed; false in the middle of an accumulation.
    pub updated: bool,
    /// Updates that [`Network::step_ahead`] left out, as the gradient was not finite, since this was last told.
    pub skipped: u64,
}

impl Network {
    /// Ends a micro-batch. Every `gradient_accumulation_steps` calls it averages and clips the gradient, updates the parameters and
    /// zeroes the gradient; only then it waits for the device, to learn the norm.
    ///
    /// A gradient that is not finite is an error and changes nothing: `zero_gradients` skips it, stopping keeps the last good values.
    pub fn step(&mut self) -> Result<Step> {
        if !self.completes()? {
            let step = self.settled_steps()?;
            let learning_rate = self.config.schedule().learning_rate(step);
            return Ok(Step { step, learning_rate, ..Step::default() });
        }
        self.update(false)?;
        let step = self.told()?;
        self.steps = step.step;
        if !step.grad_norm.is_finite() {
            return Err(train(
                format!("the gradient of step {} is not finite (norm {}); nothing was changed", step.step + 1, step.grad_norm),
                "call zero_gradients to skip it; if it stays: lower the learning rate, prefer bf16 to fp16, look for NaN in the data",
            ));
        }
        (self.micro, self.dirty) = (0, false);
        Ok(step)
    }

    /// As [`Network::step`], without telling anything: a gradient that is not finite is cleared, changes nothing else and is counted.
    /// Where the update is fused this does not wait for the device, and can be captured into a CUDA graph.
    pub fn step_ahead(&mut self) -> Result<()> {
        if !self.completes()? {
            return Ok(());
        }
        self.update(true)?;
        (self.micro, self.dirty) = (0, false);
        Ok(())
    }

    /// What the last update did, and how many were left out since this was last told. Waits for the device.
    pub fn results(&mut self) -> Result<Step> {
        self.settled_steps()?;
        let step = self.told()?;
        self.steps = step.step;
        Ok(step)
    }

    /// [`Network::results`], in the order of the current stream.
    fn told(&mut self) -> Result<Step> {
        match self.built_mut()?.fused.is_some() {
            true => {
                let (fused, schedule) = self.fused()?;
                fused.results(schedule)
            }
            false => Ok(Step { step: self.steps, skipped: std::mem::take(&mut self.skipped), ..self.last }),
        }
    }

    /// One update, if the gradient is finite. If not, it is cleared and counted when `forgiving`, else kept.
    fn update(&mut self, forgiving: bool) -> Result<()> {
        let built = self.built.as_mut().ok_or_else(not_built)?;
        if built.step(forgiving, &self.config.schedule)? {
            return match self.config.scale_weight_norms {
                Some(_) => {
                    let updated = self.fused()?.0.updated()?;
                    self.follow(Some(&updated))
                }
                None => Ok(()),
            };
        }
        self.last = built.update(&self.config, self.steps)?;
        self.steps = self.last.step;
        if self.last.updated {
            return self.follow(None);
        }
        if forgiving {
            self.skipped += 1;
            built.params.zero_gradient()?;
        }
        Ok(())
    }

    /// What comes after an update: bounded norms, then the average. `updated` is 0 or 1 where only the device knows whether there was one.
    fn follow(&mut self, updated: Option<&Tensor>) -> Result<()> {
        if let Some(most) = self.config.scale_weight_norms {
            self.bound_norms(most, updated)?;
        }
        let decay = self.config.ema_decay.unwrap_or(0.0);
        let Built { params, ema, .. } = self.built_mut()?;
        tch::no_grad(|| {
            let _ = match (ema, updated) {
                (None, _) => return Ok(()),
                (Some(ema), None) => ema.f_lerp_(params.master(), 1.0 - decay)?,
                (Some(ema), Some(updated)) => {
                    ema.f_lerp_tensor_(params.master(), &updated.f_mul_scalar(1.0 - decay)?)?
                }
            };
            Ok(())
        })
    }

    /// While held, steps on a GPU change nothing but the gradient, which they clear: for running once what a CUDA graph shall capture.
    pub fn hold(&mut self, held: bool) -> Result<()> {
        self.fused()?.0.hold(held)?;
        self.held = held;
        Ok(())
    }

    /// A CUDA graph with so many updates is about to be launched on the current stream: makes their learning rates ready.
    pub fn prepare_replay(&mut self, updates: u64) -> Result<()> {
        let (fused, schedule) = self.fused()?;
        fused.expect(updates, schedule)
    }

    /// Counts a micro-batch; whether it is the last one of an update. `step` counts that one itself, once it is done.
    fn completes(&mut self) -> Result<bool> {
        if let Some(draws) = self.built()?.draws.as_ref().filter(|_| !self.held) {
            let _ = tch::no_grad(|| draws.shallow_clone().f_add_scalar_(1))?;
        }
        let last = self.micro + 1 >= self.config.gradient_accumulation_steps;
        self.micro += u64::from(!last);
        Ok(last)
    }

    /// Updates done, also by steps that nobody has waited for; waits for those, on any stream.
    pub(super) fn settled_steps(&self) -> Result<u64> {
        let fused = self.built.as_ref().and_then(|built| built.fused.as_ref());
        Ok(fused.map(Fused::settled_steps).transpose()?.flatten().unwrap_or(self.steps))
    }

    fn fused(&mut self) -> Result<(&mut Fused, &Schedule)> {
        let (name, schedule) = (self.config.optimizer.name(), &self.config.schedule);
        let built = self.built.as_mut().ok_or_else(not_built)?;
        let place = if built.device.is_cuda() { "this device" } else { "the CPU" };
        let fused = built.fused.as_mut().ok_or_else(|| Error::Unsupported {
            what: format!("{name} on {place} cannot be captured into a CUDA graph"),
            hint: "on a GPU that this library has kernels for, all optimizers can but Prodigy with a first beta of 0"
                .into(),
        })?;
        Ok((fused, schedule))
    }
}

impl Built {
    /// Enqueues an update where that is done without a wait, see [`Fused::step`]; whether it is.
    pub(super) fn step(&mut self, forgiving: bool, schedule: &Schedule) -> Result<bool> {
        let Built { params, optimizer, fused, .. } = self;
        let Some(fused) = fused else { return Ok(false) };
        fused.step(forgiving, schedule, |now| optimizer.pass(params.master(), params.gradient(), now))?;
        Ok(true)
    }

    /// The update after `steps` others, on any device; not if the gradient is not finite. Waits for its norm.
    pub(super) fn update(&mut self, config: &Config, steps: u64) -> Result<Step> {
        let (average, max_norm) = (1.0 / config.gradient_accumulation_steps as f64, config.max_grad_norm);
        let learning_rate = config.schedule().learning_rate(steps);
        let grad_norm = self.params.gradient_norm()? * average;
        let step = Step { step: steps, learning_rate, grad_norm, ..Step::default() };
        if !grad_norm.is_finite() {
            return Ok(step);
        }
        // torch.nn.utils.clip_grad_norm_ has the same 1e-6.
        let clip = if max_norm > 0.0 { (max_norm / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        tch::no_grad(|| {
            let (master, gradient) = self.params.update();
            if average * clip != 1.0 {
                let _ = gradient.f_mul_scalar_(average * clip)?;
            }
            self.optimizer.step(master, gradient, learning_rate, steps + 1)?;
            self.params.zero_gradient()?;
            self.params.refresh()
        })?;
        Ok(Step { step: steps + 1, updated: true, ..step })
    }
}
