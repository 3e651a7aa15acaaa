//! CLIP text encoders: the names of transformers (`text_model.encoder.layers.0.self_attn.q_proj`, which diffusers, kohya and Stable
//! Diffusion 1 share) and of OpenCLIP (`transformer.resblocks.0.attn.in_proj_weight`, in SD2 and as SDXL's second encoder).
//!
//! OpenCLIP keeps q, k and v in one weight, three blocks of rows one above the other.

use super::{rename, reversed};

/// Inside one layer: transformers, OpenCLIP.
const LAYER: &[(&str, &str)] = &[
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
];

/// Outside the layers.
const STEM: &[(&str, &str)] = &[
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
];

/// The fused projection's pieces, in the order of their rows.
const FUSED: [&str; 3] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];

/// What may follow a piece in transformers' layout, and how OpenCLIP writes the fused one; the first of each kind is the main spelling.
const FUSED_TAILS: &[(&str, &str)] = &[
    ("", "attn.in_proj_weight"),
    (".bias", "attn.in_proj_bias"),
    ("", "attn.in_proj"),
    (".bias", "attn.in_proj.bias"),
];

const LAYERS: (&str, &str) = ("text_model.encoder.layers.", "transformer.resblocks.");
const ROOT: &str = "text_model.";

/// OpenCLIP's names to transformers': one, or three pieces of the fused projection with their number.
pub fn to_transformers(path: &str) -> Vec<(String, Option<usize>)> {
    if let Some(name) = rename(path, reversed(STEM)) {
        return vec![(name, None)];
    }
    let Some((number, inner)) = layer(path, LAYERS.1) else {
        return vec![];
    };
    let whole = |inner: &str| format!("{}{number}.{inner}", LAYERS.0);
    if let Some((tail, _)) = FUSED_TAILS.iter().find(|(_, fused)| *fused == inner) {
        return FUSED
            .iter()
            .enumerate()
            .map(|(k, piece)| (whole(&format!("{piece}{tail}")), Some(k)))
            .collect();
    }
    rename(inner, reversed(LAYER)).map(|inner| (whole(&inner), None)).into_iter().collect()
}

/// Transformers' name to OpenCLIP's, with the number of the piece when OpenCLIP fuses it with others.
pub fn to_open_clip(path: &str) -> Option<(String, Option<usize>)> {
    if let Some(name) = rename(path, STEM.iter().copied()) {
        return Some((name, None));
    }
    let (number, inner) = layer(path, LAYERS.0)?;
    let whole = |inner: &str| format!("{}{number}.{inner}", LAYERS.1);
    for (k, piece) in FUSED.iter().enumerate() {
        if let Some(tail) = inner.strip_prefix(piece) {
            let (_, fused) = FUSED_TAILS.iter().find(|(t, _)| *t == tail)?;
            return Some((whole(fused), Some(k)));
        }
    }
    rename(inner, LAYER.iter().copied()).map(|inner| (whole(&inner), None))
}

/// Every other name of a target at `path`, with the number of the third of its rows that the name means (`None`: all of it).
pub(super) fn spellings(path: &str) -> Vec<(String, Option<usize>)> {
    let mut names = to_transformers(path);
    // A piece cannot stand for the fused weight: [`fused`] sees to that.
    names.extend(to_open_clip(path).filter(|(_, piece)| piece.is_none()));
    if path.starts_with("encoder.layers.") {
        // Some hosts hold the inner model, without `text_model.`.
        let inside = format!("{ROOT}{path}");
        names.extend(to_open_clip(&inside).filter(|(_, piece)| piece.is_none()));
        names.push((inside, None));
    }
    let short: Vec<_> = names
        .iter()
        .map(|(name, piece)| (name.as_str(), *piece))
        .chain([(path, None)])
        .filter_map(|(name, piece)| Some((name.strip_prefix(ROOT)?.to_owned(), piece)))
        .filter(|(name, _)| name != path)
        .collect();
    names.extend(short);
    names
}

/// OpenCLIP's weight that a projection of transformers is a third of, and which.
pub(super) fn fused(path: &str) -> Option<(String, usize)> {
    let found = match path.strip_prefix("encoder.layers.") {
        Some(_) => to_open_clip(&format!("{ROOT}{path}")),
        None => to_open_clip(path),
    };
    let (name, third) = found?;
    Some((name, third?))
}

