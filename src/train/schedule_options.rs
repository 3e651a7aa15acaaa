//! The options of the learning rate, as sd-scripts names them: read, checked against each other, written.

use super::optim::Options;
use super::reader::{unknown_keys, Reader};
use super::schedule::{Schedule, Scheduler};
use serde_json::{json, Map, Value};

impl Schedule {
    /// Takes the options of the learning rate; `optimizer` decides some defaults and what contradicts what.
    pub fn read(read: &mut Reader, optimizer: &Options) -> Schedule {
        let default = Schedule::default();
        let base = read.number("learning_rate", f64::MIN_POSITIVE);
        let scheduler = read.choice("lr_scheduler", &Scheduler::ALL);
        let (relative, warmup_init) = match optimizer {
            Options::Adafactor(o) => (o.relative_step, o.warmup_init),
            _ => (false, false),
        };
        let scheduler = scheduler.or(relative.then_some(Scheduler::Adafactor));
        if relative && base.is_some() {
            read.problem("`learning_rate` says nothing to Adafactor with relative_step; set optimizer_args.relative_step to false".into());
        }
        if warmup_init && !relative {
            read.problem("`optimizer_args.warmup_init` needs relative_step".into());
        }
        if scheduler.is_some_and(|s| relative != (s == Scheduler::Adafactor)) {
            read.problem("`lr_scheduler`: adafactor and Adafactor's relative_step go together, without another schedule".into());
        }
        if optimizer.schedule_free() && scheduler.is_some_and(Scheduler::falls) {
            read.problem(format!(
                "`lr_scheduler`: {} averages instead; use constant or constant_with_warmup",
                optimizer.name()
            ));
        }
        let total = read.whole("max_train_steps", (1, u64::MAX));
        let scheduler = scheduler.unwrap_or(default.scheduler);
        let named = scheduler.name();
        if scheduler.ends() && read.get("max_train_steps").is_none() {
            read.problem(format!("`lr_scheduler`: {named} needs max_train_steps"));
        }
        let warmup = read.steps("lr_warmup_steps", total);
        if warmup > 0 && !scheduler.warms_up() {
            read.problem(format!(
                "`lr_warmup_steps` is {warmup}, but lr_scheduler {named} has no warm-up; use constant_with_warmup"
            ));
        }
        let decay = read.steps("lr_decay_steps", total);
        let stable_decay = scheduler == Scheduler::WarmupStableDecay;
        if stable_decay && read.get("lr_decay_steps").is_none() {
            read.problem("`lr_scheduler`: warmup_stable_decay needs lr_decay_steps".into());
        }
        if total.is_some_and(|total| warmup <= total && decay <= total && decay > total - warmup) {
            read.problem(format!(
                "`lr_decay_steps` is {decay}, more than lr_warmup_steps leave of max_train_steps"
            ));
        }
        let cycles = read.whole("lr_scheduler_num_cycles", (1, 1 << 32)).unwrap_or(default.cycles);
        let power = read.number("lr_scheduler_power", f64::MIN_POSITIVE).unwrap_or(default.power);
        let timescale = read.whole("lr_scheduler_timescale", (1, u64::MAX));
        let least = read.number("lr_scheduler_min_lr_ratio", 0.0);
        if least.is_some_and(|least| least > 1.0) {
            read.problem("`lr_scheduler_min_lr_ratio` is above 1".into());
        }
        if scheduler == Scheduler::CosineWithMinLr && read.get("lr_scheduler_min_lr_ratio").is_none() {
            read.problem("`lr_scheduler`: cosine_with_min_lr needs lr_scheduler_min_lr_ratio".into());
        }
        // Front ends write every option with its default, whatever the schedule; another value was meant for something.
        let inverse = scheduler == Scheduler::InverseSqrt;
        for (name, used, changed) in [
            ("lr_decay_steps", stable_decay, decay != default.decay),
            ("lr_scheduler_num_cycles", scheduler.cycles(), cycles != default.cycles),
            ("lr_scheduler_power", scheduler == Scheduler::Polynomial, power != default.power),
            ("lr_scheduler_timescale", inverse, timescale.is_some()),
            ("lr_scheduler_min_lr_ratio", scheduler.has_least(), least.is_some_and(|least| least != 0.0)),
        ] {
            if changed && !used {
                read.problem(format!("`{name}` says nothing to lr_scheduler {named}"));
            }
        }
        let mut schedule = Schedule {
            scheduler,
            base: if relative { 1.0 } else { base.unwrap_or(optimizer.default_learning_rate()) },
            warmup,
            total,
            cycles,
            power,
            least: least.unwrap_or(default.least),
            timescale,
            decay,
            warmup_init,
            ..default
        };
        schedule.read_arguments(read);
        schedule
    }

