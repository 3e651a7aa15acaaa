//! Several adapters as one file: `dW = sum of w_i * dW_i`, module by module, whatever their algorithms.
//!
//! | method | a module's result |
//! |---|---|
//! | concat | exact: the factors of all, one behind the other; the whole difference (in fp32) where that is smaller |
//! | svd | the exact sum, cut to the nearest matrix of `rank` |
//! | linear | PEFT's: `sum sqrt(w_i s_i) up_i` times `sum sqrt(w_i s_i) down_i`, of equal ranks. Not the sum: the cross terms come with it |
//! | magnitude_prune, dare, ties | `sparse` on whole matrices, then cut to `rank`; without `rank` the whole difference is written |
//!
//! The scale of a concatenation: with `c_i = w_i * alpha_i / rank_i` and m the largest `|c_i|`, up_i is multiplied by `c_i / m` and alpha is m times the
//! sum of the ranks. So no value grows, the strongest part keeps its bits, and one adapter alone, or several of equal `|c_i|`, keep all of
//! them: only signs and alpha change. Where hosts may not read an alpha (PEFT, diffusers), m goes into up and alpha is the rank. Biases and norms
//! are summed exactly by every method. What reads its weight (DoRA, OFT, IA3, ..) can be copied but neither scaled nor added.

use super::matching::{layers, Member};
use super::options::Reader;
use super::recipe::Recipe;
use super::sheet;
use super::source::Source;
use super::sparse::Sparse;
use crate::adapter::safetensors::Writer;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::progress::Progress;
use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// How to combine.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The method.
    pub method: Method,
    /// The rank of results that are cut.
    pub rank: Option<usize>,
    /// The same for convolutions; `None`: as `rank`.
    pub conv_rank: Option<usize>,
    /// The share of elements that sparse methods keep.
    pub density: f64,
    /// Of DARE's draws.
    pub seed: u64,
    /// Of the new tensors; `None`: that of the parts, fp32 where they differ.
    pub dtype: Option<Float>,
}

/// A way of combining.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The exact sum.
    Concat,
    /// The sum, cut to a rank.
    Svd,
    /// The product of the sums of the factors.
    Linear,
    /// On whole matrices.
    Sparse(Sparse),
}

const METHODS: [(&str, Method); 6] = [
    ("concat", Method::Concat),
    ("svd", Method::Svd),
    ("linear", Method::Linear),
    ("ties", Method::Sparse(Sparse::Ties)),
    ("dare", Method::Sparse(Sparse::Dare)),
    ("magnitude_prune", Method::Sparse(Sparse::Prune)),
];

const KEYS: &[&str] = &["method", "rank", "conv_rank", "density", "seed", "dtype"];

impl Method {
    /// Its name in options and reports.
    pub fn name(self) -> &'static str {
        METHODS.iter().find(|(_, method)| *method == self).map_or("", |(name, _)| name)
    }
}

impl Options {
    /// Reads the JSON of the C ABI.
    pub fn parse(text: &str) -> Result<Self> {
        let mut read = Reader::new(text, KEYS)?;
        let method = read.choice("method", &METHODS).unwrap_or(Method::Concat);
        let (rank, conv_rank, seed) = (read.rank("rank"), read.rank("conv_rank"), read.whole("seed"));
        let density = read.number("density", 0.0, 1.0);
        let name = method.name();
        let exact = matches!(method, Method::Concat | Method::Linear);
        for key in ["rank", "conv_rank"].into_iter().filter(|key| exact && read.has(key)).collect::<Vec<_>>()
        {
            read.problem(format!(
                "`{key}` has no meaning with method {name}: the ranks follow from the parts'"
            ));
        }
        if method == Method::Svd && !read.has("rank") {
            read.problem("`rank` is missing: method svd needs it");
        }
        if !read.has("rank") && read.has("conv_rank") && !exact {
            read.problem("`conv_rank` needs `rank`");
        }
        match (method, read.has("density")) {
            (Method::Sparse(_), false) => {
                read.problem(format!("`density` is missing: method {name} needs it"))
            }
            (Method::Concat | Method::Svd | Method::Linear, true) => {
                read.problem(format!("`density` has no meaning with method {name}"));
            }
            _ => {}
        }
        let dtype = read.dtype();
        let (density, seed) = (density.unwrap_or(1.0), seed.unwrap_or(0));
        read.finish(Options { method, rank, conv_rank, density, seed, dtype })
    }

    /// The rank to cut a module to.
    pub(super) fn limit(&self, conv: bool) -> Option<usize> {
        self.conv_rank.filter(|_| conv).or(self.rank)
    }
}

