//! Learning rates as pure functions of the step, so that a resumed run needs no state for them.

use std::f64::consts::PI;

/// The shape of the schedule; names as in sd-scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheduler {
    /// The base rate throughout.
    Constant,
    /// A linear rise from 0, then the base rate.
    ConstantWithWarmup,
    /// A linear rise from 0, then half a cosine down to 0.
    Cosine,
}

impl Scheduler {
    /// Every schedule by its name in a configuration.
    pub const ALL: [(&'static str, Scheduler); 3] = [
        ("constant", Scheduler::Constant),
        ("constant_with_warmup", Scheduler::ConstantWithWarmup),
        ("cosine", Scheduler::Cosine),
    ];

    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, s)| *s == self).map_or("", |(name, _)| name)
    }
}

/// A schedule with its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Shape.
    pub scheduler: Scheduler,
    /// The rate that the multiplier applies to.
    pub base: f64,
    /// Steps of the linear rise.
    pub warmup: u64,
    /// Steps of the whole run; only cosine looks at it.
    pub total: u64,
}

impl Schedule {
    /// What the base rate is multiplied by once `done` steps are done. As in `transformers`, the first step of a warm-up has rate 0.
    pub fn multiplier(&self, done: u64) -> f64 {
        let (t, warmup, total) = (done as f64, self.warmup as f64, self.total as f64);
        if self.scheduler != Scheduler::Constant && done < self.warmup {
            return t / warmup.max(1.0);
        }
        match self.scheduler {
            Scheduler::Constant | Scheduler::ConstantWithWarmup => 1.0,
            Scheduler::Cosine => {
                // `transformers` lets the cosine rise again past the end; a run that is continued too far should not learn wildly.
                let progress = ((t - warmup) / (total - warmup).max(1.0)).min(1.0);
                0.5 * (1.0 + (PI * progress).cos())
            }
        }
    }

    /// The rate of the step that comes after `done` steps.
    pub fn learning_rate(&self, done: u64) -> f64 {
        self.base * self.multiplier(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(scheduler: Scheduler) -> Schedule {
        Schedule { scheduler, base: 2e-4, warmup: 10, total: 110 }
    }

    #[test]
    fn values_are_those_of_the_formulas() {
        assert_eq!(schedule(Scheduler::Constant).learning_rate(0), 2e-4);
        let s = schedule(Scheduler::ConstantWithWarmup);
        assert_eq!([0, 1, 5, 9, 10, 5000].map(|t| s.multiplier(t)), [0.0, 0.1, 0.5, 0.9, 1.0, 1.0]);
        let s = schedule(Scheduler::Cosine);
        // transformers.get_cosine_schedule_with_warmup(num_warmup_steps=10, num_training_steps=110)
        let want = [
            (0, 0.0),
            (4, 0.4),
            (10, 1.0),
            (35, 0.853_553_390_593_273_7),
            (60, 0.5),
            (85, 0.146_446_609_406_726_3),
        ];
        for (t, want) in want {
            assert!((s.multiplier(t) - want).abs() < 1e-15, "{t}: {} instead of {want}", s.multiplier(t));
        }
    }

    #[test]
    fn cosine_stays_at_zero_after_the_end() {
        let s = schedule(Scheduler::Cosine);
        assert_eq!([110, 111, 150, 1_000_000].map(|t| s.multiplier(t)), [0.0; 4]);
        let no_room = Schedule { warmup: 110, ..s };
        assert_eq!(no_room.multiplier(109), 109.0 / 110.0);
        assert!(no_room.multiplier(110).is_finite());
    }
}
