//! The optimizers by their names in a configuration, and what is told about their options.

use super::{
    adafactor, adamw, adamw8bit, adamw_schedule_free, came, dadapt_adam, dadapt_lion, lion, prodigy,
    radam_schedule_free, sgd, Layout, Optimizer,
};
use crate::error::Result;
use serde_json::{Map, Value};
use tch::Tensor;

/// What an option may be: in words for an error, and as a test.
pub struct Check(pub &'static str, pub fn(&Value) -> bool);

fn number(value: &Value, holds: impl Fn(f64) -> bool) -> bool {
    value.as_f64().is_some_and(|n| n.is_finite() && holds(n))
}

fn fractions(value: &Value, count: usize) -> bool {
    value
        .as_array()
        .is_some_and(|a| a.len() == count && a.iter().all(|v| number(v, |b| (0.0..1.0).contains(&b))))
}

/// 0 or more.
pub const AT_LEAST_0: Check = Check("a number of at least 0", |v| number(v, |n| n >= 0.0));
/// More than 0.
pub const ABOVE_0: Check = Check("a number above 0", |v| number(v, |n| n > 0.0));
/// A decay rate.
pub const FRACTION: Check = Check("a number from 0 to below 1", |v| number(v, |n| (0.0..1.0).contains(&n)));
/// A decay rate that is divided by.
pub const OPEN_FRACTION: Check = Check("a number above 0 and below 1", |v| number(v, |n| n > 0.0 && n < 1.0));
/// Two decay rates.
pub const TWO_FRACTIONS: Check = Check("two numbers from 0 to below 1", |v| fractions(v, 2));
/// Three decay rates.
pub const THREE_FRACTIONS: Check = Check("three numbers from 0 to below 1", |v| fractions(v, 3));
/// Two decay rates, of which the first is divided by.
pub const BETAS_OF_AVERAGE: Check = Check("two numbers from 0 to below 1, the first above 0", |v| {
    fractions(v, 2) && number(&v[0], |b| b > 0.0)
});
/// Two numbers that are added to squares.
pub const TWO_AT_LEAST_0: Check = Check("two numbers of at least 0", |v| {
    v.as_array().is_some_and(|a| a.len() == 2 && a.iter().all(|v| number(v, |n| n >= 0.0)))
});
/// Any exponent.
pub const FINITE: Check = Check("a number", |v| number(v, |_| true));
/// An exponent that shrinks.
pub const NEGATIVE: Check = Check("a number below 0", |v| number(v, |n| n < 0.0));
/// A count that may be 0.
pub const WHOLE: Check = Check("a whole number", Value::is_u64);
/// A count.
pub const COUNT: Check =
    Check("a whole number, 1 to 65536", |v| v.as_u64().is_some_and(|n| (1..=65536).contains(&n)));
/// A switch.
pub const FLAG: Check = Check("true or false", Value::is_boolean);

macro_rules! optimizers {
    ($($name:ident in $module:ident, $about:literal;)*) => {
        /// Which optimizer, with its numbers.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Options {
            $(#[doc = $about] $name($module::Options),)*
        }

        impl Options {
            /// Every optimizer's name in a configuration.
            pub const NAMES: &[&str] = &[$(stringify!($name)),*];

            /// The optimizer of this name, in any case, with its defaults.
            pub fn of(name: &str) -> Option<Options> {
                $(if name.eq_ignore_ascii_case(stringify!($name)) {
                    return Some(Options::$name($module::Options::default()));
                })*
                None
            }

            /// Its name in a configuration.
            pub fn name(&self) -> &'static str {
                match self { $(Options::$name(_) => stringify!($name),)* }
            }

            /// What it is, in a few words.
            pub fn about(&self) -> &'static str {
                match self { $(Options::$name(_) => $about,)* }
            }

            /// Its optimizer_args, complete; an option that is off by default is null.
            pub fn arguments(&self) -> Map<String, Value> {
                let value = match self { $(Options::$name(options) => serde_json::to_value(options),)* };
                match value {
                    Ok(Value::Object(map)) => map,
                    // Structs of numbers, which cannot fail to become an object.
                    _ => Map::new(),
                }
            }

            /// Its options and what each may be.
            pub fn checks(&self) -> &'static [(&'static str, Check)] {
                match self { $(Options::$name(_) => $module::CHECKS,)* }
            }

            /// The same optimizer with other values; `None` when they have not passed [`Options::checks`].
            pub fn with(&self, arguments: Map<String, Value>) -> Option<Options> {
                let value = Value::Object(arguments);
                match self { $(Options::$name(_) => serde_json::from_value(value).ok().map(Options::$name),)* }
            }

            /// The optimizer with fresh state for parameters that lie as `layout` says.
            pub fn build(&self, layout: &Layout, master: &Tensor) -> Result<Box<dyn Optimizer>> {
                Ok(match self { $(Options::$name(options) => Box::new($module::$name::new(*options, layout, master)?),)* })
            }
        }
    };
}

