//! The options of a module: algorithm, rank, what belongs to the algorithm, dropout, learning rate. One set for all modules, and changes of
//! it for those whose names match a pattern (`name_algo_map`, LyCORIS's word).

use super::config::{key, Key};
use super::reader::{unknown_keys, Reader};
use crate::algo::draw::Dropout;
use crate::algo::training::{family, inside, Begin, Layer, Rule, Spectrum};
use crate::algo::TRAINED;
use crate::merge::plan::glob;
use serde_json::{json, Map, Value};
use std::collections::BTreeSet;

/// The documented options, in the order of the documentation.
pub(super) static KEYS: &[Key] = &[
    key("algo", "\"lora\"", "algorithm, by one of the names below; none: no module for this layer"),
    key("network_dim", "16", "rank of Linear layers and 1x1 convolutions; diag-oft: size of the blocks, boft: at most"),
    key(
        "network_alpha",
        "network_dim",
        "the output is scaled by network_alpha / network_dim; 0 means network_dim",
    ),
    key("conv_dim", "network_dim", "rank of convolutions with a larger kernel"),
    key("conv_alpha", "the same scale as network_alpha", "as network_alpha, for conv_dim"),
    key("rs_lora", "false", "scale by network_alpha / sqrt(network_dim) instead"),
    key("use_tucker", "false", "lora, loha, lokr: a Tucker core for convolutions with a larger kernel"),
    key("factor", "-1", "lokr: size of the smaller factor; -1: as square as can be"),
    key("full_matrix", "false", "lokr: both factors whole, whatever network_dim is"),
    key("decompose_both", "false", "lokr: the smaller factor too as a product of thin matrices"),
    key("unbalanced_factorization", "false", "lokr: the smaller factor has the larger share of the outputs"),
    key("block_size", "1", "dylora: ranks that are trained together; divides the rank"),
    key("nested", "false", "dylora: true trains the ranks below the drawn block with it (the paper), false leaves them (sd-scripts)"),
    key("constraint", "0", "diag-oft, boft: bound of the rotation's norm, times the number of outputs; 0 is off"),
    key("rescaled", "false", "diag-oft, boft: one factor per output channel beside the rotation"),
    key("train_on_input", "false", "ia3: scales input channels, else outputs"),
    key("dora_wd", "false", "lora, loha, lokr: length and direction of the weights are trained apart (DoRA)"),
    key("wd_on_output", "true", "dora_wd: one length per output channel, else per input channel"),
    key("sig_type", "\"principal\"", "tlora: the singular vectors it starts from: principal, last, middle"),
    key(
        "network_dropout",
        "0",
        "share of values left out in training: behind the down factor of lora, of the output of others",
    ),
    key("rank_dropout", "0", "share of ranks left out, per sample (lora), or of rows of the change (others)"),
    key("module_dropout", "0", "how often a whole module is left out"),
    key("train_norm", "false", "norm layers too get a module, of algo norm: a change of their weight and bias"),
    key("lr_weight", "1", "factor of the learning rate"),
];

/// Those of one set of modules.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ModuleOptions {
    /// `None`: no module.
    algo: Option<&'static str>,
    pub(super) rule: Rule,
    pub(super) conv_dim: usize,
    pub(super) conv_alpha: f64,
    rs_lora: bool,
    train_norm: bool,
    dropout: Dropout,
    lr_weight: f64,
}

/// What an adapter file says about a module.
#[derive(Clone, Debug)]
pub(super) struct Known {
    /// As `Algorithm::name`.
    pub(super) algorithm: &'static str,
    pub(super) rank: Option<usize>,
    pub(super) alpha: Option<f64>,
}

/// What one layer gets.
pub(super) struct Chosen {
    pub(super) begin: &'static Begin,
    pub(super) rule: Rule,
    pub(super) dropout: Dropout,
    pub(super) rate: f64,
}

