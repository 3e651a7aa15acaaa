//! What a module is called in another spelling: its model in the pipeline, its path inside it, and the prefix in front.

use super::Spelling;
use crate::adapter::keys::Dialect;
use crate::adapter::Module;
use crate::error::{Error, Result};
use crate::names::family::FAMILIES;
use crate::names::scope::{classify, Scope};
use crate::names::{self, Fraction, Layout};

/// The families of U-Nets, which are arithmetic and no tables.
const UNETS: [&str; 4] = ["SD 1.x", "SD 2.x", "SDXL", "SDXL refiner"];

/// One model of a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Component {
    /// U-Net or transformer.
    Model,
    /// The only CLIP, or CLIP-L.
    First,
    /// OpenCLIP bigG.
    Second,
    T5,
    /// A text encoder that is a language model.
    Language,
}

/// One place that a module, or some of its rows, goes to.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// The path inside its model.
    pub path: String,
    /// Which of the module's rows; `None`: all.
    pub from: Option<Fraction>,
    /// Which rows of the weight at `path`; `None`: all.
    pub to: Option<Fraction>,
}

/// What decides the names of one file.
#[derive(Debug)]
pub(super) struct Naming {
    pub to: Spelling,
    pub family: Option<&'static str>,
    /// Whether the diffusion model is a U-Net; diffusers calls others transformers.
    unet: bool,
    /// Whether the file has modules of a second text encoder.
    several_encoders: bool,
}

/// The family of this name, as users say it.
pub(super) fn family(name: &str) -> Result<&'static str> {
    let all = || UNETS.into_iter().chain(FAMILIES.iter().map(|f| f.name));
    all().find(|known| known.eq_ignore_ascii_case(name)).ok_or_else(|| {
        let known: Vec<_> = all().collect();
        Error::argument(format!("`{name}` is no family"), format!("the families are {}", known.join(", ")))
    })
}

/// Which model of its pipeline a module is in; `None` for a VAE.
pub(super) fn component(module: &str) -> Option<Component> {
    let place = classify(module);
    let starts = |beginnings: &[&str]| beginnings.iter().any(|b| place.rest.starts_with(b));
    let clip = starts(&["text_model", "encoder.layers", "encoder_layers", "text_projection"])
        || starts(&["transformer.resblocks", "transformer_resblocks"]);
    let t5 = starts(&["encoder.block.", "encoder_block_"]);
    Some(match place.scope {
        Scope::Unet => Component::Model,
        Scope::Bare if clip && !starts(&["transformer"]) => Component::First,
        Scope::Bare => Component::Model,
        Scope::Foreign => return None,
        Scope::T5 => Component::T5,
        _ if t5 => Component::T5,
        Scope::OtherEncoder => Component::Language,
        _ if !clip => Component::Language,
        Scope::Encoder2 => Component::Second,
        _ => Component::First,
    })
}

/// Whether the dots of the module's name are lost. A name of one word without prefix never had any.
fn is_flat(module: &Module) -> bool {
    let prefixed = classify(&module.name).rest.len() < module.name.len();
    module.dialect == Dialect::Kohya && prefixed && !module.name.contains('.')
}

