//! The options of a training run: read from JSON, checked completely, all problems told at once.

use super::optim::adamw;
use super::schedule::{Schedule, Scheduler};
use crate::dtype::Float;
use crate::error::{Error, Result};
use once_cell::sync::Lazy;
use serde_json::{json, Map, Value};

/// One documented option.
struct Key {
    name: &'static str,
    default: &'static str,
    about: &'static str,
}

const fn key(name: &'static str, default: &'static str, about: &'static str) -> Key {
    Key { name, default, about }
}

/// Every option, in the order of the documentation.
static KEYS: &[Key] = &[
    key("network_dim", "16", "rank of Linear layers and 1x1 convolutions"),
    key(
        "network_alpha",
        "network_dim",
        "the output is scaled by network_alpha / network_dim; 0 means network_dim",
    ),
    key("conv_dim", "network_dim", "rank of convolutions with a larger kernel"),
    key("conv_alpha", "the same scale as network_alpha", "as network_alpha, for conv_dim"),
    key("learning_rate", "1e-4", "rate of the optimizer, before the schedule"),
    key(
        "lr_scheduler",
        "\"constant\"",
        "constant, constant_with_warmup or cosine (ends at 0 with max_train_steps and stays there)",
    ),
    key("lr_warmup_steps", "0", "steps of a linear rise from 0; below 1: a share of max_train_steps"),
    key("max_train_steps", "none", "length of the run in optimizer steps; only the schedule looks at it"),
    key(
        "max_grad_norm",
        "1.0",
        "gradients of a larger norm, over all parameters, are scaled down to it; 0 is off",
    ),
    key("optimizer_type", "\"AdamW\"", "AdamW"),
    key("optimizer_args", "{}", "AdamW: {\"betas\": [0.9, 0.999], \"eps\": 1e-8, \"weight_decay\": 0.01}"),
    key("seed", "0", "chooses the start values, together with each module's name"),
    key(
        "mixed_precision",
        "\"no\"",
        "no, bf16 or fp16: what forward and backward compute in; values and state stay in fp32",
    ),
    key(
        "gradient_accumulation_steps",
        "1",
        "so many calls of step make one update with the averaged gradient",
    ),
    key("output_name", "none", "name of the adapter, written to the file"),
    key("training_comment", "none", "free text, written to the file"),
];

/// A checked set of options; absent ones have their defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub(crate) network_dim: usize,
    pub(crate) network_alpha: f64,
    pub(crate) conv_dim: usize,
    pub(crate) conv_alpha: f64,
    pub(crate) learning_rate: f64,
    pub(crate) lr_scheduler: Scheduler,
    pub(crate) lr_warmup_steps: u64,
    pub(crate) max_train_steps: Option<u64>,
    pub(crate) max_grad_norm: f64,
    pub(crate) optimizer: adamw::Options,
    pub(crate) seed: u64,
    pub(crate) mixed_precision: Float,
    pub(crate) gradient_accumulation_steps: u64,
    pub(crate) output_name: Option<String>,
    pub(crate) training_comment: Option<String>,
}

impl Config {
    /// Reads a JSON object. The error lists every problem; an unknown key comes with the nearest known one.
    pub fn parse(json: &str) -> Result<Config> {
        let bad =
            |what: String| Error::argument(what, "every option is described in the configuration's schema");
        let text = if json.trim().is_empty() { "{}" } else { json };
        let value: Value = serde_json::from_str(text)
            .map_err(|e| bad(format!("the training configuration is not JSON: {e}")))?;
        let Value::Object(map) = value else {
            return Err(bad("the training configuration is not a JSON object".into()));
        };
        let mut problems = Vec::new();
        let config = Self::read(&map, &mut problems);
        match problems.len() {
            0 => Ok(config),
            1 => Err(bad(format!("training configuration: {}", problems[0]))),
            n => Err(bad(format!("training configuration, {n} problems: {}", problems.join("; ")))),
        }
    }

