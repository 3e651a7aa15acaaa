//! What an adapter file says of its training: the keys that A1111, Forge and others look for, spelt as sd-scripts spells them.

use super::network::Network;
use crate::adapter::safetensors;
use crate::algo::training::{family, inside};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::names;
use crate::report::facts::values::day_of;
use serde_json::{json, Map};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// A tensor of a file: name, dtype, shape, bytes.
pub(super) type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

/// Tells the files of one run, over all its resumptions.
pub(super) const SESSION: &str = "ss_session_id";
/// When the run began, in seconds since 1970.
pub(super) const STARTED: &str = "ss_training_started_at";

/// A run, as its files name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Session {
    pub(super) id: String,
    pub(super) started_at: u64,
}

impl Session {
    /// Begins now. The number is a function of the time and the options, so that a run can be reproduced to the bit.
    pub(super) fn new(options: &str) -> Self {
        let started_at = now();
        let digest = Sha256::new().chain_update(started_at.to_le_bytes()).chain_update(options).finalize();
        let id = digest.iter().take(4).fold(0u32, |id, &byte| (id << 8) | u32::from(byte));
        Session { id: id.to_string(), started_at }
    }
}

/// Seconds since 1970; `SOURCE_DATE_EPOCH` (reproducible-builds.org) stands for them where it is set.
fn now() -> u64 {
    let given = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    let clock =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    given.unwrap_or_else(clock)
}

/// (`ss_base_model_version`, its family as `names` calls it, modelspec's architecture and implementation). The first that a version
/// begins with is its row; the first of a family is what a guess becomes.
const BASES: &[(&str, &str, &str, &str)] = &[
    ("sd_v2_v", "", "stable-diffusion-v2-768-v", "diffusers"),
    ("sd_v2", "SD 2.x", "stable-diffusion-v2-512", "diffusers"),
    ("sd_v1", "SD 1.x", "stable-diffusion-v1", "diffusers"),
    (
        "sdxl_base_v1-0",
        "SDXL",
        "stable-diffusion-xl-v1-base",
        "https://github.com/Stability-AI/generative-models",
    ),
    ("sdxl_", "", "stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"),
    ("flux1", "Flux.1", "flux-1", "https://github.com/black-forest-labs/flux"),
];

/// The module of sd-scripts that reads files of these algorithms and, where it is LyCORIS', the name of the most frequent one there.
fn network_module<'a>(algorithms: impl Iterator<Item = &'a str>) -> (&'static str, Option<String>) {
    let mut counts = BTreeMap::<&str, usize>::new();
    algorithms
        .filter(|name| family(name) != "LoRA")
        .for_each(|name| *counts.entry(inside(name).unwrap_or(name)).or_default() += 1);
    // Of equally many the first by name.
    let Some((name, _)) = counts.iter().rev().max_by_key(|(_, count)| **count) else {
        return ("networks.lora", None);
    };
    let algo = match *name {
        "(IA)^3" => "ia3".into(),
        "OFT" => "diag-oft".into(),
        "T-LoRA" => "tlora".into(),
        other => other.to_lowercase(),
    };
    ("lycoris.kohya", Some(algo))
}

