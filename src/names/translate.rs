//! One module's name in another layout of its model, for files to be converted.

use super::family::{table, Fraction, Span, Words};
use super::sd_unet;
use super::words::{with_dots, TEXT, UNET};
use super::{clip, scope, without_weight};

/// Whose names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// The checkpoint's, which kohya and ComfyUI use.
    Checkpoint,
    /// Diffusers'.
    Diffusers,
}

/// A name of the other layout, which of the module's rows go there, and which of that weight's rows they are; `None`: all.
pub type Translated = (String, Option<Fraction>, Option<Fraction>);

/// `module` of a model of `family` in another layout: the dotted path inside its model, without prefix. `module` may carry any prefix of
/// [`scope`] and be flattened. Text encoders' modules get transformers' names in either layout. `None` for what the family does not
/// have, and where the name alone does not tell (the last block of SD3 medium is not the last one of SD3.5 large).
pub fn translate(family: &str, module: &str, to: Layout) -> Option<Vec<Translated>> {
    let place = scope::classify(without_weight(module));
    if !place.is_of_unet() {
        return of_encoder(place);
    }
    if let Some(layout) = sd_unet::Layout::published(family) {
        let path = with_dots(place.rest, UNET);
        let (there, back) = (layout.to_checkpoint(&path), layout.to_diffusers(&path));
        let name = match to {
            Layout::Checkpoint => there.or(back.map(|_| path)),
            Layout::Diffusers => back.or(there.map(|_| path)),
        };
        return Some(vec![(name?, None, None)]);
    }
    let table = table(family)?;
    let reading = table.read(&Words::of(place.rest))?;
    let span = reading.span(None)?;
    let names = match to {
        Layout::Checkpoint => vec![(reading.path(), Span::Whole)],
        Layout::Diffusers => table.diffusers(&reading, None),
    };
    let part = |f: Fraction| (!f.is_whole()).then_some(f);
    let found: Vec<_> = names
        .iter()
        .flat_map(|(name, other)| span.meets(*other).into_iter().map(move |parts| (name, parts)))
        .map(|(name, (ours, its))| (name.clone(), part(ours), part(its)))
        .collect();
    (!found.is_empty()).then_some(found)
}

fn of_encoder(place: scope::Place<'_>) -> Option<Vec<Translated>> {
    if place.scope.part().is_none() && place.scope != scope::Scope::Bare {
        return None;
    }
    let path = with_dots(place.rest, TEXT);
    let names = clip::to_transformers(&path);
    if names.is_empty() {
        return Some(vec![(path, None, None)]);
    }
    let third = |k| Fraction { first: k, count: 1, of: 3 };
    Some(names.into_iter().map(|(name, piece)| (name, piece.map(third), None)).collect())
}