    /// Every key with its default and meaning, one per line.
    pub fn schema() -> &'static str {
        static TEXT: Lazy<String> = Lazy::new(|| {
            let line = |k: &Key| format!("{:<28} {:<32} {}\n", k.name, k.default, k.about);
            format!("{:<28} {:<32} meaning\n", "key", "default") + &KEYS.iter().map(line).collect::<String>()
        });
        &TEXT
    }

    fn read(map: &Map<String, Value>, problems: &mut Vec<String>) -> Config {
        let known: Vec<&str> = KEYS.iter().map(|k| k.name).collect();
        unknown_keys(map, "", &known, problems);
        let mut read = Reader { map, prefix: "", problems };
        const RANKS: (u64, u64) = (1, 1 << 16);
        let network_dim = read.whole("network_dim", RANKS).unwrap_or(16);
        let positive_or = |alpha: Option<f64>, default: f64| alpha.filter(|&a| a != 0.0).unwrap_or(default);
        let network_alpha = positive_or(read.number("network_alpha", 0.0), network_dim as f64);
        let conv_dim = read.whole("conv_dim", RANKS).unwrap_or(network_dim);
        let same_scale = if conv_dim == network_dim {
            network_alpha
        } else {
            network_alpha * conv_dim as f64 / network_dim as f64
        };
        let conv_alpha = match read.number("conv_alpha", 0.0) {
            Some(0.0) => conv_dim as f64,
            given => given.unwrap_or(same_scale),
        };
        let learning_rate = read.number("learning_rate", f64::MIN_POSITIVE).unwrap_or(1e-4);
        let lr_scheduler = read.choice("lr_scheduler", &Scheduler::ALL).unwrap_or(Scheduler::Constant);
        let max_train_steps = read.whole("max_train_steps", (1, u64::MAX));
        let lr_warmup_steps = read.warmup(lr_scheduler, max_train_steps);
        if lr_scheduler == Scheduler::Cosine && !map.contains_key("max_train_steps") {
            read.problem("`lr_scheduler`: cosine needs max_train_steps".into());
        }
        let max_grad_norm = read.number("max_grad_norm", 0.0).unwrap_or(1.0);
        read.choice("optimizer_type", &[("AdamW", ())]);
        let optimizer = read.adamw();
        let seed = read.whole("seed", (0, u64::MAX)).unwrap_or(0);
        let precisions = [("no", Float::F32), ("bf16", Float::BF16), ("fp16", Float::F16)];
        let mixed_precision = read.choice("mixed_precision", &precisions).unwrap_or(Float::F32);
        let gradient_accumulation_steps =
            read.whole("gradient_accumulation_steps", (1, 1 << 32)).unwrap_or(1);
        Config {
            network_dim: network_dim as usize,
            network_alpha,
            conv_dim: conv_dim as usize,
            conv_alpha,
            learning_rate,
            lr_scheduler,
            lr_warmup_steps,
            max_train_steps,
            max_grad_norm,
            optimizer,
            seed,
            mixed_precision,
            gradient_accumulation_steps,
            output_name: read.text("output_name"),
            training_comment: read.text("training_comment"),
        }
    }

    /// The learning rates that these options describe.
    pub fn schedule(&self) -> Schedule {
        Schedule {
            scheduler: self.lr_scheduler,
            base: self.learning_rate,
            warmup: self.lr_warmup_steps,
            total: self.max_train_steps.unwrap_or(u64::MAX),
        }
    }

    /// The resolved options; parsing them again gives an equal set.
    pub fn to_json(&self) -> Value {
        let mut json = json!({
            "network_dim": self.network_dim,
            "network_alpha": self.network_alpha,
            "conv_dim": self.conv_dim,
            "conv_alpha": self.conv_alpha,
            "learning_rate": self.learning_rate,
            "lr_scheduler": self.lr_scheduler.name(),
            "lr_warmup_steps": self.lr_warmup_steps,
            "max_grad_norm": self.max_grad_norm,
            "optimizer_type": "AdamW",
            "optimizer_args": {
                "betas": [self.optimizer.betas.0, self.optimizer.betas.1],
                "eps": self.optimizer.eps,
                "weight_decay": self.optimizer.weight_decay,
            },
            "seed": self.seed,
            "mixed_precision": self.precision_name(),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        });
        for (name, text) in [("output_name", &self.output_name), ("training_comment", &self.training_comment)]
        {
            if let Some(text) = text {
                json[name] = json!(text);
            }
        }
        if let Some(steps) = self.max_train_steps {
            json["max_train_steps"] = json!(steps);
        }
        json
    }

    /// The compute dtype by its name in a configuration.
    pub(crate) fn precision_name(&self) -> &'static str {
        match self.mixed_precision {
            Float::F32 | Float::E4M3 | Float::E5M2 => "no",
            Float::BF16 => "bf16",
            Float::F16 => "fp16",
        }
    }
}

