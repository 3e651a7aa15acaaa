//! What a family of models is: a table of its weights' names, and the engine that reads any spelling of them.
//!
//! Every name means rows of one of the checkpoint's weights: all of them, a range (diffusers' `to_q` is the first third of `qkv`), or its
//! halves exchanged. So two layouts meet in the checkpoint's rows, whichever of them fuses what the other keeps apart.
//!
//! Names are compared flattened (`.` is `_`), word by word, numbers by value: exact, and one hash look-up per name. A family's file
//! holds its table and nothing else; adding a family is adding its table to [`FAMILIES`].

use super::{
    anima, chroma, flux1, flux2, hunyuan_image, hunyuan_video, hunyuan_video_15, ltx2, ltx_video, lumina2,
    qwen_image, sd3, wan, z_image,
};
use std::collections::HashMap;
use std::sync::OnceLock;

/// The families that are tables. Of relatives that the evidence does not tell apart the first is named.
pub const FAMILIES: &[&Family] = &[
    &flux1::FAMILY,
    &chroma::FAMILY,
    &flux2::FAMILY,
    &sd3::FAMILY,
    &qwen_image::FAMILY,
    &z_image::FAMILY,
    &lumina2::FAMILY,
    &wan::FAMILY,
    &hunyuan_video::FAMILY,
    &hunyuan_video_15::FAMILY,
    &hunyuan_image::FAMILY,
    &ltx_video::FAMILY,
    &ltx2::FAMILY,
    &anima::FAMILY,
    &anima::COSMOS_PREDICT2,
];

/// A family of models that share their weights' names.
#[derive(Debug)]
pub struct Family {
    /// As users say it.
    pub name: &'static str,
    /// Every weight of diffusers' layout, and where it stands in the checkpoint. Together the rows of one weight of the checkpoint
    /// cover it exactly once.
    pub rows: &'static [Row],
    /// Other spellings of a weight of the checkpoint: the spelling, the checkpoint's pattern.
    pub also: &'static [(&'static str, &'static str)],
    /// Other spellings of a part of a weight of the checkpoint, such as diffusers' fused `to_qkv`; the spelling stands in `diffusers`.
    pub parts: &'static [Row],
    /// What tells this family from those that share its names.
    pub marks: &'static [Mark],
}

/// One weight in both layouts. `{}` stands for a number; both sides have the same numbers in the same order. `.weight` is left away,
/// and the weight's `.bias` goes with it.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Diffusers' name.
    pub diffusers: &'static str,
    /// The checkpoint's.
    pub checkpoint: &'static str,
    /// Which rows of the checkpoint's weight the other one is.
    pub part: Part,
}

/// A row whose weights are the same.
pub const fn row(diffusers: &'static str, checkpoint: &'static str) -> Row {
    Row { diffusers, checkpoint, part: Part::Whole }
}

/// A row whose diffusers' weight is `count` of `of` equal shares of the checkpoint's, from `first` on.
pub const fn rows(diffusers: &'static str, checkpoint: &'static str, first: u8, count: u8, of: u8) -> Row {
    Row { diffusers, checkpoint, part: Part::Rows { first, count, of } }
}

/// A row whose weights have their halves exchanged.
pub const fn swapped(diffusers: &'static str, checkpoint: &'static str) -> Row {
    Row { diffusers, checkpoint, part: Part::Swapped }
}

/// Which rows of a checkpoint's weight another layout's weight is.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    /// All.
    Whole,
    /// Of `of` equal shares, `count` from `first` on.
    Rows {
        /// The first share.
        first: u8,
        /// How many.
        count: u8,
        /// Shares in the checkpoint's weight.
        of: u8,
    },
    /// All, the halves exchanged: shift and scale of an AdaLN.
    Swapped,
    /// The halves exchanged in the model's last block only, which is the one whose first number is the highest. Holds the published
    /// numbers of blocks, for a name without its model.
    SwappedLast(&'static [usize]),
}