    fn read_arguments(&mut self, read: &mut Reader) {
        const PREFIX: &str = "lr_scheduler_args.";
        let (polynomial, rules) =
            (self.scheduler == Scheduler::Polynomial, self.scheduler == Scheduler::PiecewiseConstant);
        let empty = Map::new();
        let map = read.object("lr_scheduler_args").unwrap_or(&empty);
        let mut read = Reader { map, prefix: PREFIX, problems: read.problems };
        if polynomial || rules {
            unknown_keys(map, PREFIX, &[if polynomial { "lr_end" } else { "step_rules" }], read.problems);
        } else if let Some(name) = map.keys().next() {
            read.problem(format!("`{PREFIX}{name}` says nothing to lr_scheduler {}", self.scheduler.name()));
        }
        if polynomial {
            self.end = read.number("lr_end", 0.0).unwrap_or(self.end);
            if self.end >= self.base {
                let what = format!("`{PREFIX}lr_end` is {}, not less than learning_rate", self.end);
                read.problem(what);
            }
        }
        if rules {
            match (read.text("step_rules"), map.contains_key("step_rules")) {
                (Some(text), _) => match Schedule::parse_rules(&text) {
                    Some((rules, last)) => (self.rules, self.last) = (rules, last),
                    None => read.problem(format!(
                        "`{PREFIX}step_rules` is \"{text}\", expected multiples with ascending steps and a last multiple, as 1:10,0.1:20,0.01"
                    )),
                },
                (None, true) => {}
                (None, false) => read.problem("`lr_scheduler`: piecewise_constant needs lr_scheduler_args.step_rules".into()),
            }
        }
    }

    /// The options that give this schedule, and no others.
    pub fn write(&self, json: &mut Map<String, Value>) {
        let scheduler = self.scheduler;
        let mut put = |name: &str, used: bool, value: Value| {
            if used {
                json.insert(name.into(), value);
            }
        };
        put("lr_scheduler", true, json!(scheduler.name()));
        put("lr_warmup_steps", true, json!(self.warmup));
        put("learning_rate", scheduler != Scheduler::Adafactor, json!(self.base));
        put("max_train_steps", self.total.is_some(), json!(self.total));
        put("lr_decay_steps", scheduler == Scheduler::WarmupStableDecay, json!(self.decay));
        put("lr_scheduler_num_cycles", scheduler.cycles(), json!(self.cycles));
        put("lr_scheduler_power", scheduler == Scheduler::Polynomial, json!(self.power));
        put("lr_scheduler_timescale", self.timescale.is_some(), json!(self.timescale));
        put("lr_scheduler_min_lr_ratio", scheduler.has_least(), json!(self.least));
        let (polynomial, rules) = (json!({"lr_end": self.end}), json!({"step_rules": self.step_rules()}));
        put("lr_scheduler_args", scheduler == Scheduler::Polynomial, polynomial);
        put("lr_scheduler_args", scheduler == Scheduler::PiecewiseConstant, rules);
    }
}
