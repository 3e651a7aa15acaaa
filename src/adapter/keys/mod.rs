//! What a key of an adapter file says: which module it belongs to and which of the module's tensors it is.
//!
//! Three dialects are written: kohya (LyCORIS and ComfyUI write it too), PEFT (also what diffusers saves since it rests on PEFT) and
//! the older spellings of diffusers. [`split`] brings all of them to one `module` and one canonical `slot`, so that the rest of the
//! library knows only the kohya suffixes; [`join`] writes a pair back in a dialect. Module names are not translated between model
//! layouts here: that is `names`.

mod diffusers;
mod kohya;
mod peft;

/// How a file spells its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// `X.lora_up.weight`, `X.alpha`: sd-scripts, LyCORIS, ComfyUI.
    Kohya,
    /// `base_model.model.X.lora_A.weight`, or `unet.X.lora_A.weight` behind a component's name.
    Peft,
    /// `unet.X.lora.up.weight`, `X.lora_linear_layer.up.weight`, `….processor.to_q_lora.up.weight`.
    Diffusers,
    /// `X_norm.scale`: whole weights of norms in Black Forest Labs' control LoRAs, whose other keys are PEFT's.
    Bfl,
}

impl Dialect {
    /// The dialect's name in reports and options.
    pub fn name(self) -> &'static str {
        match self {
            Dialect::Kohya => "kohya",
            Dialect::Peft => "peft",
            Dialect::Diffusers => "diffusers",
            Dialect::Bfl => "bfl",
        }
    }
}

/// A key taken apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Split {
    /// How the key was spelled. Suffixes that several dialects share (`alpha`) count as kohya unless the prefix says otherwise.
    pub dialect: Dialect,
    /// The module, the same for every spelling of it: without `base_model.model.`, without attention processors. Empty for a tensor that stands
    /// once in a file for all modules (VeRA's projections).
    pub module: String,
    /// The canonical suffix, one of the kohya / LyCORIS names whatever the dialect.
    pub slot: &'static str,
}

/// One suffix that some trainer writes.
struct Slot {
    name: &'static str,
    /// The algorithm that the suffix gives away.
    algorithm: Option<&'static str>,
    /// PEFT's word for it.
    peft: Option<&'static str>,
}

const fn slot(name: &'static str, algorithm: Option<&'static str>, peft: Option<&'static str>) -> Slot {
    Slot { name, algorithm, peft }
}

const LORA: Option<&str> = Some("LoRA");
const LOHA: Option<&str> = Some("LoHa");
const LOKR: Option<&str> = Some("LoKr");
const GLORA: Option<&str> = Some("GLoRA");
const OFT: Option<&str> = Some("OFT/BOFT");
const IA3: Option<&str> = Some("IA3");
const TLORA: Option<&str> = Some("T-LoRA");
const VERA: Option<&str> = Some("VeRA");
const FULL: Option<&str> = Some("full difference");
const NORM: Option<&str> = Some("norm difference");

