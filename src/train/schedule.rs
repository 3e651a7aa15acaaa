//! Learning rates as pure functions of the step, so that a resumed run needs no state for them.
//!
//! With t steps done, W of warm-up, T in all, p = (t - W) / (T - W), c cycles; what the base rate is multiplied by:
//!
//! ```text
//! all but constant, piecewise_constant, adafactor, for t < W:   t / W
//! linear                  max(0, (T - t) / (T - W))
//! cosine                  (1 + cos(pi p)) / 2
//! cosine_with_restarts    (1 + cos(pi (c p mod 1))) / 2,   0 for p >= 1
//! polynomial              e + (1 - e) (1 - p)^power,   e = lr_end / base
//! inverse_sqrt            sqrt(s / (t - W + s)),   s = timescale, or W, or 10000
//! cosine_with_min_lr      r + (1 - r) (1 + cos(c pi p)) / 2
//! warmup_stable_decay     r + (1 - r) t / W for t < W;   1 up to T - D;   r + (1 - r) (1 + cos(c pi q)) / 2, q = (t - (T - D)) / D;   r
//! piecewise_constant      the value of the first rule with t < its step, or the last value
//! adafactor               min(0.01, or 1e-6 (t + 1) with warmup_init, 1 / sqrt(t + 1)), of a base of 1
//! ```
//!
//! As `transformers.get_scheduler` and, for piecewise_constant, `diffusers` compute them with the arguments that sd-scripts gives. Past
//! the end each stays where it ended; `transformers` lets the cosines rise again there.

use std::f64::consts::PI;

/// The shape of the schedule; names as in sd-scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheduler {
    /// The base rate throughout.
    Constant,
    /// A linear rise from 0, then the base rate.
    ConstantWithWarmup,
    /// After the rise straight down to 0.
    Linear,
    /// After the rise half a cosine down to 0.
    Cosine,
    /// After the rise several halves of a cosine, each from the base rate down to 0.
    CosineWithRestarts,
    /// After the rise down to lr_end as a power of the time that is left.
    Polynomial,
    /// After the rise down with the root of the time, without an end.
    InverseSqrt,
    /// After the rise half a cosine down to a share of the base rate.
    CosineWithMinLr,
    /// A rise, the base rate, then half a cosine down.
    WarmupStableDecay,
    /// Given multiples of the base rate for given steps.
    PiecewiseConstant,
    /// The relative step of Adafactor.
    Adafactor,
}

impl Scheduler {
    /// Every schedule by its name in a configuration.
    pub const ALL: [(&'static str, Scheduler); 11] = [
        ("constant", Scheduler::Constant),
        ("constant_with_warmup", Scheduler::ConstantWithWarmup),
        ("linear", Scheduler::Linear),
        ("cosine", Scheduler::Cosine),
        ("cosine_with_restarts", Scheduler::CosineWithRestarts),
        ("polynomial", Scheduler::Polynomial),
        ("inverse_sqrt", Scheduler::InverseSqrt),
        ("cosine_with_min_lr", Scheduler::CosineWithMinLr),
        ("warmup_stable_decay", Scheduler::WarmupStableDecay),
        ("piecewise_constant", Scheduler::PiecewiseConstant),
        ("adafactor", Scheduler::Adafactor),
    ];

    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, s)| *s == self).map_or("", |(name, _)| name)
    }

    /// Whether it begins with lr_warmup_steps.
    pub fn warms_up(self) -> bool {
        !matches!(self, Scheduler::Constant | Scheduler::PiecewiseConstant | Scheduler::Adafactor)
    }

    /// Whether the rate ever becomes smaller.
    pub fn falls(self) -> bool {
        !matches!(self, Scheduler::Constant | Scheduler::ConstantWithWarmup)
    }

    /// Whether it must know max_train_steps.
    pub fn ends(self) -> bool {
        use Scheduler::*;
        matches!(
            self,
            Linear | Cosine | CosineWithRestarts | Polynomial | CosineWithMinLr | WarmupStableDecay
        )
    }

    /// Whether it looks at lr_scheduler_num_cycles.
    pub fn cycles(self) -> bool {
        use Scheduler::*;
        matches!(self, CosineWithRestarts | CosineWithMinLr | WarmupStableDecay)
    }

    /// Whether it looks at lr_scheduler_min_lr_ratio.
    pub fn has_least(self) -> bool {
        matches!(self, Scheduler::CosineWithMinLr | Scheduler::WarmupStableDecay)
    }
}