impl Network {
    /// What sd-scripts and modelspec would say about this network, with what the host adds, first by its configuration, then by `added`,
    /// which wins; every value is text. Nothing but the end of training and the date depends on the clock. `rank` is that to which the
    /// adapter is cut.
    pub(super) fn metadata(
        &self,
        added: &BTreeMap<String, String>,
        steps: u64,
        rank: Option<usize>,
    ) -> BTreeMap<String, String> {
        let (c, options) = (&self.config, &self.config.modules.all);
        let cut = |dim: usize| rank.map_or(dim, |rank| dim.min(rank)).to_string();
        let schedule = c.schedule();
        let finished_at = now();
        let (module, algo) = network_module(self.modules.iter().map(|m| m.algorithm.name()));
        let mut all: BTreeMap<&str, String> = BTreeMap::from([
            ("ss_network_module", module.into()),
            ("ss_network_dim", cut(options.rule.dim)),
            ("ss_network_alpha", options.rule.alpha.to_string()),
            ("ss_learning_rate", schedule.base.to_string()),
            ("ss_lr_scheduler", schedule.scheduler.name().into()),
            ("ss_lr_warmup_steps", schedule.warmup.to_string()),
            ("ss_max_train_steps", schedule.total.map_or("None".into(), |n| n.to_string())),
            ("ss_steps", steps.to_string()),
            ("ss_epoch", self.run.epoch.to_string()),
            ("ss_max_grad_norm", c.max_grad_norm.to_string()),
            ("ss_gradient_accumulation_steps", c.gradient_accumulation_steps.to_string()),
            ("ss_mixed_precision", c.precision_name().into()),
            ("ss_seed", c.seed.to_string()),
            ("ss_optimizer", c.optimizer.written()),
            (STARTED, self.session.started_at.to_string()),
            ("ss_training_finished_at", finished_at.to_string()),
            ("modelspec.sai_model_spec", "1.0.1".into()),
            ("modelspec.title", c.output_name.clone().unwrap_or_else(|| "LoRA".into())),
            ("modelspec.date", day_of(finished_at)),
            ("modelspec.implementation_version", concat!("lycore/", env!("CARGO_PKG_VERSION")).into()),
        ]);
        let mut args = Map::new();
        if let Some(algo) = algo {
            args.insert("algo".into(), json!(algo));
        }
        if self.modules.iter().any(|m| inside(m.algorithm.name()).is_some()) {
            args.insert("dora_wd".into(), json!("True"));
        }
        if self.modules.iter().any(|m| m.layer.large_kernel()) {
            args.insert("conv_dim".into(), json!(cut(options.conv_dim)));
            args.insert("conv_alpha".into(), json!(options.conv_alpha.to_string()));
        }
        if !args.is_empty() {
            all.insert("ss_network_args", json!(args).to_string());
        }
        let texts = [("ss_output_name", &c.output_name), ("ss_training_comment", &c.training_comment)];
        all.extend(texts.into_iter().filter_map(|(key, text)| Some((key, text.clone()?))));
        let mut all: BTreeMap<String, String> = all.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        // What decides other keys must be known first.
        let mut host = c.metadata.clone();
        host.extend(added.clone());
        const BASE: &str = "ss_base_model_version";
        let base = host.get(BASE).cloned().or_else(|| self.base_version().map(str::to_owned));
        if let Some(base) = base {
            if let Some((.., architecture, implementation)) =
                BASES.iter().find(|(version, ..)| base.starts_with(version))
            {
                all.insert("modelspec.architecture".into(), format!("{architecture}/lora"));
                all.insert("modelspec.implementation".into(), (*implementation).into());
            }
            // Python's spelling, which A1111 compares with.
            all.insert("ss_v2".into(), if base.starts_with("sd_v2") { "True" } else { "False" }.into());
            all.insert(BASE.into(), base);
        }
        all.extend(host);
        // Not the host's to say: by it a run knows its own files.
        all.insert(SESSION.into(), self.session.id.clone());
        all
    }

    /// The base model by the modules' names and shapes. A1111 takes a file that does not tell for one of Stable Diffusion 1.
    fn base_version(&self) -> Option<&'static str> {
        let modules: Vec<_> =
            self.modules.iter().map(|m| (m.name.as_str(), m.layer.weight.as_slice())).collect();
        let guess = names::guess(&modules)?;
        BASES.iter().find(|(_, family, ..)| *family == guess.family).map(|(version, ..)| *version)
    }
}