/// Evidence for or against a family. Patterns are the checkpoint's; shapes are those of the checkpoint's weight, also when the name at
/// hand means a part of it.
#[derive(Clone, Copy, Debug)]
pub enum Mark {
    /// Speaks for the family when present.
    Has(&'static str),
    /// Speaks against it when present.
    Lacks(&'static str),
    /// The weight has one of these numbers of columns (input channels). Another one speaks against the family; one of these is the
    /// evidence that is told, but no reason to prefer the family to one that it fits as well.
    Columns(&'static str, &'static [usize]),
    /// The weight has rows : columns in this ratio; read like `Columns`.
    Ratio(&'static str, usize, usize),
    /// How many blocks of this beginning, such as `double_blocks.{}`, the published models have. The last block of one of them speaks
    /// for the family, a number beyond all of them against it.
    Blocks(&'static str, &'static [usize]),
}

/// `count` of `of` equal shares, from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fraction {
    /// The first share.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// Shares in all.
    pub of: usize,
}

impl Fraction {
    /// All of it.
    pub const WHOLE: Fraction = Fraction { first: 0, count: 1, of: 1 };

    /// Not a part.
    pub fn is_whole(&self) -> bool {
        self.count == self.of
    }

    /// Start and number of its rows where all are `rows`; `None` when the shares are no whole rows.
    pub fn range(&self, rows: usize) -> Option<(usize, usize)> {
        let share = |n: usize| {
            let product = rows.checked_mul(n)?;
            (product.checked_rem(self.of)? == 0).then(|| product / self.of)
        };
        Some((share(self.first)?, share(self.count)?))
    }

    fn reduced(self) -> Fraction {
        let gcd = |mut a: usize, mut b: usize| {
            while b != 0 {
                (a, b) = (b, a % b);
            }
            a.max(1)
        };
        let by = gcd(gcd(self.first, self.count), self.of);
        Fraction { first: self.first / by, count: self.count / by, of: self.of / by }
    }
}

/// The rows of a checkpoint's weight that a name means, in the order of the name's own rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Span {
    Whole,
    Rows(Fraction),
    Swapped,
}

impl Span {
    fn shares(self) -> Vec<Fraction> {
        match self {
            Span::Whole => vec![Fraction::WHOLE],
            Span::Rows(fraction) => vec![fraction],
            Span::Swapped => {
                vec![Fraction { first: 1, count: 1, of: 2 }, Fraction { first: 0, count: 1, of: 2 }]
            }
        }
    }

    /// How much of the checkpoint's weight it is.
    pub(super) fn size(self) -> (usize, usize) {
        match self {
            Span::Rows(Fraction { count, of, .. }) => (count, of),
            _ => (1, 1),
        }
    }

    /// The rows that both names mean: which of `self`'s rows, and where they lie among `other`'s.
    pub(super) fn meets(self, other: Span) -> Vec<(Fraction, Fraction)> {
        if self == other {
            return vec![(Fraction::WHOLE, Fraction::WHOLE)];
        }
        let (ours, theirs) = (self.shares(), other.shares());
        let all = |shares: &[Fraction]| shares.iter().map(|s| s.count).sum::<usize>();
        let (total, other_total) = (all(&ours), all(&theirs));
        let mut found = Vec::new();
        let mut at = 0;
        for a in &ours {
            let mut other_at = 0;
            for b in &theirs {
                // In the smallest shares that measure both.
                let (a0, a1) = (a.first * b.of, (a.first + a.count) * b.of);
                let (b0, b1) = (b.first * a.of, (b.first + b.count) * a.of);
                let (from, to) = (a0.max(b0), a1.min(b1));
                if from < to {
                    let count = to - from;
                    let mine = Fraction { first: at * b.of + from - a0, count, of: total * b.of };
                    let its = Fraction { first: other_at * a.of + from - b0, count, of: other_total * a.of };
                    found.push((mine.reduced(), its.reduced()));
                }
                other_at += b.count;
            }
            at += a.count;
        }
        found
    }
}

/// Whether these parts of a name make up all of it. They do not overlap.
pub(super) fn is_complete(parts: impl Iterator<Item = Fraction>) -> bool {
    let sum = parts.fold(Fraction { first: 0, count: 0, of: 1 }, |sum, part| {
        let count = sum.count * part.of + part.count * sum.of;
        Fraction { first: 0, count, of: sum.of * part.of }.reduced()
    });
    sum.is_whole()
}

/// How a spelling came into the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Checkpoint,
    Diffusers,
    Other,
}

