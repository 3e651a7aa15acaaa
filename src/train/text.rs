//! The text of a configuration as one object: JSON, or TOML as sd-scripts has it.

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Number, Value};
use std::collections::HashSet;
use std::fmt;
use toml::de::{DeTable, DeValue};

/// The object that a text describes; nothing at all is the empty one. The error lists every defect that can be told apart, with its line.
/// What JSON cannot say, times and numbers that are not finite, becomes text, which no option that wants a number takes.
pub(super) fn object(text: &str) -> Result<Map<String, Value>, Vec<String>> {
    // Editors of Windows begin a file with a byte order mark.
    let text = text.trim_start_matches('\u{feff}');
    match text.trim_start().starts_with('{') {
        true => from_json(text),
        false => from_toml(text),
    }
}

fn from_json(text: &str) -> Result<Map<String, Value>, Vec<String>> {
    let members: Members = serde_json::from_str(text).map_err(|e| vec![format!("not JSON: {e}")])?;
    let mut twice = Vec::new();
    let map = members.map("", &mut twice);
    if twice.is_empty() {
        Ok(map)
    } else {
        Err(twice)
    }
}

/// An object with all its members; serde_json's own keeps the last of two that have one name.
struct Members(Vec<(String, Node)>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Node {
    Object(Members),
    Other(Value),
}

impl Members {
    fn map(self, prefix: &str, twice: &mut Vec<String>) -> Map<String, Value> {
        let mut map = Map::new();
        for (name, node) in self.0 {
            let path = format!("{prefix}{name}");
            let value = match node {
                Node::Object(members) => Value::Object(members.map(&format!("{path}."), twice)),
                Node::Other(value) => value,
            };
            if map.insert(name, value).is_some() {
                twice.push(format!("`{path}` stands twice"));
            }
        }
        map
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        d.deserialize_map(Collect)
    }
}

fn from_toml(text: &str) -> Result<Map<String, Value>, Vec<String>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return Ok(table_of(table.get_ref()));
    }
    let mut lines = HashSet::new();
    let mut problems = Vec::new();
    for error in errors {
        let at = error.span().map_or(0, |span| span.start.min(text.len()));
        let start = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
        let line = text[..start].matches('\n').count() + 1;
        // What else is wrong with a line mostly follows from the first.
        if lines.insert(line) {
            let content = text[start..].lines().next().unwrap_or_default().trim();
            problems.push(format!("line {line}, `{content}`: {}", error.message()));
        }
    }
    problems[0].insert_str(0, "not TOML (nor JSON, which begins with a brace): ");
    Err(problems)
}

fn table_of(table: &DeTable) -> Map<String, Value> {
    table.iter().map(|(name, value)| (name.get_ref().to_string(), value_of(value.get_ref()))).collect()
}

fn value_of(value: &DeValue) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Boolean(flag) => Value::Bool(*flag),
        DeValue::Integer(n) => {
            let (digits, radix) = (n.as_str(), n.radix());
            let number = u64::from_str_radix(digits, radix).map(Number::from);
            let number = number.or_else(|_| i64::from_str_radix(digits, radix).map(Number::from));
            number.map_or_else(|_| Value::String(digits.to_owned()), Value::Number)
        }
        DeValue::Float(x) => {
            let number = x.as_str().parse().ok().and_then(Number::from_f64);
            number.map_or_else(|| Value::String(x.as_str().to_owned()), Value::Number)
        }
        DeValue::Datetime(time) => Value::String(time.to_string()),
        DeValue::Array(values) => Value::Array(values.iter().map(|v| value_of(v.get_ref())).collect()),
        DeValue::Table(table) => Value::Object(table_of(table)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_forms_of_one_configuration_are_one_object() {
        let json = r#"{"network_dim": 16, "learning_rate": 1e-4, "seed": 18446744073709551615, "output_name": "ä", "save_state": true,
            "optimizer_args": {"betas": [0.9, 0.99], "deep": {"n": -3}}}"#;
        let toml = "\u{feff}# a run\r\nnetwork_dim = 0x10\r\nlearning_rate = 1e-4\r\nseed = 18_446_744_073_709_551_615\r\n\
            output_name = \"ä\"\r\nsave_state = true\r\n[optimizer_args]\r\nbetas = [0.9, 0.99]\r\ndeep.n = -3\r\n";
        let (a, b) = (object(json).unwrap(), object(toml).unwrap());
        assert_eq!(a, b);
        assert_eq!(a["seed"], json!(u64::MAX));
        assert_eq!(object("[optimizer_args]\neps = 1").unwrap()["optimizer_args"], json!({"eps": 1}));
        assert!(object(" \n").unwrap().is_empty() && object("{}").unwrap().is_empty());
    }

    #[test]
    fn what_json_cannot_say_is_no_default() {
        let map = object("a = nan\nb = -inf\nc = 99999999999999999999\nd = 1979-05-27\ne = 1e999").unwrap();
        for (name, text) in [("a", "nan"), ("b", "-inf"), ("c", "99999999999999999999"), ("d", "1979-05-27")]
        {
            assert_eq!(map[name], json!(text));
        }
        assert!(map["e"].is_string());
    }

    #[test]
    fn every_defect_is_told_with_its_line() {
        let told = object("seed = 1\nseed = 2\n\nnetwork_alpha 3\nlr = [1,\n").unwrap_err().join("; ");
        for part in [
            "not TOML",
            "line 2, `seed = 2`: duplicate key",
            "line 4, `network_alpha 3`: ",
            "line 5, `lr = [1,`: ",
        ] {
            assert!(told.contains(part), "`{part}` is missing in: {told}");
        }
        let told = object("{\n \"a\": 1,\n \"b\" 2}").unwrap_err().join("; ");
        assert!(told.contains("not JSON") && told.contains("line 3"), "{told}");
        let told = object(r#"{"a": 1, "b": {"c": {"d": 1, "d": 1}}, "a": null}"#).unwrap_err();
        assert_eq!(told, ["`b.c.d` stands twice", "`a` stands twice"]);
        for nonsense in ["[]", "null", "3", "{} {}", "\"network_dim\"", "run.toml"] {
            assert!(object(nonsense).is_err(), "{nonsense}");
        }
    }
}