const SPECTRA: [(&str, Spectrum); 3] =
    [("principal", Spectrum::Principal), ("last", Spectrum::Last), ("middle", Spectrum::Middle)];
/// Those that a norm of weights can go around.
const DECOMPOSED: [&str; 3] = ["lora", "loha", "lokr"];

impl Chosen {
    /// The same with algorithm, rank and alpha of a file.
    pub(super) fn known(self, known: &Known) -> Self {
        let inner = inside(known.algorithm);
        let name = inner.unwrap_or(known.algorithm).to_lowercase();
        // Those that write plain LoRAs stay what they are.
        let plain = ["lora-fa", "dylora"].contains(&self.begin.names[0]) && family(known.algorithm) == "LoRA";
        let named = TRAINED.iter().find(|begin| begin.names.contains(&name.as_str())).filter(|_| !plain);
        let begin = named.unwrap_or(self.begin);
        let dim = known.rank.unwrap_or(self.rule.dim);
        let alpha = match known.alpha {
            // A missing or zero alpha means the rank.
            None | Some(0.0) => dim as f64,
            Some(alpha) => alpha,
        };
        let decompose = inner.map(|_| self.rule.decompose.unwrap_or(true));
        Chosen { begin, rule: Rule { dim, alpha, decompose, ..self.rule }, ..self }
    }
}

impl ModuleOptions {
    pub(super) fn read(read: &mut Reader) -> Self {
        const RANKS: (u64, u64) = (1, 1 << 16);
        let names = TRAINED.iter().flat_map(|b| b.names.iter().map(|name| (*name, Some(b.names[0]))));
        let choices: Vec<_> = names.chain([("none", None)]).collect();
        let algo = read.choice("algo", &choices).unwrap_or(Some("lora"));
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
        let block_size = read.whole("block_size", RANKS).unwrap_or(1);
        if algo == Some("dylora") && (network_dim % block_size != 0 || conv_dim % block_size != 0) {
            let prefix = read.prefix;
            read.problem(format!(
                "`{prefix}block_size` is {block_size}, it must divide network_dim {network_dim} and conv_dim {conv_dim}"
            ));
        }
        let factor = match read.get("factor") {
            Some(value) if value.as_i64() == Some(-1) => -1,
            Some(_) => read.whole("factor", RANKS).map_or(-1, |f| f as i64),
            None => -1,
        };
        let dora = read.flag("dora_wd").unwrap_or(false);
        if let Some(name) = algo.filter(|algo| dora && !DECOMPOSED.contains(algo)) {
            let prefix = read.prefix;
            read.problem(format!(
                "`{prefix}dora_wd` goes with {}, not with algo {name}",
                DECOMPOSED.join(", ")
            ));
        }
        let on_output = read.flag("wd_on_output").unwrap_or(true);
        let mut share = |name| read.below_one(name).unwrap_or(0.0);
        let dropout = Dropout {
            values: share("network_dropout"),
            ranks: share("rank_dropout"),
            modules: share("module_dropout"),
        };
        let rule = Rule {
            dim: network_dim as usize,
            alpha: network_alpha,
            tucker: read.flag("use_tucker").unwrap_or(false),
            factor,
            full_matrix: read.flag("full_matrix").unwrap_or(false),
            decompose_both: read.flag("decompose_both").unwrap_or(false),
            unbalanced_factorization: read.flag("unbalanced_factorization").unwrap_or(false),
            block_size: block_size as usize,
            nested: read.flag("nested").unwrap_or(false),
            constraint: read.number("constraint", 0.0).unwrap_or(0.0),
            rescaled: read.flag("rescaled").unwrap_or(false),
            train_on_input: read.flag("train_on_input").unwrap_or(false),
            decompose: dora.then_some(on_output),
            sig_type: read.choice("sig_type", &SPECTRA).unwrap_or(Spectrum::Principal),
        };
        ModuleOptions {
            algo,
            rule,
            conv_dim: conv_dim as usize,
            conv_alpha,
            rs_lora: read.flag("rs_lora").unwrap_or(false),
            train_norm: read.flag("train_norm").unwrap_or(false),
            dropout,
            lr_weight: read.number("lr_weight", 0.0).unwrap_or(1.0),
        }
    }