/// One spelling of a weight.
#[derive(Debug)]
pub(super) struct Form {
    spelling: &'static str,
    words: Words<'static>,
    /// The checkpoint's pattern.
    pub(super) weight: &'static str,
    part: Part,
    kind: Kind,
}

/// A name that a family knows.
#[derive(Clone, Debug)]
pub(super) struct Reading<'n> {
    part: Part,
    pub(super) weight: &'static str,
    pub(super) numbers: Vec<&'n str>,
    /// `.bias`, or nothing.
    pub(super) tail: &'static str,
}

impl Reading<'_> {
    /// The checkpoint's name of the weight.
    pub(super) fn path(&self) -> String {
        fill(self.weight, &self.numbers) + self.tail
    }

    pub(super) fn first_number(&self) -> Option<usize> {
        self.numbers.first()?.parse().ok()
    }

    /// What blocks of this kind are called in front of their number.
    pub(super) fn blocks(&self) -> &'static str {
        self.weight.split("{}").next().unwrap_or_default()
    }

    /// `depth`: how many blocks of this kind the model has, when it is known. `None` when that is needed and cannot be told.
    pub(super) fn span(&self, depth: Option<usize>) -> Option<Span> {
        span_of(self.part, self.first_number(), depth)
    }
}

fn span_of(part: Part, number: Option<usize>, depth: Option<usize>) -> Option<Span> {
    Some(match part {
        Part::Whole => Span::Whole,
        Part::Rows { first, count, of } => {
            Span::Rows(Fraction { first: first.into(), count: count.into(), of: of.into() })
        }
        Part::Swapped => Span::Swapped,
        Part::SwappedLast(published) => {
            let blocks = number?.checked_add(1)?;
            match depth {
                Some(depth) if depth == blocks => Span::Swapped,
                Some(_) => Span::Whole,
                None if published.iter().max() == Some(&blocks) => Span::Swapped,
                // The last of one model and within another.
                None if published.contains(&blocks) => return None,
                None => Span::Whole,
            }
        }
    })
}

/// A family's table, ready to be searched.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) family: &'static Family,
    forms: Vec<Form>,
    /// By the spelling with `#` for numbers.
    by_key: HashMap<String, Vec<usize>>,
    /// By the checkpoint's pattern.
    by_weight: HashMap<&'static str, Vec<usize>>,
}

/// All of [`FAMILIES`], made ready once.
pub(super) fn tables() -> &'static [Table] {
    static TABLES: OnceLock<Vec<Table>> = OnceLock::new();
    TABLES.get_or_init(|| FAMILIES.iter().copied().map(Table::new).collect())
}

/// The table of a family by name.
pub(super) fn table(name: &str) -> Option<&'static Table> {
    tables().iter().find(|t| t.family.name == name)
}

fn is_number(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit())
}

/// A number that comes back as it was: no leading zero.
fn is_plain(word: &str) -> bool {
    is_number(word) && (word == "0" || !word.starts_with('0'))
}

/// A name taken apart, to be read by any table: a path inside the model, without prefix and `.weight`, dotted or flattened.
#[derive(Clone, Debug)]
pub(super) struct Words<'n> {
    words: Vec<&'n str>,
    /// The words with `#` for numbers, each with a `_` behind it.
    key: String,
}

impl<'n> Words<'n> {
    pub(super) fn of(name: &'n str) -> Self {
        let words: Vec<_> = name.split(['.', '_']).collect();
        let mut key = String::with_capacity(name.len() + 1);
        for word in &words {
            key.push_str(if is_number(word) || *word == "{}" { "#" } else { word });
            key.push('_');
        }
        Words { words, key }
    }
}

