//! Which model of a pipeline a name belongs to, told by its prefix. Hosts' names and adapters' modules share the one table.

use super::Part;

/// One model of a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// The diffusion model.
    Unet,
    /// `lora_te_…`: the only text encoder, or the first.
    AnyEncoder,
    /// CLIP-L; of Stable Diffusion 1 and 2 the only encoder.
    Encoder1,
    /// OpenCLIP bigG.
    Encoder2,
    /// The third one.
    Encoder3,
    /// T5 stands third in SD3, second in Flux.
    T5,
    /// An encoder's path without a prefix: of a target it means the first, of a module any.
    LoneEncoder,
    /// ComfyUI's `<name>.transformer.…` of an encoder that is not in the table.
    OtherEncoder,
    /// Answers to its full name only, such as the VAE, whose names are like a U-Net's.
    Foreign,
    /// No prefix: of a target it means the diffusion model, of a module any model.
    Bare,
}

/// How many lists of spellings there are: one per model that a prefix can ask for.
pub(super) const SLOTS: usize = 5;
pub(super) const UNET: usize = 0;
const ANY: usize = 1;
const FIRST: usize = 2;
const SECOND: usize = 3;
const THIRD: usize = 4;

/// A name taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// Whose it is.
    pub scope: Scope,
    /// The path inside that model.
    pub rest: &'a str,
}

impl Place<'_> {
    /// A module of the diffusion model. Without a prefix the path has to tell, also a flattened one.
    pub(super) fn is_of_unet(&self) -> bool {
        let text = ["text_model", "encoder_layers", "encoder.layers"];
        self.scope.is_unet() && !text.iter().any(|begin| self.rest.starts_with(begin))
    }
}

/// What a name begins with, how much of that is prefix, and whose it is. The longest beginning wins.
#[rustfmt::skip]
const PREFIXES: &[(&str, &str, Scope)] = &[
    ("lora_unet_", "lora_unet_", Scope::Unet),
    // The Wan-Fun trainer doubles the underscore.
    ("lora_unet__", "lora_unet__", Scope::Unet),
    ("lora_prior_unet_", "lora_prior_unet_", Scope::Unet),
    ("lora_transformer_", "lora_transformer_", Scope::Unet),
    ("oft_unet_", "oft_unet_", Scope::Unet),
    ("lora_te_", "lora_te_", Scope::AnyEncoder),
    ("lora_prior_te_", "lora_prior_te_", Scope::AnyEncoder),
    ("lora_te1_", "lora_te1_", Scope::Encoder1),
    ("lora_te2_", "lora_te2_", Scope::Encoder2),
    ("lora_te3_", "lora_te3_", Scope::Encoder3),
    ("lycoris_", "lycoris_", Scope::Bare),

    ("unet.", "unet.", Scope::Unet),
    ("transformer.", "transformer.", Scope::Unet),
    ("diffusion_model.", "diffusion_model.", Scope::Unet),
    ("model.diffusion_model.", "model.diffusion_model.", Scope::Unet),
    // Files of Cosmos and its descendants.
    ("net.", "net.", Scope::Unet),

    ("text_encoder.", "text_encoder.", Scope::Encoder1),
    ("text_encoder_2.", "text_encoder_2.", Scope::Encoder2),
    ("text_encoder_2.encoder.block.", "text_encoder_2.", Scope::T5),
    ("text_encoder_3.", "text_encoder_3.", Scope::T5),

    ("cond_stage_model.", "cond_stage_model.", Scope::Encoder1),
    ("cond_stage_model.transformer.", "cond_stage_model.transformer.", Scope::Encoder1),
    ("cond_stage_model.model.", "cond_stage_model.model.", Scope::Encoder1),
    ("conditioner.embedders.0.", "conditioner.embedders.0.", Scope::Encoder1),
    ("conditioner.embedders.0.transformer.", "conditioner.embedders.0.transformer.", Scope::Encoder1),
    ("conditioner.embedders.0.model.", "conditioner.embedders.0.model.", Scope::Encoder1),
    ("conditioner.embedders.1.", "conditioner.embedders.1.", Scope::Encoder2),
    ("conditioner.embedders.1.transformer.", "conditioner.embedders.1.transformer.", Scope::Encoder2),
    ("conditioner.embedders.1.model.", "conditioner.embedders.1.model.", Scope::Encoder2),
    // A1111 wraps the encoders.
    ("cond_stage_model.wrapped.transformer.", "cond_stage_model.wrapped.transformer.", Scope::Encoder1),
    ("cond_stage_model.wrapped.model.", "cond_stage_model.wrapped.model.", Scope::Encoder1),
    ("conditioner.embedders.0.wrapped.transformer.", "conditioner.embedders.0.wrapped.transformer.", Scope::Encoder1),
    ("conditioner.embedders.1.wrapped.model.", "conditioner.embedders.1.wrapped.model.", Scope::Encoder2),

    // ComfyUI and Forge.
    ("clip_l.transformer.", "clip_l.transformer.", Scope::Encoder1),
    ("clip_h.transformer.", "clip_h.transformer.", Scope::Encoder1),
    ("clip_g.transformer.", "clip_g.transformer.", Scope::Encoder2),
    ("t5xxl.transformer.", "t5xxl.transformer.", Scope::T5),
    ("text_encoders.clip_l.transformer.", "text_encoders.clip_l.transformer.", Scope::Encoder1),
    ("text_encoders.clip_h.transformer.", "text_encoders.clip_h.transformer.", Scope::Encoder1),
    ("text_encoders.clip_g.transformer.", "text_encoders.clip_g.transformer.", Scope::Encoder2),
    ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.transformer.", Scope::T5),
    ("text_encoders.", "text_encoders.", Scope::OtherEncoder),

    ("text_model.", "", Scope::LoneEncoder),
    ("transformer.text_model.", "transformer.", Scope::LoneEncoder),
    ("transformer.resblocks.", "", Scope::LoneEncoder),
    ("model.transformer.resblocks.", "model.", Scope::LoneEncoder),

    ("first_stage_model.", "", Scope::Foreign),
    ("vae.", "", Scope::Foreign),
    ("model_ema.", "", Scope::Foreign),
];