/// OpenCLIP multiplies by its `text_projection` from the right: a bare parameter, the transpose of the layer of that name in
/// transformers. Only its full name reaches it, as an adapter of the layer would be merged along the wrong axes (it is square).
pub(super) fn is_transposed(target: &str) -> bool {
    target.ends_with(".model.text_projection")
}

/// Number and inner path of a layer; the number must be one.
fn layer<'a>(path: &'a str, root: &str) -> Option<(&'a str, &'a str)> {
    let (number, inner) = path.strip_prefix(root)?.split_once('.')?;
    number.bytes().all(|b| b.is_ascii_digit()).then_some((number, inner))
}

/// Names of the modules that kohya trains, in transformers' layout.
#[cfg(test)]
pub(super) fn trained_modules(layers: usize) -> Vec<String> {
    let inner = FUSED.into_iter().chain(["self_attn.out_proj", "mlp.fc1", "mlp.fc2"]);
    let inner: Vec<_> = inner.collect();
    (0..layers).flat_map(|n| inner.iter().map(move |m| format!("{}{n}.{m}", LAYERS.0))).collect()
}

/// Names of an OpenCLIP text encoder's weights and their rows.
#[cfg(test)]
pub(super) fn open_clip_weights(layers: usize, width: usize) -> Vec<(String, usize)> {
    let mut names =
        vec![("token_embedding.weight".to_owned(), 49408), ("positional_embedding".to_owned(), 77)];
    for n in 0..layers {
        let inner = [
            ("attn.in_proj_weight", 3),
            ("attn.in_proj_bias", 3),
            ("attn.out_proj.weight", 1),
            ("mlp.c_fc.weight", 4),
            ("mlp.c_proj.weight", 1),
            ("ln_1.weight", 1),
            ("ln_2.weight", 1),
        ];
        names.extend(inner.map(|(m, times)| (format!("{}{n}.{m}", LAYERS.1), times * width)));
    }
    names.extend([("ln_final.weight".to_owned(), width), ("text_projection".to_owned(), width)]);
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn layers_go_there_and_back() {
        let modules = trained_modules(32);
        assert_eq!(modules.len(), 192);
        assert_eq!(trained_modules(12).len(), 72);
        let mut seen = HashSet::new();
        for module in &modules {
            let (name, piece) = to_open_clip(module).unwrap();
            assert!(seen.insert((name.clone(), piece)), "{module}");
            assert!(to_transformers(&name).contains(&(module.clone(), piece)), "{module} -> {name}");
        }
        assert_eq!(seen.iter().map(|(name, _)| name).collect::<HashSet<_>>().len(), 32 * 4);
    }

    #[test]
    fn single_names() {
        let open = |s: &str| to_open_clip(s);
        let fused = ("transformer.resblocks.7.attn.in_proj_weight".to_owned(), Some(1));
        assert_eq!(open("text_model.encoder.layers.7.self_attn.k_proj"), Some(fused));
        let bias = ("transformer.resblocks.7.attn.in_proj_bias".to_owned(), Some(2));
        assert_eq!(open("text_model.encoder.layers.7.self_attn.v_proj.bias"), Some(bias));
        let fc = ("transformer.resblocks.0.mlp.c_fc.bias".to_owned(), None);
        assert_eq!(open("text_model.encoder.layers.0.mlp.fc1.bias"), Some(fc));
        assert_eq!(open("text_model.final_layer_norm"), Some(("ln_final".to_owned(), None)));
        assert_eq!(open("text_model.encoder.layers.x.mlp.fc1"), None);
        assert_eq!(open("text_model.encoder.layers.0.mlp.fc10"), None);
        assert_eq!(open("text_model.encoder.layers.0.self_attn.q_projection"), None);
        assert_eq!(to_transformers("transformer.resblocks.0.attn.in_proj").len(), 3);
        assert_eq!(to_transformers("transformer.resblocks.0.unknown"), vec![]);
    }

    #[test]
    fn the_inner_model_alone_is_known() {
        let names = spellings("encoder.layers.3.mlp.fc2");
        for name in ["text_model.encoder.layers.3.mlp.fc2", "transformer.resblocks.3.mlp.c_proj"] {
            assert!(names.contains(&(name.to_owned(), None)), "{name} in {names:?}");
        }
        let names = spellings("transformer.resblocks.3.attn.in_proj_weight");
        assert!(names.contains(&("encoder.layers.3.self_attn.v_proj".to_owned(), Some(2))), "{names:?}");
    }
}