/// A schedule with its numbers. Those that the shape does not look at have their defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Shape.
    pub scheduler: Scheduler,
    /// The rate that the multiplier applies to.
    pub base: f64,
    /// Steps of the linear rise.
    pub warmup: u64,
    /// Steps of the whole run.
    pub total: Option<u64>,
    /// lr_scheduler_num_cycles.
    pub cycles: u64,
    /// lr_scheduler_power, of the polynomial.
    pub power: f64,
    /// The rate at which the polynomial ends.
    pub end: f64,
    /// lr_scheduler_min_lr_ratio.
    pub least: f64,
    /// lr_scheduler_timescale, of the inverse root.
    pub timescale: Option<u64>,
    /// lr_decay_steps, of warmup_stable_decay.
    pub decay: u64,
    /// Up to which step which multiple, ascending, of piecewise_constant.
    pub rules: Vec<(u64, f64)>,
    /// The multiple after the last rule.
    pub last: f64,
    /// Whether Adafactor's relative step rises from 1e-6.
    pub warmup_init: bool,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule {
            scheduler: Scheduler::Constant,
            base: 1e-4,
            warmup: 0,
            total: None,
            cycles: 1,
            power: 1.0,
            end: 1e-7,
            least: 0.0,
            timescale: None,
            decay: 0,
            rules: Vec::new(),
            last: 1.0,
            warmup_init: false,
        }
    }
}

impl Schedule {
    /// What the base rate is multiplied by once `done` steps are done. As in `transformers`, the first step of a warm-up has rate 0.
    pub fn multiplier(&self, done: u64) -> f64 {
        let (t, warmup) = (done as f64, self.warmup as f64);
        let total = self.total.unwrap_or(u64::MAX) as f64;
        let above = |least: f64, share: f64| share * (1.0 - least) + least;
        if self.scheduler.warms_up() && done < self.warmup {
            let rise = t / warmup;
            return if self.scheduler == Scheduler::WarmupStableDecay {
                above(self.least, rise)
            } else {
                rise
            };
        }
        let progress = ((t - warmup) / (total - warmup).max(1.0)).min(1.0);
        let half_cosine = |turns: f64| 0.5 * (1.0 + (PI * turns).cos());
        let cycles = self.cycles as f64;
        match self.scheduler {
            Scheduler::Constant | Scheduler::ConstantWithWarmup => 1.0,
            Scheduler::Linear => ((total - t) / (total - warmup).max(1.0)).max(0.0),
            Scheduler::Cosine => half_cosine(progress),
            Scheduler::CosineWithRestarts if progress >= 1.0 => 0.0,
            Scheduler::CosineWithRestarts => half_cosine((cycles * progress) % 1.0),
            Scheduler::Polynomial => {
                ((self.base - self.end) * (1.0 - progress).powf(self.power) + self.end) / self.base
            }
            Scheduler::InverseSqrt => {
                let unset = if self.warmup > 0 { self.warmup } else { 10_000 };
                let scale = self.timescale.unwrap_or(unset) as f64;
                1.0 / ((t + (scale - warmup)) / scale).sqrt()
            }
            Scheduler::CosineWithMinLr => above(self.least, half_cosine(cycles * progress)),
            Scheduler::WarmupStableDecay => {
                let (decay, stable) = (self.decay as f64, total - self.decay as f64);
                match t {
                    t if t < stable => 1.0,
                    t if t < total => above(self.least, half_cosine(cycles * (t - stable) / decay)),
                    _ => self.least,
                }
            }
            Scheduler::PiecewiseConstant => {
                self.rules.iter().find(|(step, _)| done < *step).map_or(self.last, |(_, value)| *value)
            }
            Scheduler::Adafactor => {
                let most = if self.warmup_init { 1e-6 * (t + 1.0) } else { 1e-2 };
                most.min(1.0 / (t + 1.0).sqrt())
            }
        }
    }

    /// The rate of the step that comes after `done` steps.
    pub fn learning_rate(&self, done: u64) -> f64 {
        self.base * self.multiplier(done)
    }

    /// The rules as diffusers writes them: `1:10,0.1:20,0.01`.
    pub fn step_rules(&self) -> String {
        let rules = self.rules.iter().map(|(step, value)| format!("{value}:{step},")).collect::<String>();
        format!("{rules}{}", self.last)
    }

