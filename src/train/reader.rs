//! Takes typed values out of JSON and collects everything that is wrong with them.

use super::optim::options::{Check, Options};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Takes values out of an object and collects what is wrong with them. An absent key and null are the default.
pub struct Reader<'a> {
    /// The object.
    pub map: &'a Map<String, Value>,
    /// What stands before its keys in a message.
    pub prefix: &'a str,
    /// What is wrong so far.
    pub problems: &'a mut Vec<String>,
}

impl<'a> Reader<'a> {
    /// Anything else that is wrong.
    pub fn problem(&mut self, text: String) {
        self.problems.push(text);
    }

    /// A value that was given.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    /// A value that is not what it should be.
    pub fn wrong(&mut self, name: &str, value: &Value, expected: &str) {
        self.problems.push(format!("`{}{name}` is {value}, expected {expected}", self.prefix));
    }

    /// A value that passes a check.
    pub fn checked(&mut self, name: &str, Check(expected, holds): &Check) -> Option<&'a Value> {
        let value = self.get(name)?;
        if !holds(value) {
            self.wrong(name, value, expected);
            return None;
        }
        Some(value)
    }

    /// A number of at least `least`.
    pub fn number(&mut self, name: &str, least: f64) -> Option<f64> {
        let value = self.get(name)?;
        let number = value.as_f64().filter(|&n| n.is_finite() && n >= least);
        if number.is_none() {
            self.wrong(name, value, if least == 0.0 { "a number of at least 0" } else { "a number above 0" });
        }
        number
    }

    /// A whole number in a range.
    pub fn whole(&mut self, name: &str, (least, most): (u64, u64)) -> Option<u64> {
        let value = self.get(name)?;
        let number = value.as_u64().filter(|n| (least..=most).contains(n));
        if number.is_none() {
            let range =
                if most == u64::MAX { format!("{least} or more") } else { format!("{least} to {most}") };
            self.wrong(name, value, &format!("a whole number, {range}"));
        }
        number
    }

    /// A share of something, from 0 to below 1.
    pub fn below_one(&mut self, name: &str) -> Option<f64> {
        let value = self.get(name)?;
        let share = value.as_f64().filter(|share| (0.0..1.0).contains(share));
        if share.is_none() {
            self.wrong(name, value, "a number from 0 to below 1");
        }
        share
    }

    /// True or false.
    pub fn flag(&mut self, name: &str) -> Option<bool> {
        let value = self.get(name)?;
        if !value.is_boolean() {
            self.wrong(name, value, "true or false");
        }
        value.as_bool()
    }

    /// An object of texts.
    pub fn texts(&mut self, name: &str) -> Option<BTreeMap<String, String>> {
        let value = self.get(name)?;
        let texts = serde_json::from_value(value.clone()).ok();
        if texts.is_none() {
            self.wrong(name, value, "an object of texts");
        }
        texts
    }

    /// A text.
    pub fn text(&mut self, name: &str) -> Option<String> {
        let value = self.get(name)?;
        if !value.is_string() {
            self.wrong(name, value, "text");
        }
        value.as_str().map(str::to_owned)
    }

    /// Case does not matter, as in sd-scripts.
    pub fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> Option<T> {
        let value = self.get(name)?;
        let chosen = value.as_str().and_then(|s| choices.iter().find(|(c, _)| c.eq_ignore_ascii_case(s)));
        if chosen.is_none() {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            let near = value.as_str().map(|text| nearest(text, &names));
            let near = near.map(|near| format!("; the nearest is {near}")).unwrap_or_default();
            self.wrong(name, value, &format!("{}{near}", names.join(", ")));
        }
        chosen.map(|(_, v)| *v)
    }

    /// A number of steps, or a share of `total`.
    pub fn steps(&mut self, name: &str, total: Option<u64>) -> u64 {
        let Some(value) = self.get(name) else { return 0 };
        let steps = match (value.as_u64(), value.as_f64()) {
            (Some(steps), _) => steps,
            (None, Some(share)) if (0.0..1.0).contains(&share) => match total {
                Some(total) => (share * total as f64) as u64,
                None => {
                    self.problem(format!(
                        "`{name}` is {share}, a share of max_train_steps, which is missing"
                    ));
                    return 0;
                }
            },
            _ => {
                self.wrong(name, value, "a whole number, or a share from 0 to below 1");
                return 0;
            }
        };
        if total.is_some_and(|total| steps > total) {
            self.problem(format!("`{name}` is {steps}, more than max_train_steps"));
        }
        steps
    }

    /// The optimizer that `optimizer_type` names, with what `optimizer_args` changes of its defaults.
    pub fn optimizer(&mut self) -> Options {
        let choices: Vec<_> = Options::NAMES.iter().map(|&name| (name, name)).collect();
        let name = self.choice("optimizer_type", &choices).unwrap_or("AdamW");
        // Every choice is the name of one.
        let options = Options::of(name).unwrap_or(Options::AdamW(Default::default()));
        let Some(map) = self.object("optimizer_args") else { return options };
        if self
            .get("optimizer_type")
            .is_some_and(|given| given.as_str().is_none_or(|n| Options::of(n).is_none()))
        {
            // Nobody knows what the arguments of an unknown optimizer may be.
            return options;
        }
        const PREFIX: &str = "optimizer_args.";
        let known: Vec<_> = options.checks().iter().map(|(name, _)| *name).collect();
        unknown_keys(map, PREFIX, &known, self.problems);
        let (mut read, mut arguments) =
            (Reader { map, prefix: PREFIX, problems: self.problems }, options.arguments());
        for (name, check) in options.checks() {
            if let Some(value) = read.checked(name, check) {
                arguments.insert((*name).to_owned(), value.clone());
            }
        }
        options.with(arguments).unwrap_or(options)
    }

    /// A nested object.
    pub fn object(&mut self, name: &str) -> Option<&'a Map<String, Value>> {
        let value = self.get(name)?;
        if !value.is_object() {
            self.wrong(name, value, "an object");
        }
        value.as_object()
    }
}

/// Tells of every key that is not known, with the nearest that is.
pub fn unknown_keys(map: &Map<String, Value>, prefix: &str, known: &[&str], problems: &mut Vec<String>) {
    for name in map.keys().filter(|name| !known.contains(&name.as_str())) {
        let near = nearest(name, known);
        problems.push(format!("`{prefix}{name}` is not an option; the nearest is `{prefix}{near}`"));
    }
}

fn nearest<'a>(name: &str, known: &[&'a str]) -> &'a str {
    known.iter().min_by_key(|k| distance(name, k)).unwrap_or(&"")
}

/// Levenshtein's distance, without regard to case.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.chars().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.chars().count()]
}
