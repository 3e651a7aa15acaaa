//! The configuration that PEFT and diffusers keep beside the tensors: ranks and alphas by pattern.

use super::rows::{Group, PEFT_MAGNITUDE, UP_BIAS};
use super::words::Method;
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;

/// A module in PEFT's words at its path.
pub(super) type Entry<'a> = (&'a str, &'a Group);

/// Modules and why they cannot stand beside the others.
pub(super) type Problems = Vec<(String, String)>;

/// The fields of a configuration for these modules; `Err` lists what one configuration cannot say. `inner`: text encoders whose outer
/// `text_model.` some versions of transformers leave out.
pub(super) fn config(entries: &[Entry<'_>], inner: bool) -> Result<Map<String, Value>, Problems> {
    let methods: BTreeMap<Method, Vec<&str>> =
        entries.iter().fold(BTreeMap::new(), |mut map, (path, group)| {
            map.entry(Method::of(group).unwrap_or(Method::Lora)).or_insert_with(Vec::new).push(path);
            map
        });
    let most = methods.iter().max_by_key(|(_, paths)| paths.len()).map(|(m, _)| *m).unwrap_or(Method::Lora);
    let mut problems: Problems = Vec::new();
    for (method, paths) in methods.iter().filter(|(m, _)| **m != most) {
        let why =
            format!("is {}, the others {}; one configuration holds one method", method.name(), most.name());
        problems.extend(paths.iter().map(|p| ((*p).to_owned(), why.clone())));
    }
    let entries: Vec<Entry<'_>> =
        entries.iter().copied().filter(|(_, g)| Method::of(g).is_none_or(|m| m == most)).collect();
    for (slot, what) in [(PEFT_MAGNITUDE, "a magnitude (DoRA)"), (UP_BIAS, "a bias")] {
        let (with, without): (Vec<_>, Vec<_>) = entries.iter().partition(|(_, g)| g.get(slot).is_some());
        let (odd, why) = match with.len() < without.len() {
            true => (&with, format!("has {what}, most others have none; one configuration says it of all")),
            false => {
                (&without, format!("lacks {what}, most others have one; one configuration says it of all"))
            }
        };
        if !with.is_empty() && !without.is_empty() {
            problems.extend(odd.iter().map(|(p, _)| ((*p).to_owned(), why.clone())));
        }
    }
    let named = |path: &str| {
        if inner {
            path.strip_prefix("text_model.").unwrap_or(path).to_owned()
        } else {
            path.to_owned()
        }
    };
    let mut fields = Map::new();
    fields.insert("peft_type".into(), most.name().into());
    fields.insert("task_type".into(), Value::Null);
    fields.insert("inference_mode".into(), true.into());
    let names: Vec<String> = entries.iter().map(|(path, _)| named(path)).collect();
    fields.insert("target_modules".into(), targets(&names, inner));
    let mut sizes: Vec<(String, usize, f64)> = Vec::new();
    match most {
        Method::Ia3 => {
            // Of convolutions only those of inputs come here: their layers have biases.
            let of_input = |shape: &[usize]| shape.len() > 2 || matches!(*shape, [1, n] if n > 1);
            let input = |g: &Group| g.get("ia3_l").is_some_and(|t| of_input(t.shape()));
            let read: Vec<Value> = entries
                .iter()
                .zip(&names)
                .filter(|((_, g), _)| input(g))
                .map(|(_, n)| n.as_str().into())
                .collect();
            fields.insert("feedforward_modules".into(), read.into());
        }
        Method::Lokr => match lokr(&entries, &mut fields) {
            Ok(ranks) => sizes.extend(
                names.iter().zip(&entries).zip(ranks).map(|((n, (_, g)), r)| (n.clone(), r, g.alpha_at(r))),
            ),
            Err(more) => problems.extend(more),
        },
        Method::Lora | Method::Loha => {
            let rank = |g: &Group| g.rank.unwrap_or(1);
            sizes.extend(
                names.iter().zip(&entries).map(|(n, (_, g))| (n.clone(), rank(g), g.alpha_at(rank(g)))),
            );
        }
    }
    if most == Method::Lora {
        fields.insert("use_dora".into(), entries.iter().any(|(_, g)| g.get(PEFT_MAGNITUDE).is_some()).into());
        fields.insert("lora_bias".into(), entries.iter().any(|(_, g)| g.get(UP_BIAS).is_some()).into());
    }
    if most == Method::Loha {
        match uniform(&entries, "hada_t1", |g| g.get("hada_w1_b").map_or(2, |t| t.shape().len())) {
            Ok(core) => drop(fields.insert("use_effective_conv2d".into(), core.into())),
            Err(more) => problems.extend(more),
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    if most != Method::Ia3 {
        let alpha = if most == Method::Lora { "lora_alpha" } else { "alpha" };
        patterns(&sizes, alpha, inner, &mut fields);
    }
    Ok(fields)
}

/// PEFT takes a list as endings of names, where a name of one word means too much; a pattern is taken whole.
fn targets(names: &[String], inner: bool) -> Value {
    if inner || names.iter().all(|name| name.contains('.')) {
        return json!(names);
    }
    let all: Vec<_> = names.iter().map(|name| regex_lite::escape(name)).collect();
    format!("(?:{})", all.join("|")).into()
}

fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 9e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}

/// The usual rank and alpha, and patterns for modules that differ. The first pattern that fits wins, as the end of a name: so longer names
/// stand first, and a module with the usual numbers is listed too where a shorter name would mean it.
fn patterns(sizes: &[(String, usize, f64)], alpha: &str, inner: bool, fields: &mut Map<String, Value>) {
    let mut sizes: Vec<_> = sizes.to_vec();
    sizes.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.0.cmp(&b.0)));
    let pattern = |name: &str| format!("{}{}", if inner { "" } else { "^" }, regex_lite::escape(name));
    let table = |value: &dyn Fn(usize) -> (u64, Value)| {
        let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
        (0..sizes.len()).for_each(|i| *counts.entry(value(i).0).or_default() += 1);
        let usual = counts.iter().max_by_key(|(_, n)| **n).map_or(0, |(bits, _)| *bits);
        let odd: Vec<&str> =
            (0..sizes.len()).filter(|&i| value(i).0 != usual).map(|i| sizes[i].0.as_str()).collect();
        let means = |name: &str| {
            odd.iter()
                .any(|o| name.strip_suffix(o).is_some_and(|head| head.is_empty() || head.ends_with('.')))
        };
        let listed = (0..sizes.len()).filter(|&i| !odd.is_empty() && means(&sizes[i].0));
        let map: Map<String, Value> = listed.map(|i| (pattern(&sizes[i].0), value(i).1)).collect();
        let usual = (0..sizes.len()).map(value).find(|(bits, _)| *bits == usual).map(|(_, v)| v);
        (usual.unwrap_or(json!(1)), map)
    };
    let (r, ranks) = table(&|i| (sizes[i].1 as u64, json!(sizes[i].1)));
    let (a, alphas) = table(&|i| (sizes[i].2.to_bits(), number(sizes[i].2)));
    fields.insert("r".into(), r);
    fields.insert(alpha.into(), a);
    fields.insert("rank_pattern".into(), ranks.into());
    fields.insert("alpha_pattern".into(), alphas.into());
}

