//! Lines of a limited width: labelled rows, indented lists, and single values in the form that people read.

use serde_json::Value;

/// Columns of the page.
const WIDTH: usize = 100;
/// Columns of a row's label, with the blank behind it.
const LABEL: usize = 11;

/// Text under construction.
#[derive(Default)]
pub(super) struct Page(String);

impl Page {
    /// `label      text`, wrapped under itself; nothing without a text.
    pub(super) fn row(&mut self, label: &str, text: Option<String>) {
        if let Some(text) = text {
            self.wrapped(&format!("{label:<LABEL$}"), LABEL, &text, true);
        }
    }

    /// A row that is one line however long, so that a path can be copied.
    pub(super) fn path(&mut self, label: &str, text: Option<String>) {
        if let Some(text) = text {
            self.line(0, &format!("{label:<LABEL$}{text}"));
        }
    }

    /// One line however long: it begins with a path.
    pub(super) fn line(&mut self, indent: usize, text: &str) {
        self.0.extend([" ".repeat(indent).as_str(), shown(text).trim_end(), "\n"]);
    }

    /// A title and its entries, at most `limit` of them; nothing without entries. Names of modules stay whole.
    pub(super) fn list(
        &mut self,
        indent: usize,
        title: &str,
        entries: impl ExactSizeIterator<Item = String>,
        limit: usize,
    ) {
        let count = entries.len();
        if count == 0 {
            return;
        }
        self.line(indent, title);
        let inner = " ".repeat(indent + 2);
        for entry in entries.take(limit) {
            self.wrapped(&inner, indent + 6, &entry, false);
        }
        if let Some(more) = count.checked_sub(limit).filter(|more| *more > 0) {
            self.line(indent + 2, &format!("and {more} more"));
        }
    }

    /// The text, each line without blanks at its end.
    pub(super) fn finish(self) -> String {
        self.0
    }

    /// Breaks at blanks; a word wider than a line is broken too if `hard`, else it has its line to itself.
    fn wrapped(&mut self, before: &str, indent: usize, text: &str, hard: bool) {
        let room = WIDTH - indent;
        let (mut line, mut used) = (before.to_owned(), columns(before));
        let mut empty = true;
        let mut flush = |line: &mut String, used: &mut usize| {
            self.0.push_str(line.trim_end());
            self.0.push('\n');
            *line = " ".repeat(indent);
            *used = indent;
        };
        for word in shown(text).split(' ').filter(|word| !word.is_empty()) {
            let width = columns(word);
            if !empty && used + 1 + width > WIDTH {
                flush(&mut line, &mut used);
                empty = true;
            }
            if !empty {
                line.push(' ');
                used += 1;
            }
            empty = false;
            if !hard || width <= room {
                line.push_str(word);
                used += width;
                continue;
            }
            for c in word.chars() {
                if used + wide(c) > WIDTH {
                    flush(&mut line, &mut used);
                }
                line.push(c);
                used += wide(c);
            }
        }
        flush(&mut line, &mut used);
    }
}

/// The text as a terminal may show it: white space is a blank, other control characters and marks that turn the direction of writing
/// are replaced.
fn shown(text: &str) -> String {
    let replaced = |c: char| match c {
        c if c.is_whitespace() => ' ',
        c if c.is_control() => '\u{fffd}',
        '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' => {
            '\u{fffd}'
        }
        c => c,
    };
    text.chars().map(replaced).collect()
}

fn columns(text: &str) -> usize {
    text.chars().map(wide).sum()
}

/// Columns of a character: East Asian wide forms and emoji take two.
fn wide(c: char) -> usize {
    let wide = matches!(c,
        '\u{1100}'..='\u{115f}' | '\u{2e80}'..='\u{a4cf}' | '\u{ac00}'..='\u{d7a3}' | '\u{f900}'..='\u{faff}'
        | '\u{fe30}'..='\u{fe6f}' | '\u{ff00}'..='\u{ff60}' | '\u{ffe0}'..='\u{ffe6}' | '\u{1f300}'..='\u{1faff}'
        | '\u{20000}'..='\u{3fffd}');
    1 + usize::from(wide)
}

/// A text, number or boolean as people write it; nothing for the rest.
pub(super) fn value(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()).filter(|text| !text.is_empty()),
        Value::Bool(true) => Some("yes".into()),
        Value::Bool(false) => Some("no".into()),
        Value::Number(number) if number.is_f64() => number.as_f64().map(float),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The shortest digits that mean the number; those of an f32 where it came from one.
fn float(number: f64) -> String {
    let single = number as f32;
    let plain = number == 0.0 || (1e-4..1e9).contains(&number.abs());
    match (f64::from(single) == number, plain) {
        (true, true) => single.to_string(),
        (true, false) => format!("{single:e}"),
        (false, true) => number.to_string(),
        (false, false) => format!("{number:e}"),
    }
}

/// "1.5 GiB"
pub(super) fn size(bytes: u64) -> String {
    let mut count = bytes as f64;
    for unit in ["B", "KiB", "MiB"] {
        if count < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{count:.1} {unit}") };
        }
        count /= 1024.0;
    }
    format!("{count:.1} GiB")
}

/// "1 h 12 min"
pub(super) fn time(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}