    /// Reads [`Schedule::step_rules`]; `None` when it is not of that form or the steps do not ascend.
    pub fn parse_rules(text: &str) -> Option<(Vec<(u64, f64)>, f64)> {
        let value = |text: &str| text.trim().parse::<f64>().ok().filter(|v| v.is_finite() && *v >= 0.0);
        let (rules, last) = text.rsplit_once(',').map_or((None, text), |(rules, last)| (Some(rules), last));
        let rule = |text: &str| {
            let (multiple, step) = text.split_once(':')?;
            Some((step.trim().parse().ok()?, value(multiple)?))
        };
        let rules = rules.map_or(Some(Vec::new()), |rules| rules.split(',').map(rule).collect())?;
        rules.is_sorted_by(|a, b| a.0 < b.0).then_some((rules, value(last)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(scheduler: Scheduler) -> Schedule {
        Schedule { scheduler, base: 2e-4, warmup: 10, total: Some(110), ..Schedule::default() }
    }

    fn assert_values(s: &Schedule, want: &[(u64, f64)]) {
        for &(t, want) in want {
            let got = s.multiplier(t);
            assert!((got - want).abs() < 1e-15, "{:?}, {t}: {got} instead of {want}", s.scheduler);
        }
    }

    #[test]
    fn values_are_those_of_the_formulas() {
        assert_eq!(schedule(Scheduler::Constant).learning_rate(0), 2e-4);
        let s = schedule(Scheduler::ConstantWithWarmup);
        assert_eq!([0, 1, 5, 9, 10, 5000].map(|t| s.multiplier(t)), [0.0, 0.1, 0.5, 0.9, 1.0, 1.0]);
        let quarter = 0.853_553_390_593_273_7;
        assert_values(
            &schedule(Scheduler::Cosine),
            &[(0, 0.0), (4, 0.4), (10, 1.0), (35, quarter), (60, 0.5), (85, 1.0 - quarter), (110, 0.0)],
        );
        assert_values(&schedule(Scheduler::Linear), &[(5, 0.5), (10, 1.0), (35, 0.75), (109, 0.01)]);
        let s = Schedule { cycles: 4, ..schedule(Scheduler::CosineWithRestarts) };
        assert_values(&s, &[(10, 1.0), (35, 1.0), (60, 1.0), (47, 0.5 * (1.0 + (PI * 0.48).cos()))]);
        let s = Schedule { power: 2.0, end: 2e-5, ..schedule(Scheduler::Polynomial) };
        assert_values(&s, &[(5, 0.5), (10, 1.0), (60, 0.9 * 0.25 + 0.1), (110, 0.1), (999, 0.1)]);
        assert_values(&schedule(Scheduler::InverseSqrt), &[(10, 1.0), (40, 0.5), (1000, 0.1)]);
        let s = Schedule { timescale: Some(100), ..schedule(Scheduler::InverseSqrt) };
        assert_values(&s, &[(10, 1.0), (310, 0.5)]);
        let s = Schedule { least: 0.2, ..schedule(Scheduler::CosineWithMinLr) };
        assert_values(&s, &[(5, 0.5), (10, 1.0), (60, 0.6), (110, 0.2), (160, 0.2)]);
        let s = Schedule { least: 0.2, decay: 40, ..schedule(Scheduler::WarmupStableDecay) };
        assert_values(&s, &[(0, 0.2), (5, 0.6), (10, 1.0), (69, 1.0), (70, 1.0), (90, 0.6), (110, 0.2)]);
        let relative = Schedule { base: 1.0, ..schedule(Scheduler::Adafactor) };
        assert_values(&relative, &[(0, 1e-2), (9_999, 1e-2), (39_999, 5e-3)]);
        let rising = Schedule { warmup_init: true, ..relative };
        assert_values(&rising, &[(0, 1e-6), (99, 1e-4), (39_999, 5e-3)]);
    }

    #[test]
    fn rules_are_read_and_written_as_in_diffusers() {
        let (rules, last) = Schedule::parse_rules("1:10, 0.1:20,0.005").unwrap();
        let s = Schedule { rules, last, ..schedule(Scheduler::PiecewiseConstant) };
        assert_eq!([0, 9, 10, 19, 20, 999].map(|t| s.multiplier(t)), [1.0, 1.0, 0.1, 0.1, 0.005, 0.005]);
        assert_eq!(s.step_rules(), "1:10,0.1:20,0.005");
        assert_eq!(Schedule::parse_rules("2"), Some((vec![], 2.0)));
        for wrong in ["", "1:10", "1:10,", "1:20,1:10,1", "x:1,1", "-1:5,1", "1:5:6,1"] {
            assert_eq!(Schedule::parse_rules(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn it_stays_where_it_ended() {
        for (_, scheduler) in Scheduler::ALL {
            let s = Schedule { cycles: 3, least: 0.1, decay: 20, ..schedule(scheduler) };
            if scheduler.ends() {
                assert_eq!(
                    [111, 150, 1_000_000].map(|t| s.multiplier(t)),
                    [s.multiplier(110); 3],
                    "{scheduler:?}"
                );
            }
            let no_room = Schedule { warmup: 110, decay: 0, ..s };
            assert!((100..130).all(|t| no_room.multiplier(t).is_finite()), "{scheduler:?}");
        }
        let s = schedule(Scheduler::Cosine);
        assert_eq!([110, 111, 150, 1_000_000].map(|t| s.multiplier(t)), [0.0; 4]);
    }
}