/// The hashes of a file with these tensors, by which A1111's Additional Networks extension and others look adapters up: of all bytes
/// behind the header; and the first 8 digits of that of 64 KiB at 1 MiB of the file as it is with the `ss_` keys alone.
pub(super) fn hashes(
    tensors: &[Stored],
    metadata: &BTreeMap<String, String>,
) -> Result<[(String, String); 2]> {
    let immutable = metadata.iter().filter(|(key, _)| key.starts_with("ss_"));
    let immutable = immutable.map(|(k, v)| (k.clone(), v.clone())).collect();
    let header = safetensors::header(
        tensors.iter().map(|(name, dtype, shape, _)| (name.as_str(), *dtype, &shape[..])),
        &immutable,
    )?;
    let (mut whole, mut part) = (Sha256::new(), Sha256::new());
    let (mut skip, mut take) = (1 << 20, 1 << 16);
    let bodies = tensors.iter().map(|(.., bytes)| bytes.as_slice());
    bodies.clone().for_each(|bytes| whole.update(bytes));
    for bytes in std::iter::once(header.as_slice()).chain(bodies) {
        let begin = skip.min(bytes.len());
        let end = (begin + take).min(bytes.len());
        part.update(&bytes[begin..end]);
        (skip, take) = (skip - begin, take - (end - begin));
    }
    let legacy = format!("{:x}", part.finalize());
    Ok([
        ("sshs_model_hash".into(), format!("{:x}", whole.finalize())),
        ("sshs_legacy_hash".into(), legacy[..8].into()),
    ])
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;
    use crate::merge::bypass::Geometry;

    #[test]
    fn the_module_is_named_after_the_algorithms() {
        let module = |names: &[&str]| network_module(names.iter().copied());
        assert_eq!(module(&["LoRA", "LoCon", "DyLoRA"]), ("networks.lora", None));
        let lycoris = |algo: &str| ("lycoris.kohya", Some(algo.to_owned()));
        assert_eq!(module(&["LoRA", "LoRA", "LoHa"]), lycoris("loha"));
        assert_eq!(module(&["LoKr", "norm", "LoKr"]), lycoris("lokr"));
        assert_eq!(module(&["OFT", "BOFT"]), lycoris("boft"));
        assert_eq!(module(&["OFT"]), lycoris("diag-oft"));
        assert_eq!(module(&["DoRA"]), lycoris("lora"));
        assert_eq!(module(&["LoHa", "DoRA (LoCon)", "DoRA (LoHa)"]), lycoris("loha"));
        assert_eq!(module(&["(IA)^3"]), lycoris("ia3"));
    }

    #[test]
    fn the_base_is_guessed_unless_the_host_names_it() {
        let facts = |name: &str, shape: &[usize], options: &str| {
            let mut network = Network::new(Config::parse(options).unwrap()).unwrap();
            network.add_module(name, shape, Geometry::default()).unwrap();
            let all = network.metadata(&BTreeMap::new(), 0, None);
            ["ss_base_model_version", "ss_v2", "modelspec.architecture"]
                .map(|key| all.get(key).cloned().unwrap_or_default())
        };
        let diffusers = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k";
        let checkpoint = "input_blocks.4.1.transformer_blocks.0.attn2.to_k";
        for (name, shape, want) in [
            (diffusers, [320, 768], ["sd_v1", "False", "stable-diffusion-v1/lora"]),
            (diffusers, [320, 1024], ["sd_v2", "True", "stable-diffusion-v2-512/lora"]),
            (checkpoint, [640, 2048], ["sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"]),
            ("single_blocks.37.linear1", [21504, 3072], ["flux1", "False", "flux-1/lora"]),
            ("some.layer", [8, 8], ["", "", ""]),
        ] {
            assert_eq!(facts(name, &shape, ""), want, "{name}");
        }
        let named =
            |base: &str| facts(diffusers, &[320, 768], &format!("metadata.ss_base_model_version = '{base}'"));
        assert_eq!(named("sd_v2_v"), ["sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"]);
        assert_eq!(named("sdxl_"), ["sdxl_", "False", "stable-diffusion-xl-v1-base/lora"]);
        assert_eq!(named("new"), ["new", "False", ""]);
        let network = Network::new(
            Config::parse("metadata = {ss_session_id = '0', ss_steps = 'many', own = 'a'}").unwrap(),
        )
        .unwrap();
        let all = network.metadata(&BTreeMap::from([("own".to_owned(), "b".to_owned())]), 0, None);
        assert_eq!((&*all["own"], &*all["ss_steps"], &all[SESSION]), ("b", "many", &network.session.id));
    }

    #[test]
    fn a_session_is_told_by_its_time_and_options() {
        let session = Session::new("{}");
        assert!(session.id.parse::<u32>().is_ok() && session.started_at > 1_600_000_000);
        assert_ne!(session.id, Session::new("{ }").id);
    }
}