    /// What a layer gets; `None`: no module.
    pub(super) fn choose(&self, layer: &Layer) -> Option<Chosen> {
        let mut rule = self.rule.clone();
        if layer.large_kernel() {
            (rule.dim, rule.alpha) = (self.conv_dim, self.conv_alpha);
        }
        if self.rs_lora {
            // alpha / rank in a file is then the same scale.
            rule.alpha *= (rule.dim as f64).sqrt();
        }
        // The only algorithm of norm layers, and of no others.
        let norm = "norm";
        let algo = self.algo.map(|algo| if layer.is_norm() && self.train_norm { norm } else { algo })?;
        if layer.is_norm() != (algo == norm) {
            return None;
        }
        let begin = TRAINED.iter().find(|begin| begin.names[0] == algo)?;
        Some(Chosen { begin, rule, dropout: self.dropout, rate: self.lr_weight })
    }

    /// The resolved options; reading them again gives an equal set.
    pub(super) fn write(&self, json: &mut Map<String, Value>) {
        let rule = &self.rule;
        let spectrum = SPECTRA.iter().find(|(_, s)| *s == rule.sig_type).map(|(name, _)| *name);
        let values = [
            ("algo", json!(self.algo.unwrap_or("none"))),
            ("network_dim", json!(rule.dim)),
            ("network_alpha", json!(rule.alpha)),
            ("conv_dim", json!(self.conv_dim)),
            ("conv_alpha", json!(self.conv_alpha)),
            ("rs_lora", json!(self.rs_lora)),
            ("train_norm", json!(self.train_norm)),
            ("use_tucker", json!(rule.tucker)),
            ("factor", json!(rule.factor)),
            ("full_matrix", json!(rule.full_matrix)),
            ("decompose_both", json!(rule.decompose_both)),
            ("unbalanced_factorization", json!(rule.unbalanced_factorization)),
            ("block_size", json!(rule.block_size)),
            ("nested", json!(rule.nested)),
            ("constraint", json!(rule.constraint)),
            ("rescaled", json!(rule.rescaled)),
            ("train_on_input", json!(rule.train_on_input)),
            ("dora_wd", json!(rule.decompose.is_some())),
            ("wd_on_output", json!(rule.decompose.unwrap_or(true))),
            ("sig_type", json!(spectrum)),
            ("network_dropout", json!(self.dropout.values)),
            ("rank_dropout", json!(self.dropout.ranks)),
            ("module_dropout", json!(self.dropout.modules)),
            ("lr_weight", json!(self.lr_weight)),
        ];
        json.extend(values.map(|(name, value)| (name.to_owned(), value)));
    }
}

/// The options of every module of a network.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Modules {
    pub(super) all: ModuleOptions,
    /// (pattern, options), the pattern that says most first.
    some: Vec<(String, ModuleOptions)>,
}

/// The object of changes by pattern.
pub(super) const MAP: &str = "name_algo_map";