/// Writes the weighted sum of adapter files to `output`, which appears whole or not at all and may be one of them. Progress counts modules.
///
/// The file is streamed: memory is bounded by a few modules.
pub fn combine(
    inputs: &[(&Path, f64)],
    output: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Value> {
    if let Some((path, weight)) = inputs.iter().find(|(_, weight)| !weight.is_finite()) {
        let what = format!("the weight of {} is {weight}", path.display());
        return Err(Error::argument(what, "weights are finite numbers; 1 is the usual one"));
    }
    if inputs.iter().all(|(_, weight)| *weight == 0.0) {
        let what = format!("nothing to combine: {} files, none with a weight other than 0", inputs.len());
        return Err(Error::argument(what, "pass at least one file with its weight"));
    }
    let sources =
        inputs.iter().map(|(path, weight)| Ok((Source::open(path)?, *weight))).collect::<Result<Vec<_>>>()?;
    let layers = layers(&sources)?;
    let alone = match &sources[..] {
        [(source, 1.0)] => Some(source).filter(|s| options.method == Method::Concat && s.is_self_contained()),
        _ => None,
    };
    let mut entries = Vec::with_capacity(layers.len());
    if let Some(source) = alone.filter(|_| options.dtype.is_none()) {
        progress.at(0, layers.len() as u64)?;
        source.copy(output)?;
        entries.extend(
            layers.iter().map(|layer| json!({"module": layer[0].module.name, "from": [0], "form": "copied"})),
        );
        progress.at(layers.len() as u64, layers.len() as u64)?;
    } else {
        let recipes = layers.iter().map(|layer| Recipe::plan(layer, options)).collect::<Result<Vec<_>>>()?;
        let layout: Vec<_> = recipes.iter().flat_map(|recipe| recipe.layout.clone()).collect();
        let mut writer = Writer::create(output, &layout, &metadata(&sources, &recipes, options))?;
        super::each(
            &recipes,
            progress,
            |recipe| recipe.make(options),
            |recipe, (parts, entry)| {
                if parts.iter().map(sheet::Part::row).ne(recipe.layout.iter().cloned()) {
                    return Err(Error::Backend(format!("`{}`: the result is not as planned", recipe.name())));
                }
                parts.iter().try_for_each(|part| writer.write(part.bytes()?))?;
                for Member { source, module, .. } in recipe.members() {
                    source.group(&module.name).into_iter().for_each(|group| source.release(group));
                }
                entries.push(entry);
                Ok(())
            },
        )?;
        writer.finish()?;
    }
    let sizes: Vec<Value> = sources
        .iter()
        .map(|(source, weight)| {
            let left_out = match alone {
                Some(_) => Vec::new(),
                None => source.unused_keys(),
            };
            json!({"file": source.adapter.path().display().to_string(), "weight": weight, "bytes": source.len(),
                "modules": source.adapter.modules().len(), "left_out": left_out})
        })
        .collect();
    let shared = layers.iter().filter(|layer| layer.len() > 1).count();
    Ok(json!({
        "output": output.display().to_string(),
        "method": options.method.name(),
        "bytes": std::fs::metadata(output).map_err(|e| Error::io(output, e))?.len(),
        "summary": {"modules": layers.len(), "shared": shared},
        "sources": sizes,
        "modules": entries,
    }))
}

/// What all files say alike, and how this one was made.
fn metadata(
    sources: &[(Source, f64)],
    recipes: &[Recipe<'_>],
    options: &Options,
) -> BTreeMap<String, String> {
    let mut alike = sources.first().map(|(s, _)| s.adapter.metadata().clone()).unwrap_or_default();
    alike.retain(|key, value| sources.iter().all(|(s, _)| s.adapter.metadata().get(key) == Some(value)));
    // Every alpha stands in the file now.
    alike.remove("lora_adapter_metadata");
    let mut ranks = recipes.iter().filter_map(Recipe::rank);
    let first = ranks.next();
    let text = match first.filter(|first| ranks.all(|rank| rank == *first)) {
        Some(rank) => rank.to_string(),
        None => "Dynamic".into(),
    };
    let files: Vec<Value> = sources
        .iter()
        .map(|(s, weight)| json!({"adapter": s.adapter.path().file_name().map(|n| n.to_string_lossy()), "weight": weight}))
        .collect();
    let how = json!({"method": options.method.name(), "parts": files});
    sheet::metadata(&alike, Some((text, "Dynamic".into())), ("lycore.combined", how))
}