optimizers! {
    AdamW in adamw, "Adam with decoupled weight decay, as in torch";
    SGDNesterov in sgd, "SGD with Nesterov's momentum, as in torch";
    Lion in lion, "sign of a mean, as in lion-pytorch; wants a third of AdamW's rate or less";
    Adafactor in adafactor, "as in transformers; learning_rate needs relative_step false";
    CAME in came, "Adafactor that trusts steady updates more, as in came-pytorch";
    Prodigy in prodigy, "finds its rate, as in prodigyopt; learning_rate 1, a factor of what it finds";
    DAdaptAdam in dadapt_adam, "finds its rate, as in dadaptation; learning_rate 1, a factor of what it finds";
    DAdaptLion in dadapt_lion, "finds its rate, as in dadaptation; learning_rate 1, a factor of what it finds";
    AdamWScheduleFree in adamw_schedule_free, "as in schedulefree; the file gets the average";
    RAdamScheduleFree in radam_schedule_free, "as in schedulefree; the file gets the average";
    AdamW8bit in adamw8bit, "AdamW with its state in 8 bits, as in bitsandbytes";
}

impl Options {
    /// The learning rate of a configuration that gives none.
    pub fn default_learning_rate(&self) -> f64 {
        match self {
            Options::Prodigy(_) | Options::DAdaptAdam(_) | Options::DAdaptLion(_) => 1.0,
            _ => 1e-4,
        }
    }

    /// Whether it averages instead of following a schedule that falls.
    pub fn schedule_free(&self) -> bool {
        matches!(self, Options::AdamWScheduleFree(_) | Options::RAdamScheduleFree(_))
    }

    /// Of what parameters have to begin at a multiple; 1 if anywhere.
    pub fn alignment(&self) -> usize {
        if matches!(self, Options::AdamW8bit(_)) {
            adamw8bit::SCALED
        } else {
            1
        }
    }

    /// As sd-scripts writes it into a file: `AdamW(betas=(0.9, 0.999),eps=1e-8,weight_decay=0.01)`.
    pub fn written(&self) -> String {
        fn python(value: &Value) -> String {
            match value {
                Value::Null => "None".into(),
                Value::Bool(flag) => if *flag { "True" } else { "False" }.into(),
                Value::Array(items) => {
                    format!("({})", items.iter().map(python).collect::<Vec<_>>().join(", "))
                }
                other => {
                    other.as_f64().filter(|_| other.is_f64()).map_or(other.to_string(), |n| format!("{n:?}"))
                }
            }
        }
        let arguments: Vec<_> = self.arguments().iter().map(|(k, v)| format!("{k}={}", python(v))).collect();
        format!("{}({})", self.name(), arguments.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_has_a_check_that_its_default_passes() {
        for name in Options::NAMES {
            let options = Options::of(&name.to_lowercase()).unwrap();
            assert_eq!(options.name(), *name);
            let arguments = options.arguments();
            let checked: Vec<_> = options.checks().iter().map(|(name, _)| *name).collect();
            assert_eq!(arguments.keys().collect::<Vec<_>>(), checked, "{name}");
            for (option, Check(expected, holds)) in options.checks() {
                let value = &arguments[*option];
                assert!(value.is_null() || holds(value), "{name}.{option} is {value}, expected {expected}");
            }
            assert_eq!(options.with(arguments), Some(options));
        }
        assert!(Options::of("Adam").is_none());
    }

    #[test]
    fn a_file_gets_the_options_in_python() {
        assert_eq!(
            Options::of("adamw").unwrap().written(),
            "AdamW(betas=(0.9, 0.999),eps=1e-8,weight_decay=0.01)"
        );
        assert_eq!(
            Options::of("lion").unwrap().written(),
            "Lion(betas=(0.9, 0.99),weight_decay=0.0,decoupled_weight_decay=False)"
        );
    }
}