/// Whether the convolutions have Tucker cores: one flag for all of them. `axes` of a factor tell a convolution without core.
fn uniform(entries: &[Entry<'_>], core: &str, axes: impl Fn(&Group) -> usize) -> Result<bool, Problems> {
    let any = entries.iter().any(|(_, g)| g.get(core).is_some());
    let odd = entries.iter().filter(|(_, g)| any && g.get(core).is_none() && axes(g) > 2);
    let why = "is a convolution without a Tucker core beside some with one; one configuration says it of all";
    let odd: Problems = odd.map(|(p, _)| ((*p).to_owned(), why.to_owned())).collect();
    if odd.is_empty() {
        Ok(any)
    } else {
        Err(odd)
    }
}

/// The ranks under which PEFT makes factors of these shapes, from one `decompose_factor`.
fn lokr(entries: &[Entry<'_>], fields: &mut Map<String, Value>) -> Result<Vec<usize>, Problems> {
    let shapes: Vec<Factors> = entries.iter().map(|(_, g)| Factors::of(g)).collect();
    let both = shapes.iter().any(|f| !f.whole.0);
    let core = uniform(entries, "lokr_t2", |g| g.get("lokr_w2").map_or(2, |t| t.shape().len()))?;
    let mut lefts: Vec<usize> = shapes.iter().map(|f| f.out.0).collect();
    lefts.sort_unstable();
    lefts.dedup();
    // With how many taps per channel they fit.
    let fits = |f: &Factors, factor: Option<usize>| {
        let split = |(left, right): (usize, usize)| {
            left.checked_mul(right).is_some_and(|all| factorization(all, factor) == (left, right))
        };
        // The columns of flattened factors are channels times taps; PEFT factorises the channels.
        let taps = [1, 9, 3, 27].into_iter().take(if f.flat { 4 } else { 1 });
        let channels = |n: &usize| f.inner.1 % n == 0 && split((f.inner.0, f.inner.1 / n));
        taps.filter(|_| split(f.out)).find(channels)
    };
    let candidates = lefts.into_iter().map(Some).chain([None]);
    let score = |factor: &Option<usize>| shapes.iter().filter(|f| fits(f, *factor).is_some()).count();
    let best = candidates.max_by_key(|factor| (score(factor), factor.is_none()));
    let factor = best.flatten();
    let mut problems: Problems = Vec::new();
    let mut ranks = Vec::new();
    for (f, (path, _)) in shapes.iter().zip(entries) {
        let Some(taps) = fits(f, factor) else {
            let ((a, c), (b, d)) = (f.out, f.inner);
            let why =
                format!("PEFT cannot factorise it as {a} x {c} by {b} x {d} with the factor of the others");
            problems.push(((*path).to_owned(), why));
            continue;
        };
        match f.rank(both, taps) {
            Some(rank) => ranks.push(rank),
            None => {
                problems.push(((*path).to_owned(), "PEFT makes other halves whole at its rank".into()));
            }
        }
    }
    fields.insert("decompose_both".into(), both.into());
    fields.insert("decompose_factor".into(), factor.map_or(json!(-1), |f| json!(f)));
    fields.insert("use_effective_conv2d".into(), core.into());
    if problems.is_empty() {
        Ok(ranks)
    } else {
        Err(problems)
    }
}

/// The shapes of a LoKr's halves.
struct Factors {
    /// Rows of w1 and w2, columns of w1 and w2.
    out: (usize, usize),
    inner: (usize, usize),
    whole: (bool, bool),
    flat: bool,
    rank: Option<usize>,
}

impl Factors {
    fn of(g: &Group) -> Self {
        let size = |name: &str, axis: usize| g.get(name).and_then(|t| t.shape().get(axis).copied());
        let core = g.get("lokr_t2").is_some();
        let or = |a: Option<usize>, b: Option<usize>| a.or(b).unwrap_or(1);
        Factors {
            out: (
                or(size("lokr_w1", 0), size("lokr_w1_a", 0)),
                or(size("lokr_w2", 0), size("lokr_w2_a", usize::from(core))),
            ),
            inner: (
                or(size("lokr_w1", 1), size("lokr_w1_b", 1)),
                or(size("lokr_w2", 1), size("lokr_w2_b", 1)),
            ),
            whole: (g.get("lokr_w1").is_some(), g.get("lokr_w2").is_some()),
            flat: g.get("lokr_w2").is_none() && !core,
            rank: g.rank,
        }
    }

    /// A half is whole where the rank is half of its larger side or more; w1 only with `decompose_both`. Two whole halves have any such rank.
    fn rank(&self, both: bool, taps: usize) -> Option<usize> {
        let (one, two) = (self.out.0.max(self.inner.0), self.out.1.max(self.inner.1 / taps.max(1)));
        let rank = self.rank.unwrap_or(one.max(two));
        let large = |side: usize| rank.saturating_mul(2) >= side;
        ((!both || large(one), large(two)) == self.whole).then_some(rank)
    }
}

/// How PEFT splits a size into two; `None`: as evenly as it can.
fn factorization(size: usize, factor: Option<usize>) -> (usize, usize) {
    if let Some(factor) = factor.filter(|f| *f > 0 && size % f == 0) {
        return (factor, size / factor);
    }
    let limit = factor.unwrap_or(size);
    let (mut m, mut n) = (1, size);
    let length = size.saturating_add(1);
    while m < n {
        let Some(next) = (m + 1..=size).find(|k| size % k == 0) else { break };
        if next + size / next > length || next > limit {
            break;
        }
        (m, n) = (next, size / next);
    }
    (m.min(n), m.max(n))
}

#[cfg(test)]
mod tests {
    use super::factorization;

    #[test]
    fn sizes_are_split_as_peft_does() {
        for (size, factor, expected) in [
            (256, None, (16, 16)),
            (128, None, (8, 16)),
            (127, None, (1, 127)),
            (128, Some(4), (4, 32)),
            (512, Some(8), (8, 64)),
            (126, Some(4), (3, 42)),
        ] {
            assert_eq!(factorization(size, factor), expected, "{size} {factor:?}");
        }
    }
}
