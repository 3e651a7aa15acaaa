//! The options of the tools as JSON: every problem told at once, an unknown key with the nearest known one.

use crate::dtype::Float;
use crate::error::{Error, Result};
use serde_json::{Map, Value};

/// Reads the keys of one JSON object.
pub struct Reader<'a> {
    map: Map<String, Value>,
    known: &'a [&'a str],
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    /// `text` is a JSON object, or empty; `known` lists its keys.
    pub fn new(text: &str, known: &'a [&'a str]) -> Result<Self> {
        let bad = |what: String| Err(Error::argument(format!("options: {what}"), ""));
        let map = match serde_json::from_str(if text.trim().is_empty() { "{}" } else { text }) {
            Ok(Value::Object(map)) => map,
            Ok(other) => return bad(format!("{other} is not a JSON object")),
            Err(e) => return bad(format!("not JSON: {e}")),
        };
        let mut problems = Vec::new();
        for name in map.keys().filter(|name| !known.contains(&name.as_str())) {
            let nearest = known.iter().min_by_key(|k| distance(name, k)).unwrap_or(&"");
            problems.push(format!("`{name}` is not an option; the nearest is `{nearest}`"));
        }
        Ok(Reader { map, known, problems })
    }

    fn value(&self, name: &str) -> Option<&Value> {
        debug_assert!(self.known.contains(&name));
        self.map.get(name).filter(|v| !v.is_null())
    }

    fn expected<T>(&mut self, name: &str, what: &str) -> Option<T> {
        let value = self.value(name).cloned().unwrap_or_default();
        self.problems.push(format!("`{name}` is {value}, expected {what}"));
        None
    }

    /// A rank.
    pub fn rank(&mut self, name: &str) -> Option<usize> {
        match self.value(name)?.as_u64().filter(|n| (1..=1 << 16).contains(n)) {
            Some(n) => Some(n as usize),
            None => self.expected(name, "a whole number from 1 to 65536"),
        }
    }

    /// A whole number.
    pub fn whole(&mut self, name: &str) -> Option<u64> {
        match self.value(name)?.as_u64() {
            Some(n) => Some(n),
            None => self.expected(name, "a whole number from 0"),
        }
    }

    /// A number above `least` and up to `most`.
    pub fn number(&mut self, name: &str, least: f64, most: f64) -> Option<f64> {
        match self.value(name)?.as_f64().filter(|n| *n > least && *n <= most) {
            Some(n) => Some(n),
            None if most.is_finite() => {
                self.expected(name, &format!("a number above {least}, {most} at most"))
            }
            None => self.expected(name, &format!("a number above {least}")),
        }
    }

    /// true or false.
    pub fn flag(&mut self, name: &str) -> bool {
        match self.value(name).map(Value::as_bool) {
            None => false,
            Some(Some(flag)) => flag,
            Some(None) => self.expected(name, "true or false").unwrap_or(false),
        }
    }

    /// A text.
    pub fn text(&mut self, name: &str) -> Option<String> {
        match self.value(name)?.as_str().map(str::to_owned) {
            Some(text) => Some(text),
            None => self.expected(name, "a text"),
        }
    }

    /// One of these words.
    pub fn choice<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Option<T> {
        let given = self.value(name)?.as_str();
        match words.iter().find(|(word, _)| given == Some(word)) {
            Some((_, value)) => Some(*value),
            None => {
                let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                self.expected(name, &format!("one of {}", words.join(", ")))
            }
        }
    }

    /// A dtype; `None` keeps each tensor's own.
    pub fn dtype(&mut self) -> Option<Float> {
        let words = [
            ("keep", None),
            ("fp32", Some(Float::F32)),
            ("fp16", Some(Float::F16)),
            ("bf16", Some(Float::BF16)),
        ];
        self.choice("dtype", &words).flatten()
    }

    /// Whether the key was given.
    pub fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// Whether the key was given as 0.
    pub fn is_zero(&self, name: &str) -> bool {
        self.value(name).and_then(Value::as_f64) == Some(0.0)
    }

    /// Two options that contradict each other.
    pub fn problem(&mut self, text: impl Into<String>) {
        self.problems.push(text.into());
    }

    /// `options` if all was well.
    pub fn finish<T>(self, options: T) -> Result<T> {
        match self.problems.len() {
            0 => Ok(options),
            _ => {
                let hint = format!("the keys are {}", self.known.join(", "));
                Err(Error::argument(format!("options: {}", self.problems.join("; ")), hint))
            }
        }
    }
}

/// How many letters must be put in, left out or exchanged.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let exchanged = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = exchanged.min(row[j] + 1).min(corner + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_problems_are_told_at_once() {
        let text = r#"{"rnak": 4, "rank": 0, "density": 2, "dtype": "int8", "norms": 1}"#;
        let mut read = Reader::new(text, &["rank", "density", "dtype", "norms"]).unwrap();
        assert_eq!(
            (read.rank("rank"), read.number("density", 0.0, 1.0), read.flag("norms")),
            (None, None, false)
        );
        assert_eq!(read.dtype(), None);
        let error = read.finish(()).unwrap_err();
        for part in [
            "`rnak` is not an option; the nearest is `rank`",
            "`rank` is 0",
            "`density` is 2",
            "int8",
            "`norms` is 1",
        ] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(error.hint().contains("rank, density"));
        assert!(Reader::new("[]", &[]).is_err() && Reader::new("{", &[]).is_err());
        assert!(Reader::new("", &[]).unwrap().finish(()).is_ok());
    }

    #[test]
    fn distances_count_letters() {
        for (a, b, n) in [("", "abc", 3), ("rank", "rank", 0), ("rnak", "rank", 2), ("conv", "conv_rank", 5)]
        {
            assert_eq!(distance(a, b), n);
        }
    }
}
