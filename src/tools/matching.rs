//! Which modules of several adapter files are the same layer's, however each file spells it.

use super::delta;
use super::source::Source;
use crate::adapter::Module;
use crate::error::{Error, Result};
use crate::names::Index;
use std::collections::HashMap;

/// One module of one file.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// Its file.
    pub source: &'a Source,
    /// The number of the file.
    pub number: usize,
    /// The module.
    pub module: &'a Module,
    /// The user's number for its file.
    pub weight: f64,
}

/// The modules of one layer, in the order of their files; the first one gives the name. Files of weight 0 take no part.
pub fn layers(sources: &[(Source, f64)]) -> Result<Vec<Vec<Member<'_>>>> {
    let mut layers: Vec<Vec<Member<'_>>> = Vec::new();
    let mut by_name: HashMap<&str, usize> = HashMap::new();
    for (number, (source, weight)) in sources.iter().enumerate().filter(|(_, (_, weight))| *weight != 0.0) {
        let modules = source.adapter.modules();
        let found = places(&layers, &by_name, modules)?;
        for (module, at) in modules.iter().zip(found) {
            let member = Member { source, number, module, weight: *weight };
            match at {
                Some(at) => layers[at].push(member),
                None => {
                    by_name.insert(&module.name, layers.len());
                    layers.push(vec![member]);
                }
            }
        }
    }
    Ok(layers)
}

/// The layer of each module, if an earlier file has it: by its exact name, else by what `names` knows of either file's spelling.
fn places(
    layers: &[Vec<Member<'_>>],
    by_name: &HashMap<&str, usize>,
    modules: &[Module],
) -> Result<Vec<Option<usize>>> {
    let exact: Vec<Option<usize>> = modules.iter().map(|m| by_name.get(m.name.as_str()).copied()).collect();
    if layers.is_empty() || exact.iter().all(Option::is_some) {
        return Ok(exact);
    }
    let shape = |m: &Module| delta::shape_of(m).unwrap_or_default();
    let known: Vec<(&str, Vec<usize>)> =
        layers.iter().filter_map(|l| l.first()).map(|m| (m.module.name.as_str(), shape(m.module))).collect();
    let own: Vec<(&str, Vec<usize>)> = modules.iter().map(|m| (m.name.as_str(), shape(m))).collect();
    // A flattened name cannot be translated, but a dotted one can be into it: so each file's names are looked up among the other's.
    let (there, here) = (Index::of_adapter(&known), Index::of_adapter(&own));
    let mut found = exact;
    for (at, (name, _)) in known.iter().enumerate() {
        if let Some(module) = whole(&here, name, modules.len())?.filter(|m| found[*m].is_none()) {
            found[module] = Some(at);
        }
    }
    for (place, module) in found.iter_mut().zip(modules).filter(|(place, _)| place.is_none()) {
        *place = whole(&there, &module.name, layers.len())?;
    }
    // Two modules of one file are two layers.
    let mut taken = vec![false; layers.len()];
    for (place, module) in found.iter_mut().zip(modules) {
        if let Some(at) = *place {
            let own_name = by_name.get(module.name.as_str()) == Some(&at);
            if std::mem::replace(&mut taken[at], true) && !own_name {
                *place = None;
            }
        }
    }
    Ok(found)
}

/// The one target that a name means as a whole.
fn whole(index: &Index, name: &str, count: usize) -> Result<Option<usize>> {
    match index.resolve(name).as_deref() {
        None | Some([]) => Ok(None),
        Some([piece]) if piece.slice.is_none() && piece.rows.is_none() => {
            Ok(Some(piece.target).filter(|target| *target < count))
        }
        Some(_) => Err(Error::Unsupported {
            what: format!("`{name}`: one file keeps apart what the other has in one module"),
            hint: "bring both files to one spelling first".into(),
        }),
    }
}
