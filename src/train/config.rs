//! The options of a training run: read from JSON or TOML, checked completely, all problems told at once.

use super::keep::Saving;
use super::modules::{self, Modules};
use super::optim::options::OPEN_FRACTION;
use super::optim::Options;
use super::reader::{unknown_keys, Reader};
use super::schedule::Schedule;
use super::text;
use crate::algo::TRAINED;
use crate::dtype::Float;
use crate::error::{Error, Result};
use once_cell::sync::Lazy;
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;

/// One documented option.
pub(super) struct Key {
    pub(super) name: &'static str,
    default: &'static str,
    about: &'static str,
}

pub(super) const fn key(name: &'static str, default: &'static str, about: &'static str) -> Key {
    Key { name, default, about }
}

/// Every option but those of modules, in the order of the documentation.
static KEYS: &[Key] = &[
    key(
        "learning_rate",
        "1e-4",
        "rate of the optimizer, before the schedule; 1 for those that find the rate themselves",
    ),
    key(
        "lr_scheduler",
        "\"constant\"",
        "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt, cosine_with_min_lr, \
         warmup_stable_decay, piecewise_constant; adafactor: that of Adafactor's relative_step, and its default",
    ),
    key("lr_warmup_steps", "0", "steps of a linear rise from 0; below 1: a share of max_train_steps"),
    key(
        "lr_decay_steps",
        "none",
        "warmup_stable_decay: steps of the fall at the end; below 1: a share of max_train_steps",
    ),
    key(
        "lr_scheduler_num_cycles",
        "1",
        "cosine_with_restarts: falls of the rate; cosine_with_min_lr, warmup_stable_decay: half waves of it",
    ),
    key("lr_scheduler_power", "1", "polynomial: its power"),
    key("lr_scheduler_timescale", "lr_warmup_steps or 10000", "inverse_sqrt: steps after the warm-up until the rate is learning_rate / sqrt(2)"),
    key(
        "lr_scheduler_min_lr_ratio",
        "none",
        "cosine_with_min_lr (needs it), warmup_stable_decay (0): least rate, as a share of learning_rate",
    ),
    key(
        "lr_scheduler_args",
        "{}",
        "polynomial: {\"lr_end\": 1e-7}; piecewise_constant: {\"step_rules\": \"1:10,0.1:20,0.01\"}, 1 x up to step 10, ..",
    ),
    key("max_train_steps", "none", "length of the run in optimizer steps; only the schedule looks at it"),
    key(
        "max_grad_norm",
        "1.0",
        "gradients of a larger norm, over all parameters, are scaled down to it; 0 is off",
    ),
    key(
        "ema_decay",
        "none",
        "keeps an average of the parameters, which files in output_dir get; ema = ema_decay * ema + (1 - ema_decay) * parameters after each update; a number \
         above 0 and below 1, such as 0.999",
    ),
    key("optimizer_type", "\"AdamW\"", "one of those below, in any case"),
    key("optimizer_args", "{}", "what to change of the optimizer's defaults, which stand below"),
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
    key(modules::MAP, "{}", "other options, of those above, for modules whose name fits a pattern, in which * stands for any text: {\"*attn2*\": {\"network_dim\": 4}}; of several the longest pattern"),
    key("unet_lr", "learning_rate", "rate of modules that are in no text encoder"),
    key("text_encoder_lr", "learning_rate", "rate of modules in text encoders (lora_te.. in the file)"),
    key("loraplus_lr_ratio", "1", "LoRA+: the rate of up factors, as a multiple"),
    key("loraplus_unet_lr_ratio", "loraplus_lr_ratio", "the same, in no text encoder"),
    key("loraplus_text_encoder_lr_ratio", "loraplus_lr_ratio", "the same, in text encoders"),
    key("network_weights", "none", "path of an adapter file whose values the modules start with"),
    key(
        "dim_from_weights",
        "false",
        "algorithm, rank and alpha of each module are those of network_weights; layers that it lacks get no module",
    ),
    key("scale_weight_norms", "none", "after each update every module whose norm of dW is above this is scaled down to it"),
    key("output_name", "none", "name of the adapter, written to the file; the beginning of the names of files in output_dir"),
    key("training_comment", "none", "free text, written to the file"),
    key(
        "metadata",
        "{}",
        "texts to write to the adapter's files; ss_base_model_version, guessed where it is missing, decides modelspec.architecture",
    ),
    key("output_dir", "none", "folder of the files below, and of the last one, {output_name}.safetensors; made where it is missing"),
    key("save_every_n_steps", "none", "{output_name}-step00000100.safetensors after every so many updates"),
    key("save_every_n_epochs", "none", "{output_name}-000001.safetensors after every so many epochs, the last one too"),
    key(
        "save_last_n_steps",
        "none",
        "of the files of steps keep those of the last so many steps, not so many files; deleted is only what this run wrote",
    ),
    key("save_last_n_epochs", "none", "of the files of epochs keep the last so many files; deleted is only what this run wrote"),
    key(
        "save_ranks",
        "[]",
        "dylora: beside each adapter file also {..}-r4.safetensors and so on, the same adapter cut to so many ranks, for [4, ..]; multiples of block_size",
    ),
    key("save_state", "false", "beside each file also {..}-state.safetensors, from which the run can go on"),
    key("save_last_n_steps_state", "save_last_n_steps", "the same for states"),
    key("save_last_n_epochs_state", "save_last_n_epochs", "the same for states"),
    key(
        "save_best",
        "false",
        "{output_name}-best.safetensors whenever the host gives a loss or validation value that is less than all before",
    ),
    key("save_precision", "\"float\"", "float, fp16 or bf16: dtype of the adapter's files; alpha stays float"),
];