/// Every suffix known, mergeable or not: a report can then name the algorithm that it cannot merge.
const SLOTS: &[Slot] = &[
    slot("lora_up.weight", LORA, Some("lora_B.weight")),
    slot("lora_down.weight", LORA, Some("lora_A.weight")),
    slot("lora_mid.weight", LORA, None),
    slot("lora_up.bias", LORA, Some("lora_B.bias")),
    slot("alpha", None, Some("alpha")),
    slot("dora_scale", Some("DoRA"), None),
    slot("lora_magnitude_vector", Some("DoRA"), Some("lora_magnitude_vector")),
    slot("hada_w1_a", LOHA, Some("hada_w1_a")),
    slot("hada_w1_b", LOHA, Some("hada_w1_b")),
    slot("hada_w2_a", LOHA, Some("hada_w2_a")),
    slot("hada_w2_b", LOHA, Some("hada_w2_b")),
    slot("hada_t1", LOHA, Some("hada_t1")),
    slot("hada_t2", LOHA, Some("hada_t2")),
    slot("lokr_w1", LOKR, Some("lokr_w1")),
    slot("lokr_w1_a", LOKR, Some("lokr_w1_a")),
    slot("lokr_w1_b", LOKR, Some("lokr_w1_b")),
    slot("lokr_w2", LOKR, Some("lokr_w2")),
    slot("lokr_w2_a", LOKR, Some("lokr_w2_a")),
    slot("lokr_w2_b", LOKR, Some("lokr_w2_b")),
    slot("lokr_t2", LOKR, Some("lokr_t2")),
    slot("diff", FULL, None),
    slot("diff_b", FULL, None),
    slot("w_norm", NORM, None),
    slot("b_norm", NORM, None),
    slot("on_input", IA3, None),
    slot("weight", IA3, None),
    slot("a1.weight", GLORA, None),
    slot("a2.weight", GLORA, None),
    slot("b1.weight", GLORA, None),
    slot("b2.weight", GLORA, None),
    slot("bm.weight", GLORA, None),
    slot("oft_blocks", OFT, None),
    slot("oft_blocks.0", OFT, None),
    slot("oft_blocks.1", OFT, None),
    slot("oft_blocks.2", OFT, None),
    slot("oft_blocks.3", OFT, None),
    slot("oft_diag", OFT, None),
    slot("rescale", OFT, None),
    slot("q_layer.weight", TLORA, None),
    slot("p_layer.weight", TLORA, None),
    slot("lambda_layer", TLORA, None),
    slot("scalar", None, None),
    slot("scale", None, None),
    slot("bias", None, None),
    slot("bias_indices", Some("sparse bias"), None),
    slot("bias_values", Some("sparse bias"), None),
    slot("bias_size", Some("sparse bias"), None),
    slot("reshape_weight", Some("weight reshape"), None),
    slot("set_weight", Some("weight replacement"), None),
    // PEFT's own methods: they have no kohya name, so theirs stands for both.
    slot("lora_embedding_A", Some("embedding LoRA"), Some("lora_embedding_A")),
    slot("lora_embedding_B", Some("embedding LoRA"), Some("lora_embedding_B")),
    slot("ia3_l", IA3, Some("ia3_l")),
    slot("oft_r", OFT, Some("oft_r")),
    slot("oft_s", OFT, Some("oft_s")),
    slot("oft_R.weight", OFT, Some("oft_R.weight")),
    slot("boft_R", OFT, Some("boft_R")),
    slot("boft_s", OFT, Some("boft_s")),
    slot("vera_lambda_b", VERA, Some("vera_lambda_b")),
    slot("vera_lambda_d", VERA, Some("vera_lambda_d")),
    slot("vera_A", VERA, Some("vera_A")),
    slot("vera_B", VERA, Some("vera_B")),
];

fn find(name: &str) -> Option<&'static Slot> {
    SLOTS.iter().find(|s| s.name == name)
}

/// PEFT's wrapper around the model; says nothing about the module.
const PEFT_ROOT: &str = "base_model.model.";

/// Components of a pipeline that name a dotted module's model; PEFT's root is left out in front of them.
const COMPONENTS: &[&str] = &[
    "unet.",
    "transformer.",
    "transformer_2.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "diffusion_model.",
    "model.diffusion_model.",
];

fn component(module: &str) -> &str {
    COMPONENTS.iter().find(|c| module.starts_with(**c)).copied().unwrap_or("")
}

/// How flattened names begin.
const FLATTENED: &[&str] =
    &["lora_unet_", "lora_te", "lora_transformer_", "lora_prior_", "lycoris_", "oft_unet_"];

/// Whether `module` is a kohya name, whose dots cannot be told from its underscores any more.
fn is_flattened(module: &str) -> bool {
    !module.contains('.') && FLATTENED.iter().any(|p| module.starts_with(p))
}

/// What a CLIP layer's projections are called, and what diffusers' attention processors called them.
const CLIP_PROJECTIONS: &[(&str, &str)] =
    &[("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")];

