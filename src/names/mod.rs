//! Which weight of a model an adapter's module means.
//!
//! One model has many names for a weight: its checkpoint's, diffusers', and either of them flattened by kohya behind a prefix. The
//! host gives its own names once; [`Index`] lists every spelling each of them answers to, so that looking up a module is a few
//! hash lookups.
//!
//! `scope` knows the prefixes. `family` reads the tables of the families, one file each; `sd_unet` and `clip` are the two that are
//! arithmetic. `guess` tells families apart, `translate` rewrites a single name.

pub mod anima;
pub mod chroma;
pub mod clip;
pub mod family;
pub mod flux1;
pub mod flux2;
mod guess;
pub mod hunyuan_image;
pub mod hunyuan_video;
pub mod hunyuan_video_15;
mod index;
pub mod ltx2;
pub mod ltx_video;
pub mod lumina2;
pub mod qwen_image;
pub mod scope;
pub mod sd3;
pub mod sd_unet;
mod translate;
pub mod wan;
mod words;
pub mod z_image;

pub use family::Fraction;
pub use guess::{guess, related, Guess};
pub use index::{Index, Piece};
pub use translate::{translate, Layout, Translated};

/// Which of the user's two strengths applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The diffusion model, U-Net or transformer.
    Unet,
    /// A text encoder.
    TextEncoder,
}

/// The part that `module` changes on `target`: what the module's prefix says, else what the target's says, else the diffusion model.
pub fn part_of(module: &str, target: &str) -> Part {
    let of = |name| scope::classify(name).scope.part();
    of(module).or_else(|| of(target)).unwrap_or(Part::Unet)
}

fn flatten(name: &str) -> String {
    name.replace('.', "_")
}

/// One table read either way: `path` with a first part that `pairs` translate, what follows kept.
fn rename<'t>(path: &str, mut pairs: impl Iterator<Item = (&'t str, &'t str)>) -> Option<String> {
    pairs.find_map(|(from, to)| {
        let tail = path.strip_prefix(from)?;
        (tail.is_empty() || tail.starts_with('.')).then(|| format!("{to}{tail}"))
    })
}

/// A table's rows read from right to left.
fn reversed<'t>(table: &'t [(&'t str, &'t str)]) -> impl Iterator<Item = (&'t str, &'t str)> {
    table.iter().map(|&(a, b)| (b, a))
}

fn without_weight(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod lists;
#[cfg(test)]
mod tests;