/// A checked set of options; absent ones have their defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub(super) modules: Modules,
    pub(super) rates: Rates,
    pub(super) network_weights: Option<String>,
    pub(super) dim_from_weights: bool,
    pub(super) scale_weight_norms: Option<f64>,
    pub(crate) schedule: Schedule,
    pub(crate) max_grad_norm: f64,
    pub(crate) ema_decay: Option<f64>,
    pub(crate) optimizer: Options,
    pub(crate) seed: u64,
    pub(crate) mixed_precision: Float,
    pub(crate) gradient_accumulation_steps: u64,
    pub(crate) output_name: Option<String>,
    pub(crate) training_comment: Option<String>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) saving: Saving,
}

/// Learning rates of parts of a network; `None` is the common one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rates {
    unet: Option<f64>,
    text_encoder: Option<f64>,
    plus: f64,
    plus_unet: Option<f64>,
    plus_text_encoder: Option<f64>,
}

impl Rates {
    fn read(read: &mut Reader) -> Self {
        Rates {
            unet: read.number("unet_lr", 0.0),
            text_encoder: read.number("text_encoder_lr", 0.0),
            plus: read.number("loraplus_lr_ratio", f64::MIN_POSITIVE).unwrap_or(1.0),
            plus_unet: read.number("loraplus_unet_lr_ratio", f64::MIN_POSITIVE),
            plus_text_encoder: read.number("loraplus_text_encoder_lr_ratio", f64::MIN_POSITIVE),
        }
    }

    fn write(&self, json: &mut Map<String, Value>) {
        let values = [
            ("unet_lr", self.unet),
            ("text_encoder_lr", self.text_encoder),
            ("loraplus_lr_ratio", Some(self.plus)),
            ("loraplus_unet_lr_ratio", self.plus_unet),
            ("loraplus_text_encoder_lr_ratio", self.plus_text_encoder),
        ];
        json.extend(values.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value?)))));
    }

    /// The factor of `base` for the parameters of a module, and for those that LoRA+ raises.
    pub(super) fn factors(&self, text_encoder: bool, base: f64) -> (f64, f64) {
        let (rate, plus) = match text_encoder {
            true => (self.text_encoder, self.plus_text_encoder),
            false => (self.unet, self.plus_unet),
        };
        let factor = rate.map_or(1.0, |rate| rate / base);
        (factor, factor * plus.unwrap_or(self.plus))
    }
}