/// How ComfyUI's names of further text encoders begin; each is held in `<name>.transformer.`.
const ENCODERS: &[&str] = &[
    "clip_",
    "t5",
    "umt5",
    "mt5",
    "byt5",
    "gemma",
    "llama",
    "qwen",
    "mistral",
    "ministral",
    "hydit",
    "pile",
];

/// PEFT's wrapper, in front of any name or of what follows its prefix.
const PEFT_ROOT: &str = "base_model.model.";

/// Tells whose a name is and takes its prefix off.
pub fn classify(name: &str) -> Place<'_> {
    let name = name.strip_prefix(PEFT_ROOT).unwrap_or(name);
    let longest =
        PREFIXES.iter().filter(|(begin, ..)| name.starts_with(begin)).max_by_key(|(begin, ..)| begin.len());
    if let Some(&(_, prefix, scope)) = longest {
        let rest = &name[prefix.len()..];
        return Place { scope, rest: rest.strip_prefix(PEFT_ROOT).unwrap_or(rest) };
    }
    // transformers 5 holds a CLIP encoder without `text_model.` around it. The layers' own names keep a diffusion model with an
    // `encoder` of another kind apart.
    if name.starts_with("encoder.layers.")
        && [".self_attn.", ".mlp.fc"].iter().any(|inner| name.contains(inner))
    {
        return Place { scope: Scope::LoneEncoder, rest: name };
    }
    match name.split_once(".transformer.") {
        Some((encoder, rest))
            if !encoder.contains('.') && ENCODERS.iter().any(|e| encoder.starts_with(e)) =>
        {
            Place { scope: Scope::OtherEncoder, rest }
        }
        _ => Place { scope: Scope::Bare, rest: name },
    }
}

/// Which encoders a host has: prefixes without a number mean the first of them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Present {
    first: bool,
    second: bool,
    third: bool,
}

impl Present {
    pub(super) fn of(scopes: impl Iterator<Item = Scope>) -> Self {
        let mut present = Present::default();
        for scope in scopes {
            match scope {
                Scope::Encoder1 | Scope::LoneEncoder => present.first = true,
                Scope::Encoder2 => present.second = true,
                Scope::Encoder3 | Scope::T5 => present.third = true,
                _ => {}
            }
        }
        present
    }
}

impl Scope {
    pub(super) fn is_unet(self) -> bool {
        matches!(self, Scope::Unet | Scope::Bare)
    }

    pub(super) fn part(self) -> Option<Part> {
        match self {
            Scope::Unet => Some(Part::Unet),
            Scope::Foreign | Scope::Bare => None,
            _ => Some(Part::TextEncoder),
        }
    }

    /// The lists that a target of this scope stands in.
    pub(super) fn slots_of_target(self, present: &Present) -> impl Iterator<Item = usize> {
        let Present { first, second, third } = *present;
        let (slots, any) = match self {
            Scope::Unet | Scope::Bare => ([Some(UNET), None], false),
            Scope::Encoder1 | Scope::LoneEncoder => ([Some(FIRST), None], true),
            Scope::Encoder2 => ([Some(SECOND), None], !first),
            Scope::Encoder3 => ([Some(THIRD), None], !first && !second),
            Scope::T5 => ([Some(THIRD), (!second).then_some(SECOND)], !first && !second),
            Scope::AnyEncoder | Scope::OtherEncoder => ([None, None], !first && !second && !third),
            Scope::Foreign => ([None, None], false),
        };
        slots.into_iter().flatten().chain(any.then_some(ANY))
    }

    /// The lists that a module of this scope is looked up in.
    pub(super) fn slots_of_module(self) -> impl Iterator<Item = usize> {
        match self {
            Scope::Unet => UNET..UNET + 1,
            Scope::AnyEncoder | Scope::OtherEncoder => ANY..ANY + 1,
            Scope::Encoder1 => FIRST..FIRST + 1,
            Scope::Encoder2 => SECOND..SECOND + 1,
            Scope::Encoder3 | Scope::T5 => THIRD..THIRD + 1,
            Scope::LoneEncoder => ANY..SLOTS,
            Scope::Bare => 0..SLOTS,
            Scope::Foreign => 0..0,
        }
    }
}