fn fill(pattern: &str, numbers: &[&str]) -> String {
    let mut numbers = numbers.iter();
    let mut pieces = pattern.split("{}");
    let mut name = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        name.push_str(numbers.next().copied().unwrap_or_default());
        name.push_str(piece);
    }
    name
}

impl Table {
    fn new(family: &'static Family) -> Self {
        let mut table =
            Table { family, forms: Vec::new(), by_key: HashMap::new(), by_weight: HashMap::new() };
        for row in family.rows {
            table.add(row.checkpoint, row.checkpoint, Part::Whole, Kind::Checkpoint);
        }
        for row in family.rows {
            table.add(row.diffusers, row.checkpoint, row.part, Kind::Diffusers);
        }
        for &(spelling, checkpoint) in family.also {
            table.add(spelling, checkpoint, Part::Whole, Kind::Other);
        }
        for row in family.parts {
            table.add(row.diffusers, row.checkpoint, row.part, Kind::Other);
        }
        table
    }

    fn add(&mut self, spelling: &'static str, weight: &'static str, part: Part, kind: Kind) {
        let known = self.by_weight.entry(weight).or_default();
        let same = |&i: &usize| self.forms.get(i).is_some_and(|f| f.spelling == spelling && f.kind == kind);
        // The rows of a fused weight name it more than once.
        if known.iter().any(same) {
            return;
        }
        known.push(self.forms.len());
        let words = Words::of(spelling);
        self.by_key.entry(words.key.clone()).or_default().push(self.forms.len());
        self.forms.push(Form { spelling, words, weight, part, kind });
    }

