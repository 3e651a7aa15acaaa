//! Long work tells how far it is and can be stopped between two of its steps.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// A flag that any thread may raise to stop the work that watches it.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the work to stop at its next step.
    pub fn request(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Takes the request back, so that the flag can serve again.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Release);
    }

    /// Whether somebody asked.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Receives (done, total) in the unit of the call (weights, bytes); `false` stops the work.
pub type Report<'a> = dyn FnMut(u64, u64) -> bool + 'a;

/// What a long call reports to and is stopped by.
#[derive(Default)]
pub struct Progress<'a> {
    /// Called after each step, on the calling thread.
    pub report: Option<&'a mut Report<'a>>,
    /// Watched before each step.
    pub cancel: Option<Cancel>,
}

impl Progress<'_> {
    /// Nobody watches.
    pub fn none() -> Self {
        Progress::default()
    }

    /// Tells `done` of `total`; `Err(Cancelled)` when somebody asked to stop.
    pub fn at(&mut self, done: u64, total: u64) -> Result<()> {
        let go_on = self.report.as_mut().is_none_or(|report| report(done, total));
        if !go_on || self.cancel.as_ref().is_some_and(Cancel::is_requested) {
            return Err(Error::Cancelled);
        }
        Ok(())
    }
}