impl Config {
    /// Reads a JSON object (what begins with a brace) or TOML. The error lists every problem; an unknown key comes with the nearest known
    /// one.
    pub fn parse(text: &str) -> Result<Config> {
        let mut problems = Vec::new();
        let config = text::object(text).map(|map| Self::read(&map, &mut problems));
        let config = config.map_err(|defects| problems = defects);
        let what = match (config, problems.as_slice()) {
            (Ok(config), []) => return Ok(config),
            (_, [problem]) => format!("training configuration: {problem}"),
            (_, all) => format!("training configuration, {} problems: {}", all.len(), all.join("; ")),
        };
        Err(Error::argument(what, "every option is described in the configuration's schema"))
    }

    /// Every key with its default and meaning, one per line, then every optimizer with its options.
    pub fn schema() -> &'static str {
        static TEXT: Lazy<String> = Lazy::new(|| {
            let algorithms: Vec<_> = TRAINED.iter().map(|begin| begin.names.join(" = ")).collect();
            let line = |k: &Key| format!("{:<28} {:<32} {}\n", k.name, k.default, k.about);
            let optimizer = |name: &&str| {
                let options = Options::of(name)?;
                let arguments = Value::Object(options.arguments());
                Some(format!("{:<28} {}\n{:<28} {arguments}\n", name, options.about(), ""))
            };
            format!("{:<28} {:<32} meaning\n", "key", "default")
                + &modules::KEYS.iter().chain(KEYS).map(line).collect::<String>()
                + &format!("\n{:<28} of modules: {}\n", "algo", algorithms.join(", "))
                + &format!("\n{:<28} meaning, optimizer_args (null is off)\n", "optimizer_type")
                + &Options::NAMES.iter().filter_map(optimizer).collect::<String>()
        });
        &TEXT
    }

    fn read(map: &Map<String, Value>, problems: &mut Vec<String>) -> Config {
        let known: Vec<&str> = modules::KEYS.iter().chain(KEYS).map(|k| k.name).collect();
        unknown_keys(map, "", &known, problems);
        let mut read = Reader { map, prefix: "", problems };
        let modules = Modules::read(&mut read);
        let network_weights = read.text("network_weights");
        let dim_from_weights = read.flag("dim_from_weights").unwrap_or(false);
        if dim_from_weights && network_weights.is_none() {
            read.problem("`dim_from_weights` needs network_weights".into());
        }
        let optimizer = read.optimizer();
        let schedule = Schedule::read(&mut read, &optimizer);
        let max_grad_norm = read.number("max_grad_norm", 0.0).unwrap_or(1.0);
        let ema_decay = read.checked("ema_decay", &OPEN_FRACTION).and_then(Value::as_f64);
        if ema_decay.is_some() && optimizer.schedule_free() {
            read.problem(format!("`ema_decay`: {} averages by itself", optimizer.name()));
        }
        let seed = read.whole("seed", (0, u64::MAX)).unwrap_or(0);
        let precisions = [("no", Float::F32), ("bf16", Float::BF16), ("fp16", Float::F16)];
        let mixed_precision = read.choice("mixed_precision", &precisions).unwrap_or(Float::F32);
        let gradient_accumulation_steps =
            read.whole("gradient_accumulation_steps", (1, 1 << 32)).unwrap_or(1);
        let output_name = read.text("output_name");
        Config {
            saving: Saving::read(&mut read, output_name.as_deref(), &modules),
            modules,
            rates: Rates::read(&mut read),
            network_weights,
            dim_from_weights,
            scale_weight_norms: read.number("scale_weight_norms", f64::MIN_POSITIVE),
            schedule,
            max_grad_norm,
            ema_decay,
            optimizer,
            seed,
            mixed_precision,
            gradient_accumulation_steps,
            training_comment: read.text("training_comment"),
            metadata: read.texts("metadata").unwrap_or_default(),
            output_name,
        }
    }

    /// The learning rates that these options describe.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The resolved options; parsing them again gives an equal set.
    pub fn to_json(&self) -> Value {
        let mut json = json!({
            "max_grad_norm": self.max_grad_norm,
            "dim_from_weights": self.dim_from_weights,
            "optimizer_type": self.optimizer.name(),
            "optimizer_args": self.optimizer.arguments(),
            "seed": self.seed,
            "mixed_precision": self.precision_name(),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        });
        if let Some(decay) = self.ema_decay {
            json["ema_decay"] = json!(decay);
        }
        let texts = [
            ("network_weights", &self.network_weights),
            ("output_name", &self.output_name),
            ("training_comment", &self.training_comment),
        ];
        for (name, text) in texts {
            if let Some(text) = text {
                json[name] = json!(text);
            }
        }
        if let Some(norm) = self.scale_weight_norms {
            json["scale_weight_norms"] = json!(norm);
        }
        if let Value::Object(json) = &mut json {
            self.modules.write(json);
            self.rates.write(json);
            if !self.metadata.is_empty() {
                json.insert("metadata".into(), json!(self.metadata));
            }
            self.saving.write(json);
            self.schedule.write(json);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(c: &Config) -> (usize, f64, usize, f64) {
        let all = &c.modules.all;
        (all.rule.dim, all.rule.alpha, all.conv_dim, all.conv_alpha)
    }

    #[test]
    fn defaults_follow_each_other() {
        let c = Config::parse("").unwrap();
        assert_eq!(ranks(&c), (16, 16.0, 16, 16.0));
        assert_eq!((c.schedule, c.max_grad_norm), (Schedule::default(), 1.0));
        assert_eq!(Some(c.optimizer), Options::of("AdamW"));
        let c = Config::parse(r#"{"network_dim": 32, "network_alpha": 8, "conv_dim": 4}"#).unwrap();
        assert_eq!(ranks(&c), (32, 8.0, 4, 1.0));
        let c = Config::parse(r#"{"network_dim": 8, "network_alpha": 0, "conv_alpha": 2}"#).unwrap();
        assert_eq!(ranks(&c), (8, 8.0, 8, 2.0));
        let text = r#"{"lr_scheduler": "Cosine", "max_train_steps": 200, "lr_warmup_steps": 0.1}"#;
        let c = Config::parse(text).unwrap();
        assert_eq!((c.schedule.warmup, c.schedule().learning_rate(10)), (20, 5e-5));
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

    /// A configuration for every schedule and every optimizer, with values that are no defaults.
    fn varied() -> Vec<Config> {
        let schedules = [
            r#"{"network_dim": 3, "network_alpha": 1.7, "conv_dim": 7, "lr_scheduler": "cosine", "max_train_steps": 18446744073709551615,
                "optimizer_args": {"betas": [0.1, 0.2], "eps": 3e-9, "weight_decay": 0}, "mixed_precision": "bf16", "output_name": "ä"}"#,
            r#"{"algo": "locon", "name_algo_map": {"*attn*": {"algo": "none"}, "*ff*": {"network_dim": 2}}, "unet_lr": 0.5, "text_encoder_lr": 0,
                "loraplus_lr_ratio": 16, "loraplus_unet_lr_ratio": 3, "loraplus_text_encoder_lr_ratio": 2, "scale_weight_norms": 1,
                "network_dropout": 0.1, "rank_dropout": 0.2, "module_dropout": 0.3, "dora_wd": true, "wd_on_output": false}"#,
            r#"{"lr_scheduler": "polynomial", "max_train_steps": 9, "lr_scheduler_power": 2.5, "lr_scheduler_args": {"lr_end": 3e-6}}"#,
            r#"{"lr_scheduler": "Inverse_Sqrt", "lr_scheduler_timescale": 12, "lr_warmup_steps": 3, "training_comment": "b", "network_weights": "a", "dim_from_weights": true}"#,
            r#"{"lr_scheduler": "warmup_stable_decay", "max_train_steps": 20, "lr_decay_steps": 0.25, "lr_scheduler_num_cycles": 3,
                "lr_scheduler_min_lr_ratio": 0.125}"#,
            r#"{"lr_scheduler": "cosine_with_min_lr", "max_train_steps": 20, "lr_scheduler_min_lr_ratio": 0}"#,
            r#"{"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:5,0.3:7,0.01"}}"#,
            r#"{"lr_scheduler": "cosine_with_restarts", "max_train_steps": 20, "lr_scheduler_num_cycles": 3, "learning_rate": 0.3, "ema_decay": 0.995}"#,
            r#"{"output_dir": "out", "output_name": "x", "save_every_n_steps": 5, "save_last_n_steps": 15, "save_every_n_epochs": 2,
                "save_last_n_epochs": 3, "save_state": true, "save_last_n_steps_state": 1, "save_last_n_epochs_state": 2, "save_best": true,
                "algo": "dylora", "block_size": 4, "save_ranks": [4, 8], "save_precision": "bf16", "metadata": {"ss_base_model_version": "sd_v1"}}"#,
        ];
        let optimizers =
            Options::NAMES.iter().map(|name| format!(r#"{{"optimizer_type": "{}"}}"#, name.to_uppercase()));
        schedules
            .map(str::to_owned)
            .into_iter()
            .chain(optimizers)
            .map(|text| Config::parse(&text).unwrap())
            .collect()
    }

    #[test]
    fn resolved_options_parse_to_themselves() {
        for c in varied() {
            assert_eq!(Config::parse(&c.to_json().to_string()).unwrap(), c);
        }
    }

    #[test]
    fn the_schema_names_exactly_the_keys_that_are_read() {
        let mut written: Vec<String> = Vec::new();
        for config in varied() {
            written.extend(config.to_json().as_object().unwrap().keys().cloned());
        }
        for key in modules::KEYS.iter().chain(KEYS) {
            assert!(Config::schema().lines().any(|l| l.starts_with(key.name) && l.contains(key.about)));
            assert!(written.iter().any(|name| name == key.name), "{}", key.name);
            written.retain(|name| name != key.name);
        }
        assert!(written.is_empty(), "{written:?}");
        for name in Options::NAMES {
            assert!(Config::schema().lines().any(|l| l.split_whitespace().next() == Some(name)), "{name}");
        }
    }

    #[test]
    fn what_a_schedule_needs_or_does_not_know_is_told() {
        for (text, part) in [
            (r#"{"lr_scheduler": "linear"}"#, "linear needs max_train_steps"),
            (r#"{"lr_scheduler": "cosin"}"#, "the nearest is cosine"),
            (r#"{"optimizer_type": "Lyon"}"#, "the nearest is Lion"),
            (
                r#"{"lr_scheduler": "cosine_with_min_lr", "max_train_steps": 5}"#,
                "needs lr_scheduler_min_lr_ratio",
            ),
            (r#"{"lr_scheduler": "warmup_stable_decay", "max_train_steps": 5}"#, "needs lr_decay_steps"),
            (
                r#"{"lr_scheduler": "warmup_stable_decay", "max_train_steps": 5, "lr_decay_steps": 3, "lr_warmup_steps": 3}"#,
                "more than lr_warmup_steps leave",
            ),
            (r#"{"lr_scheduler_power": 2}"#, "`lr_scheduler_power` says nothing to lr_scheduler constant"),
            (r#"{"lr_scheduler_args": {"lr_end": 1}}"#, "`lr_scheduler_args.lr_end` says nothing"),
            (
                r#"{"lr_scheduler": "polynomial", "max_train_steps": 5, "lr_scheduler_args": {"lr_ends": 0}}"#,
                "nearest is `lr_scheduler_args.lr_end`",
            ),
            (
                r#"{"lr_scheduler": "polynomial", "max_train_steps": 5, "learning_rate": 1e-8}"#,
                "not less than learning_rate",
            ),
            (r#"{"lr_scheduler": "piecewise_constant"}"#, "needs lr_scheduler_args.step_rules"),
            (
                r#"{"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:5"}}"#,
                "as 1:10,0.1:20,0.01",
            ),
            (r#"{"ema_decay": 1}"#, "`ema_decay` is 1, expected a number above 0 and below 1"),
            (r#"{"ema_decay": 0.9, "optimizer_type": "AdamWScheduleFree"}"#, "averages by itself"),
            (
                r#"{"optimizer_type": "Lion", "optimizer_args": {"eps": 1}}"#,
                "`optimizer_args.eps` is not an option",
            ),
        ] {
            let told = Config::parse(text).unwrap_err().to_string();
            assert!(told.contains(part), "`{part}` is missing in: {told}");
        }
        // What front ends write for every schedule is accepted.
        assert!(Config::parse(
            r#"{"lr_scheduler_num_cycles": 1, "lr_scheduler_power": 1.0, "lr_scheduler_args": {}}"#
        )
        .is_ok());
    }
}