    /// What a name means.
    pub(super) fn read<'n>(&self, name: &Words<'n>) -> Option<Reading<'n>> {
        self.look_up(&name.key, &name.words, "").or_else(|| {
            let (stem, (_, words)) = (name.key.strip_suffix("bias_")?, name.words.split_last()?);
            self.look_up(stem, words, ".bias")
        })
    }

    fn look_up<'n>(&self, key: &str, words: &[&'n str], tail: &'static str) -> Option<Reading<'n>> {
        let found = self.by_key.get(key)?;
        found.iter().filter_map(|&i| self.forms.get(i)).find_map(|form| {
            let mut numbers = Vec::new();
            for (&pattern, &word) in form.words.words.iter().zip(words) {
                if pattern == "{}" && is_plain(word) {
                    numbers.push(word);
                } else if pattern != word {
                    return None;
                }
            }
            Some(Reading { part: form.part, weight: form.weight, numbers, tail })
        })
    }

    fn forms_of(&self, weight: &str) -> impl Iterator<Item = &Form> {
        self.by_weight.get(weight).into_iter().flatten().filter_map(|&i| self.forms.get(i))
    }

    /// Every spelling that has a part in the weight that was read.
    pub(super) fn spellings(&self, of: &Reading<'_>, depth: Option<usize>) -> Vec<(String, Span)> {
        self.forms_of(of.weight)
            .filter_map(|form| {
                let span = span_of(form.part, of.first_number(), depth)?;
                Some((fill(form.spelling, &of.numbers) + of.tail, span))
            })
            .collect()
    }

    /// The weights of diffusers' layout that make up the weight that was read.
    pub(super) fn diffusers(&self, of: &Reading<'_>, depth: Option<usize>) -> Vec<(String, Span)> {
        self.forms_of(of.weight)
            .filter(|form| form.kind == Kind::Diffusers)
            .filter_map(|form| {
                let span = span_of(form.part, of.first_number(), depth)?;
                Some((fill(form.spelling, &of.numbers) + of.tail, span))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_sound() {
        for family in FAMILIES {
            let table = Table::new(family);
            let mut meaning: HashMap<String, (&str, String)> = HashMap::new();
            for form in &table.forms {
                let holes = |s: &str| s.matches("{}").count();
                assert_eq!(holes(form.spelling), holes(form.weight), "{}: {}", family.name, form.spelling);
                assert!(
                    table.family.rows.iter().any(|row| row.checkpoint == form.weight),
                    "{}: `{}` is no row's checkpoint name",
                    family.name,
                    form.weight
                );
                let part = format!("{:?}", form.part);
                let flat = form.spelling.replace('.', "_");
                if let Some(before) = meaning.insert(flat, (form.weight, part.clone())) {
                    assert_eq!(
                        before,
                        (form.weight, part),
                        "{}: two meanings of {}",
                        family.name,
                        form.spelling
                    );
                }
            }
            let patterns = family.marks.iter().filter_map(|mark| match mark {
                Mark::Has(p) | Mark::Columns(p, _) | Mark::Ratio(p, ..) => Some(p),
                Mark::Lacks(_) | Mark::Blocks(..) => None,
            });
            for pattern in patterns {
                assert!(table.by_weight.contains_key(pattern), "{}: mark {pattern}", family.name);
            }
            for (weight, forms) in &table.by_weight {
                let spans = forms
                    .iter()
                    .map(|&i| &table.forms[i])
                    .filter(|f| f.kind == Kind::Diffusers)
                    .map(|f| span_of(f.part, Some(0), Some(2)).unwrap());
                let parts: Vec<_> = spans.flat_map(|s| Span::Whole.meets(s)).map(|(mine, _)| mine).collect();
                assert!(is_complete(parts.iter().copied()), "{}: {weight} is not covered", family.name);
                let total = 5040;
                let mut covered = vec![0; total];
                for (start, len) in parts.iter().map(|p| p.range(total).unwrap()) {
                    covered[start..start + len].iter_mut().for_each(|n| *n += 1);
                }
                assert!(covered.iter().all(|&n| n == 1), "{}: {weight} is not covered once", family.name);
            }
        }
    }

    #[test]
    fn spans_meet_in_the_checkpoints_rows() {
        let rows = |first, count, of| Span::Rows(Fraction { first, count, of });
        let f = |first, count, of| Fraction { first, count, of };
        assert_eq!(rows(1, 1, 3).meets(Span::Whole), vec![(Fraction::WHOLE, f(1, 1, 3))]);
        assert_eq!(Span::Whole.meets(rows(3, 4, 7)), vec![(f(3, 4, 7), Fraction::WHOLE)]);
        assert_eq!(rows(0, 3, 7).meets(rows(1, 1, 7)), vec![(f(1, 1, 3), Fraction::WHOLE)]);
        assert_eq!(rows(0, 1, 7).meets(rows(1, 1, 7)), vec![]);
        assert_eq!(Span::Swapped.meets(Span::Swapped), vec![(Fraction::WHOLE, Fraction::WHOLE)]);
        let halves = vec![(f(0, 1, 2), f(1, 1, 2)), (f(1, 1, 2), f(0, 1, 2))];
        assert_eq!(Span::Swapped.meets(Span::Whole), halves);
        assert_eq!(
            Span::Whole.meets(Span::Swapped),
            vec![(f(1, 1, 2), f(0, 1, 2)), (f(0, 1, 2), f(1, 1, 2))]
        );
        assert_eq!(f(3, 1, 5).range(3840), Some((2304, 768)));
        assert_eq!(f(1, 1, 3).range(97), None);
        assert_eq!(f(2, 1, 3).range(usize::MAX), None);
    }

    #[test]
    fn a_name_is_read_word_by_word() {
        let table = table("Flux.1").unwrap();
        let weight = |name| table.read(&Words::of(name)).map(|r| r.path());
        assert_eq!(weight("transformer_blocks.7.attn.to_k").as_deref(), Some("double_blocks.7.img_attn.qkv"));
        assert_eq!(weight("double_blocks_18_txt_mlp_2").as_deref(), Some("double_blocks.18.txt_mlp.2"));
        assert_eq!(
            weight("transformer_blocks.7.attn.to_k.bias").as_deref(),
            Some("double_blocks.7.img_attn.qkv.bias")
        );
        for name in [
            "double_blocks.07.img_attn.qkv",
            "double_blocks.x.img_attn.qkv",
            "double_blocks.7.img_mlp.1",
            "double_blocks.7.img_attn.qkv.lora",
            "double_blocks.7",
            "",
        ] {
            assert_eq!(weight(name), None, "{name}");
        }
    }
}