impl Modules {
    pub(super) fn read(read: &mut Reader) -> Self {
        let all = ModuleOptions::read(read);
        let known: Vec<&str> = KEYS.iter().map(|k| k.name).collect();
        let map = read.object(MAP).cloned().unwrap_or_default();
        let mut some = Vec::new();
        for (pattern, changes) in &map {
            let prefix = format!("{MAP}.{pattern}.");
            let Some(changes) = changes.as_object() else {
                read.problem(format!("`{MAP}.{pattern}` is {changes}, expected an object of options"));
                continue;
            };
            unknown_keys(changes, &prefix, &known, read.problems);
            let given = read.map.iter().filter(|(name, _)| known.contains(&name.as_str()));
            let mut both: Map<String, Value> =
                given.map(|(name, value)| (name.clone(), value.clone())).collect();
            both.extend(changes.iter().map(|(name, value)| (name.clone(), value.clone())));
            let before = read.problems.len();
            let mut inner = Reader { map: &both, prefix: &prefix, problems: &mut *read.problems };
            some.push((pattern.clone(), ModuleOptions::read(&mut inner)));
            // What is wrong for all has been told.
            let mut told = read.problems.split_off(before);
            told.retain(|problem| !read.problems.contains(&problem.replace(&prefix, "")));
            read.problems.append(&mut told);
        }
        // The longest pattern says most; of equal ones the first in the alphabet.
        some.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.0.cmp(&b.0)));
        Modules { all, some }
    }

    /// The options of a module by its names, the host's and the file's.
    pub(super) fn of(&self, names: [&str; 2]) -> &ModuleOptions {
        let matching = self.some.iter().find(|(pattern, _)| names.iter().any(|name| glob(pattern, name)));
        matching.map_or(&self.all, |(_, options)| options)
    }

    /// The option `name`: ranks to which whole adapters can be cut. Of DyLoRA alone every prefix of the ranks is an adapter; T-LoRA's are
    /// for noisy timesteps.
    pub(super) fn ranks(&self, read: &mut Reader, name: &str) -> Vec<usize> {
        let Some(value) = read.get(name) else { return Vec::new() };
        let some = self.some.iter().map(|(pattern, options)| (format!("{MAP}.{pattern}."), options));
        let sets: Vec<_> = [(String::new(), &self.all)].into_iter().chain(some).collect();
        let largest = |options: &ModuleOptions| options.rule.dim.max(options.conv_dim);
        let most = sets.iter().map(|(_, options)| largest(options)).max().unwrap_or(1);
        let ranks: Option<Vec<usize>> = serde_json::from_value(value.clone()).ok();
        let fine = |ranks: &Vec<usize>| {
            ranks.iter().all(|rank| (1..most).contains(rank))
                && ranks.iter().collect::<BTreeSet<_>>().len() == ranks.len()
        };
        let Some(ranks) = ranks.filter(fine) else {
            read.wrong(
                name,
                value,
                &format!("a list of different ranks from 1 to below that of modules, {most}"),
            );
            return Vec::new();
        };
        for (prefix, options) in sets.iter().filter(|_| !ranks.is_empty()) {
            let block = options.rule.block_size;
            let between = ranks.iter().find(|&rank| *rank < largest(options) && rank % block != 0);
            let problem = match (options.algo, between) {
                (Some("dylora"), Some(rank)) => format!("`{name}` has {rank}, no multiple of `{prefix}block_size`, {block}"),
                (Some("dylora"), None) | (None, _) => continue,
                (Some(other), _) => format!("`{name}` needs algo dylora, which trains the first ranks to work without the others; `{prefix}algo` is {other}"),
            };
            // What is wrong for all has been told.
            if !read.problems.contains(&problem.replace(prefix, "")) {
                read.problem(problem);
            }
        }
        ranks
    }

    /// Whether any module leaves something out by chance, or chooses.
    pub(super) fn random(&self) -> bool {
        let all = self.some.iter().map(|(_, options)| options).chain([&self.all]);
        all.into_iter().any(|options| options.dropout.any() || options.algo == Some("dylora"))
    }

    pub(super) fn write(&self, json: &mut Map<String, Value>) {
        self.all.write(json);
        // Complete, so that nothing follows from `all` a second time.
        let complete = |options: &ModuleOptions| {
            let mut json = Map::new();
            options.write(&mut json);
            Value::Object(json)
        };
        let map = self.some.iter().map(|(pattern, options)| (pattern.clone(), complete(options)));
        json.insert(MAP.into(), Value::Object(map.collect()));
    }
}