impl Naming {
    /// For the modules of one file.
    pub fn new<'a>(
        to: Spelling,
        family: Option<&'static str>,
        modules: impl Iterator<Item = &'a str> + Clone,
    ) -> Self {
        let of_unet =
            |path: &str| ["down_blocks", "mid_block", "up_blocks"].iter().any(|b| path.starts_with(b));
        let unet = match family {
            Some(family) => UNETS.contains(&family),
            None => modules.clone().any(|name| of_unet(classify(name).rest)),
        };
        let second = |c| matches!(c, Component::Second | Component::T5);
        let several_encoders = modules.filter_map(component).any(second);
        Naming { to, family, unet, several_encoders }
    }

    /// Whose names the spelling has. sd-scripts flattens diffusers' names for Stable Diffusion 1 and 2, the checkpoint's for all others.
    fn layout(&self) -> Layout {
        match (self.to, self.family) {
            (Spelling::Peft | Spelling::Diffusers, _) => Layout::Diffusers,
            (Spelling::Kohya, Some("SD 1.x" | "SD 2.x")) => Layout::Diffusers,
            _ => Layout::Checkpoint,
        }
    }

    /// Where a module goes, or why it cannot.
    pub fn places(&self, module: &Module, component: Component) -> Result<Vec<Place>, String> {
        if component == Component::Model && self.family.is_none() {
            return self.place_unknown(module);
        }
        let family = self.family.unwrap_or_default();
        let Some(found) = names::translate(family, &module.name, self.layout()) else {
            return Err(format!("it is no name of a {family} model, or does not tell its rows"));
        };
        let places = found.into_iter().map(|(path, from, to)| {
            let inner = component <= Component::Second
                && component != Component::Model
                && path.starts_with("encoder.layers.");
            let path = if inner { format!("text_model.{path}") } else { path };
            Place { path, from, to }
        });
        Ok(places.collect())
    }

    /// Of an unknown family only prefix and dots can be respelled.
    fn place_unknown(&self, module: &Module) -> Result<Vec<Place>, String> {
        let rest = classify(&module.name).rest;
        let begins = |prefixes: &[&str]| prefixes.iter().any(|p| module.name.starts_with(p));
        let diffusers = module.dialect != Dialect::Kohya || begins(&["unet.", "transformer."]);
        let checkpoint = begins(&["diffusion_model.", "model.diffusion_model.", "net."]);
        let unknown = "the model's family cannot be told from the file";
        match self.to {
            _ if is_flat(module) && self.to != Spelling::Kohya => {
                return Err(format!("{unknown}, so the dots of a flattened name cannot be put back"));
            }
            Spelling::Comfyui if diffusers => {
                return Err(format!("{unknown}, so diffusers' name cannot be made the checkpoint's"));
            }
            Spelling::Peft | Spelling::Diffusers if checkpoint => {
                return Err(format!("{unknown}, so the checkpoint's name cannot be made diffusers'"));
            }
            _ => {}
        }
        Ok(vec![Place { path: rest.to_owned(), from: None, to: None }])
    }

    /// The whole name of a module at `path`, as the spelling's keys begin.
    pub fn full(&self, source: &str, component: Component, path: &str) -> Result<String, String> {
        Ok(match self.to {
            Spelling::Kohya => format!("{}{}", self.kohya(source, component), path.replace('.', "_")),
            Spelling::Comfyui => format!("{}{path}", self.comfyui(source, component)?),
            Spelling::Peft => path.to_owned(),
            Spelling::Diffusers => {
                let called = self.called(component);
                if !self.is_loaded(component) {
                    return Err("diffusers' pipelines load no adapter of this text encoder".into());
                }
                format!("{called}.{path}")
            }
        })
    }

    fn kohya(&self, source: &str, component: Component) -> &'static str {
        let single = match self.family {
            Some(family) => matches!(family, "SD 1.x" | "SD 2.x"),
            None => !self.several_encoders && !source.starts_with("lora_te1_"),
        };
        match component {
            Component::Model => "lora_unet_",
            Component::First if single => "lora_te_",
            Component::First => "lora_te1_",
            Component::Second => "lora_te2_",
            Component::T5 => "lora_te3_",
            Component::Language => "lora_te_",
        }
    }

    fn comfyui(&self, source: &str, component: Component) -> Result<String, String> {
        let encoder = match component {
            Component::Model => return Ok("diffusion_model.".into()),
            Component::First if self.family == Some("SD 2.x") => "clip_h",
            Component::First if self.family == Some("SDXL refiner") => "clip_g",
            Component::First => "clip_l",
            Component::Second => "clip_g",
            Component::T5 => "t5xxl",
            // ComfyUI has a name for each; only its own files say which.
            Component::Language => source
                .split_once(".transformer.")
                .map(|(encoder, _)| encoder.strip_prefix("text_encoders.").unwrap_or(encoder))
                .ok_or("ComfyUI's name of this text encoder is not known")?,
        };
        Ok(format!("text_encoders.{encoder}.transformer."))
    }

    /// The component's name in diffusers, which is also what selects it for a PEFT file.
    pub fn called(&self, component: Component) -> &'static str {
        match component {
            Component::Model if self.unet => "unet",
            Component::Model => "transformer",
            Component::First => "text_encoder",
            Component::Second => "text_encoder_2",
            Component::T5 if self.family == Some("Flux.1") => "text_encoder_2",
            Component::T5 if self.family == Some("SD 3") => "text_encoder_3",
            Component::T5 | Component::Language => "text_encoder",
        }
    }

    /// Whether diffusers' pipelines load adapters of the component (`_lora_loadable_modules` of diffusers 0.42).
    fn is_loaded(&self, component: Component) -> bool {
        let family = self.family;
        match component {
            Component::Model => true,
            Component::First => {
                family.is_none_or(|f| matches!(f, "SD 1.x" | "SD 2.x" | "SDXL" | "SD 3" | "Flux.1"))
            }
            Component::Second => family.is_none_or(|f| matches!(f, "SDXL" | "SD 3")),
            Component::T5 | Component::Language => false,
        }
    }

    /// Whether the weight at `path` is known to have no bias beside it: the projections of a U-Net's attention.
    pub fn lacks_bias(&self, component: Component, path: &str) -> bool {
        component == Component::Model
            && self.family.is_some_and(|f| UNETS.contains(&f))
            && ["to_q", "to_k", "to_v"].iter().any(|leaf| path.ends_with(leaf))
    }
}