/// The module behind PEFT's root and behind an attention processor. `processor`: the key is spelled the processors' way.
fn resolve_module(module: &str, processor: bool) -> String {
    let head = component(module);
    let rest = &module[head.len()..];
    let rest = rest.strip_prefix(PEFT_ROOT).unwrap_or(rest);
    let Some((parent, leaf)) = rest.rsplit_once('.') else {
        return format!("{head}{rest}");
    };
    let (parent, processor) = match parent.strip_suffix(".processor") {
        Some(attention) => (attention, true),
        None => (parent, processor),
    };
    let in_clip = parent == "self_attn" || parent.ends_with(".self_attn");
    let leaf = match CLIP_PROJECTIONS.iter().find(|(_, old)| *old == leaf) {
        Some((projection, _)) if processor && in_clip => projection,
        // The second entry of `to_out` is the dropout; an attention's added stream (`to_add_out`) is a bare layer.
        _ if processor && leaf == "to_out" => "to_out.0",
        _ => leaf,
    };
    format!("{head}{parent}.{leaf}")
}

/// Takes a key apart; `None` when no suffix of an adapter ends it.
pub fn split(key: &str) -> Option<Split> {
    // A flattened name has no other dialect to be written in, whatever stands behind it (`lora_unet_….lora_A.weight` exists).
    let of = |dialect, module| if is_flattened(module) { Dialect::Kohya } else { dialect };
    if let Some((module, slot)) = diffusers::split_xlabs(key) {
        return Some(Split { dialect: Dialect::Diffusers, module: module.to_owned(), slot });
    }
    if let Some((module, slot, processor)) = diffusers::split(key) {
        let dialect = of(Dialect::Diffusers, module);
        return Some(Split { dialect, module: resolve_module(module, processor), slot });
    }
    if let Some((module, slot)) = peft::split(key) {
        if module == peft::FILE {
            return Some(Split { dialect: Dialect::Peft, module: String::new(), slot });
        }
        return Some(Split {
            dialect: of(Dialect::Peft, module),
            module: resolve_module(module, false),
            slot,
        });
    }
    let (module, slot) = kohya::split(key)?;
    // Suffixes spelled alike in both dialects: the root tells.
    let rooted = module.starts_with(PEFT_ROOT) && find(slot).is_some_and(|s| s.peft == Some(slot));
    let dialect = if rooted { Dialect::Peft } else { Dialect::Kohya };
    Some(Split { dialect, module: resolve_module(module, false), slot })
}

/// How `dialect` writes the tensor; `None` when it has no word for the slot, or for a module whose dots are lost (`lora_unet_…`
/// in a dotted dialect; translate the name first). Inverse of [`split`] for the main spelling of every dialect.
pub fn join(dialect: Dialect, module: &str, slot: &str) -> Option<String> {
    find(slot)?;
    match dialect {
        Dialect::Kohya => Some(kohya::join(module, slot)),
        Dialect::Peft => peft::join(module, slot),
        Dialect::Diffusers => diffusers::join(module, slot),
        Dialect::Bfl => (slot == SET).then(|| module.to_owned()),
    }
}

const SET: &str = "set_weight";

/// Whether these are the keys of one of Black Forest Labs' control LoRAs: PEFT's, and whole weights of norms among them. Their layers'
/// weights may have to grow to the modules' size (`img_in` gets channels for the control image).
pub fn is_control<'k>(keys: impl Iterator<Item = &'k str> + Clone) -> bool {
    keys.clone().any(|key| key.ends_with(NORM_SCALE))
        && keys.clone().any(|key| key.ends_with(".lora_A.weight"))
}

/// How a norm's weight ends there.
const NORM_SCALE: &str = "_norm.scale";

/// A key that [`split`] does not know, in a file that [`is_control`].
pub fn split_control(key: &str) -> Option<Split> {
    let split = |()| Split { dialect: Dialect::Bfl, module: key.to_owned(), slot: SET };
    key.ends_with(NORM_SCALE).then_some(()).map(split)
}

/// The algorithm that a slot gives away; `None` for slots that several share (`alpha`) and for unknown ones.
pub fn algorithm_of(slot: &str) -> Option<&'static str> {
    find(slot)?.algorithm
}

#[cfg(test)]
mod tests;
