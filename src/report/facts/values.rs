//! Single values of a file's metadata: all are texts, some of them numbers, some JSON, some Python's `None`. Nothing here trusts a length.

use serde_json::{json, Value};
use std::collections::BTreeMap;

/// Bytes of one text that is kept; a longer one ends with an ellipsis.
const LONGEST_TEXT: usize = 4096;
/// Bytes of JSON that are parsed for one file. Tag counts of 100,000 captions stay below; a hostile file does not get to fill memory.
const MOST_JSON: usize = 8 << 20;

/// A file's metadata, and what of it could not be read.
pub(super) struct Source<'m> {
    metadata: &'m BTreeMap<String, String>,
    unreadable: Vec<Value>,
    json_left: usize,
}

impl<'m> Source<'m> {
    pub(super) fn new(metadata: &'m BTreeMap<String, String>) -> Self {
        Source { metadata, unreadable: Vec::new(), json_left: MOST_JSON }
    }

    /// The value of a key, without the blanks around it; `None` when the file says nothing there. "None" is Python's way to say so.
    pub(super) fn raw(&self, key: &str) -> Option<&'m str> {
        self.metadata
            .get(key)
            .map(|value| value.trim())
            .filter(|value| !matches!(*value, "" | "None" | "null"))
    }

    /// Whether the key stands there, whatever its value.
    pub(super) fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// The first of these keys that has a value, as text.
    pub(super) fn text(&self, keys: &[&str]) -> Option<Value> {
        keys.iter().find_map(|key| self.raw(key)).map(|value| json!(cut(value)))
    }

    /// The first of these keys that has a value, as a number or boolean where it is one.
    pub(super) fn scalar(&self, keys: &[&str]) -> Option<Value> {
        keys.iter().find_map(|key| self.raw(key)).map(scalar_text)
    }

    /// The JSON in a value; JSON of another kind than `wanted` is as unreadable as no JSON.
    pub(super) fn parsed(&mut self, key: &str, wanted: fn(&Value) -> bool) -> Option<Value> {
        let value = self.raw(key)?;
        let reason = match self.json_left.checked_sub(value.len()) {
            None => format!("is {} bytes long; of a file's JSON {MOST_JSON} bytes are read", value.len()),
            Some(left) => {
                self.json_left = left;
                match serde_json::from_str(value) {
                    Ok(value) if wanted(&value) => return Some(value),
                    Ok(_) => "is JSON of another kind than is usual there".to_owned(),
                    Err(error) => format!("is not JSON: {error}"),
                }
            }
        };
        self.unreadable.push(json!({"key": key, "reason": reason}));
        None
    }

    /// The object in a value of a key so general that others may keep plain text there.
    pub(super) fn braced(&mut self, key: &str) -> Option<Value> {
        self.raw(key).filter(|value| value.starts_with('{'))?;
        self.parsed(key, Value::is_object)
    }

    /// A moment, in seconds since 1970.
    pub(super) fn seconds(&self, key: &str) -> Option<f64> {
        self.raw(key)?.parse().ok().filter(|seconds: &f64| seconds.is_finite())
    }

    /// The day of a moment, `YYYY-MM-DD`, in UTC.
    pub(super) fn day(&self, key: &str) -> Option<Value> {
        const YEAR_10000: f64 = 253_402_300_800.0;
        let seconds = self.seconds(key).filter(|s| (0.0..YEAR_10000).contains(s))?;
        Some(json!(day_of(seconds as u64)))
    }

    pub(super) fn unreadable(self) -> Option<Value> {
        (!self.unreadable.is_empty()).then_some(Value::Array(self.unreadable))
    }
}

/// The day of a moment in seconds since 1970, `YYYY-MM-DD`, in UTC.
pub(crate) fn day_of(seconds: u64) -> String {
    let (year, month, day) = civil(seconds / 86400);
    format!("{year:04}-{month:02}-{day:02}")
}

/// A day of the Gregorian calendar from the days since 1970-01-01, by counting years that begin in March, so that the leap day is the last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // since 0000-03-01
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

/// At most [`LONGEST_TEXT`] bytes of a text.
pub(super) fn cut(text: &str) -> String {
    if text.len() <= LONGEST_TEXT {
        return text.to_owned();
    }
    let mut end = LONGEST_TEXT;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

/// A Python `str()` of a number or boolean as what it was; other texts as they are.
fn scalar_text(value: &str) -> Value {
    match value {
        "True" => return json!(true),
        "False" => return json!(false),
        _ => {}
    }
    if let Ok(number) = value.parse::<i64>() {
        return json!(number);
    }
    if let Ok(number) = value.parse::<u64>() {
        return json!(number);
    }
    match value.parse::<f64>() {
        Ok(number) if number.is_finite() => json!(number),
        _ => json!(cut(value)),
    }
}

/// A JSON value as a scalar: lists and objects as their own text.
pub(super) fn scalar(value: &Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::String(text) => match text.trim() {
            "" | "None" => None,
            text => Some(scalar_text(text)),
        },
        Value::Array(_) | Value::Object(_) => Some(json!(cut(&value.to_string()))),
        _ => Some(value.clone()),
    }
}

/// A JSON number, or a text that is one.
pub(super) fn number(value: &Value) -> Option<Value> {
    scalar(value).filter(Value::is_number)
}

/// A JSON text with content.
pub(super) fn text(value: &Value) -> Option<Value> {
    value.as_str().map(str::trim).filter(|text| !text.is_empty()).map(|text| json!(cut(text)))
}

/// A field of nested objects: `unet.learning_rate`.
pub(super) fn field<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(value, |value, name| value.get(name))
}

/// `(1024, 1024)`, `1024,1024`, `1024x1024` and `1024` as `1024x1024`; anything else as it stands.
pub(super) fn resolution(text: &str) -> String {
    let inner = text.trim_matches(|c: char| matches!(c, '(' | ')' | '[' | ']') || c.is_whitespace());
    let sides: Option<Vec<u32>> = inner
        .split([',', 'x'])
        .map(str::trim)
        .filter(|s| !s.is_empty())
        .take(3)
        .map(|side| side.parse().ok())
        .collect();
    match sides.as_deref() {
        Some([side]) => format!("{side}x{side}"),
        Some([width, height]) => format!("{width}x{height}"),
        _ => cut(text),
    }
}

/// A resolution in JSON: `[832, 1216]`, `1024` or one of the texts above.
pub(super) fn resolution_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(resolution(text)),
        Value::Number(side) => Some(resolution(&side.to_string())),
        Value::Array(sides) => match sides.as_slice() {
            [width, height] => Some(format!("{}x{}", width.as_u64()?, height.as_u64()?)),
            _ => None,
        },
        _ => None,
    }
}