/// Takes values out of an object and collects what is wrong with them. An absent key and null are the default.
struct Reader<'a> {
    map: &'a Map<String, Value>,
    prefix: &'static str,
    problems: &'a mut Vec<String>,
}

impl<'a> Reader<'a> {
    fn problem(&mut self, text: String) {
        self.problems.push(text);
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    fn wrong(&mut self, name: &str, value: &Value, expected: &str) {
        self.problems.push(format!("`{}{name}` is {value}, expected {expected}", self.prefix));
    }

    fn number(&mut self, name: &str, least: f64) -> Option<f64> {
        let value = self.get(name)?;
        let number = value.as_f64().filter(|&n| n.is_finite() && n >= least);
        if number.is_none() {
            self.wrong(name, value, if least == 0.0 { "a number of at least 0" } else { "a number above 0" });
        }
        number
    }

    fn whole(&mut self, name: &str, (least, most): (u64, u64)) -> Option<u64> {
        let value = self.get(name)?;
        let number = value.as_u64().filter(|n| (least..=most).contains(n));
        if number.is_none() {
            let range =
                if most == u64::MAX { format!("{least} or more") } else { format!("{least} to {most}") };
            self.wrong(name, value, &format!("a whole number, {range}"));
        }
        number
    }

    fn text(&mut self, name: &str) -> Option<String> {
        let value = self.get(name)?;
        if !value.is_string() {
            self.wrong(name, value, "text");
        }
        value.as_str().map(str::to_owned)
    }

    /// Case does not matter, as in sd-scripts.
    fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> Option<T> {
        let value = self.get(name)?;
        let chosen = value.as_str().and_then(|s| choices.iter().find(|(c, _)| c.eq_ignore_ascii_case(s)));
        if chosen.is_none() {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            self.wrong(name, value, &names.join(", "));
        }
        chosen.map(|(_, v)| *v)
    }

    fn warmup(&mut self, scheduler: Scheduler, total: Option<u64>) -> u64 {
        let Some(value) = self.get("lr_warmup_steps") else { return 0 };
        let steps = match (value.as_u64(), value.as_f64()) {
            (Some(steps), _) => steps,
            (None, Some(share)) if (0.0..1.0).contains(&share) => match total {
                Some(total) => (share * total as f64) as u64,
                None => {
                    self.problem(format!(
                        "`lr_warmup_steps` is {share}, a share of max_train_steps, which is missing"
                    ));
                    return 0;
                }
            },
            _ => {
                self.wrong("lr_warmup_steps", value, "a whole number, or a share from 0 to below 1");
                return 0;
            }
        };
        if steps > 0 && scheduler == Scheduler::Constant {
            self.problem(format!(
                "`lr_warmup_steps` is {steps}, but lr_scheduler constant has no warm-up; use constant_with_warmup"
            ));
        }
        if total.is_some_and(|total| steps > total) {
            self.problem(format!("`lr_warmup_steps` is {steps}, more than max_train_steps"));
        }
        steps
    }

    fn adamw(&mut self) -> adamw::Options {
        let default = adamw::Options::default();
        let Some(value) = self.get("optimizer_args") else { return default };
        let Value::Object(map) = value else {
            self.wrong("optimizer_args", value, "an object");
            return default;
        };
        const PREFIX: &str = "optimizer_args.";
        unknown_keys(map, PREFIX, &["betas", "eps", "weight_decay"], self.problems);
        let mut read = Reader { map, prefix: PREFIX, problems: self.problems };
        let mut betas = default.betas;
        if let Some(value) = read.get("betas") {
            let beta = |v: &Value| v.as_f64().filter(|b| (0.0..1.0).contains(b));
            match value.as_array().map(|a| a.iter().map(beta).collect::<Vec<_>>()).as_deref() {
                Some([Some(first), Some(second)]) => betas = (*first, *second),
                _ => read.wrong("betas", value, "two numbers from 0 to below 1"),
            }
        }
        adamw::Options {
            betas,
            eps: read.number("eps", 0.0).unwrap_or(default.eps),
            weight_decay: read.number("weight_decay", 0.0).unwrap_or(default.weight_decay),
        }
    }
}

fn unknown_keys(map: &Map<String, Value>, prefix: &str, known: &[&str], problems: &mut Vec<String>) {
    for name in map.keys().filter(|name| !known.contains(&name.as_str())) {
        let nearest = known.iter().min_by_key(|k| distance(name, k)).unwrap_or(&"");
        problems.push(format!("`{prefix}{name}` is not an option; the nearest is `{prefix}{nearest}`"));
    }
}

/// Levenshtein's distance, without regard to case.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.chars().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.chars().count()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_follow_each_other() {
        let c = Config::parse("").unwrap();
        assert_eq!((c.network_dim, c.network_alpha, c.conv_dim, c.conv_alpha), (16, 16.0, 16, 16.0));
        assert_eq!((c.learning_rate, c.max_grad_norm, c.optimizer), (1e-4, 1.0, adamw::Options::default()));
        let c = Config::parse(r#"{"network_dim": 32, "network_alpha": 8, "conv_dim": 4}"#).unwrap();
        assert_eq!((c.network_alpha, c.conv_dim, c.conv_alpha), (8.0, 4, 1.0));
        let c = Config::parse(r#"{"network_dim": 8, "network_alpha": 0, "conv_alpha": 2}"#).unwrap();
        assert_eq!((c.network_alpha, c.conv_dim, c.conv_alpha), (8.0, 8, 2.0));
        let text = r#"{"lr_scheduler": "Cosine", "max_train_steps": 200, "lr_warmup_steps": 0.1}"#;
        let c = Config::parse(text).unwrap();
        assert_eq!((c.lr_warmup_steps, c.schedule().learning_rate(10)), (20, 5e-5));
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let text = r#"{"network_dim": 0, "lerning_rate": 1, "lr_scheduler": "cosine", "seed": -1, "output_name": 3,
            "optimizer_args": {"beta": 1, "betas": [0.9, 1.0], "eps": "x"}, "mixed_precision": "fp8", "learning_rate": 0}"#;
        let error = Config::parse(text).unwrap_err();
        let told = error.to_string();
        for part in [
            "10 problems",
            "`network_dim` is 0, expected a whole number, 1 to 65536",
            "`lerning_rate` is not an option; the nearest is `learning_rate`",
            "cosine needs max_train_steps",
            "`seed` is -1",
            "`output_name` is 3, expected text",
            "`optimizer_args.beta` is not an option; the nearest is `optimizer_args.betas`",
            "`optimizer_args.betas` is [0.9,1.0]",
            "`optimizer_args.eps` is \"x\"",
            "`mixed_precision` is \"fp8\", expected no, bf16, fp16",
            "`learning_rate` is 0, expected a number above 0",
        ] {
            assert!(told.contains(part), "`{part}` is missing in: {told}");
        }
        assert!(!error.hint().is_empty());
        assert!(Config::parse("[]").is_err() && Config::parse("{").is_err());
        let constant = Config::parse(r#"{"lr_warmup_steps": 5}"#).unwrap_err().to_string();
        assert!(constant.contains("constant_with_warmup"), "{constant}");
    }

    #[test]
    fn resolved_options_parse_to_themselves() {
        let text = r#"{"network_dim": 3, "network_alpha": 1.7, "conv_dim": 7, "lr_scheduler": "cosine", "max_train_steps": 18446744073709551615,
            "optimizer_args": {"betas": [0.1, 0.2], "eps": 3e-9, "weight_decay": 0}, "mixed_precision": "bf16", "output_name": "ä"}"#;
        let c = Config::parse(text).unwrap();
        assert_eq!(Config::parse(&c.to_json().to_string()).unwrap(), c);
    }

    #[test]
    fn the_schema_names_exactly_the_keys_that_are_read() {
        let mut full =
            Config::parse(r#"{"max_train_steps": 5, "output_name": "a", "training_comment": "b"}"#)
                .unwrap()
                .to_json();
        let resolved = full.as_object_mut().unwrap();
        for key in KEYS {
            assert!(Config::schema().lines().any(|l| l.starts_with(key.name) && l.contains(key.about)));
            assert!(resolved.remove(key.name).is_some(), "{}", key.name);
        }
        assert!(resolved.is_empty(), "{resolved:?}");
    }
}
