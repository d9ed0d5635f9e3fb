//! Where values come from: the defaults, a TOML file, the environment. It owns how keys are spelled in each and what
//! is said of a key there is not; it must not know what values mean.

use std::{collections::BTreeMap, path::Path};

use figment::{
    Metadata, Profile, Provider,
    providers::{Format, Toml},
    value::{Dict, Map, Tag, Value},
};
use toml_edit::{ImDocument, Item, TableLike};

use super::{
    Fault,
    keys::{KEYS, Key},
    values,
};

/// The name of the layer of environment variables.
pub(super) const ENVIRONMENT: &str = "environment";
/// The most bytes of a file of settings, and of a secret's.
const SETTINGS: u64 = 1 << 20;
const SECRET: u64 = 64 << 10;

/// One source of values.
#[derive(Clone, Default)]
pub(super) struct Layer {
    pub(super) name: String,
    values: Dict,
    /// The variables that set keys, where that is not the usual one; lines of a file.
    pub(super) places: BTreeMap<String, Place>,
}

/// Where in its layer a key stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In this line.
    Line(usize),
    /// In this variable.
    Variable(String),
}

impl Layer {
    pub(super) fn toml(name: &str, text: &str) -> Result<Self, Fault> {
        let values = Toml::from_str::<Dict>(text).map_err(|error| {
            // Not the line itself, as the error's own text has it: there may be a secret in it.
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let (line, column) =
                (before.split('\n').count(), before.rsplit('\n').next().map_or(0, str::len) + 1);
            let message = error.message().trim().replace('\n', ", ");
            Fault {
                key: "(file)".to_owned(),
                source: name.to_owned(),
                message: format!("line {line}, column {column}: {message}"),
            }
        })?;
        Ok(Self { name: name.to_owned(), values, places: lines(text) })
    }

    pub(super) fn file(path: &Path) -> Result<Self, Fault> {
        let name = format!("file {}", path.display());
        let text = values::file(path, SETTINGS).map_err(|message| Fault {
            key: "(file)".to_owned(),
            source: name.clone(),
            message,
        })?;
        Self::toml(&name, &text)
    }

    /// The variables that begin with `RELAY_`. What none of them can mean is a fault, too.
    pub(super) fn environment(
        variables: impl IntoIterator<Item = (String, String)>,
        faults: &mut Vec<Fault>,
    ) -> Self {
        let mut layer = Self { name: ENVIRONMENT.to_owned(), ..Self::default() };
        for (variable, value) in variables {
            if !variable.starts_with("RELAY_") || variable == "RELAY_CONFIG" {
                continue;
            }
            let source = format!("environment variable {variable}");
            let plain = KEYS.iter().find(|key| key.variable() == variable);
            let from_file = || KEYS.iter().find(|key| key.secret && variable == key.variable() + "_FILE");
            let (key, value) = match (plain, from_file()) {
                (Some(key), _) if value.contains(char::REPLACEMENT_CHARACTER) => {
                    (key, Err("it is not UTF-8".to_owned()))
                }
                (Some(key), _) => (key, Ok(value)),
                (None, Some(key)) => {
                    let read = values::file(Path::new(values::bare(&value)), SECRET);
                    (key, read.map_err(|why| format!("the file cannot be read: {why}")))
                }
                (None, None) if named(&variable).is_some() => {
                    // Each has a key of its own, whose last part is the tenant's name.
                    if let Some(name) = named(&variable) {
                        insert(&mut layer.values, &name, value);
                        layer.places.insert(name, Place::Variable(variable));
                    }
                    continue;
                }
                (None, None) => {
                    let message = unknown(&variable, KEYS.iter().map(Key::variable));
                    faults.push(Fault { key: variable, source: ENVIRONMENT.to_owned(), message });
                    continue;
                }
            };
            let mut fault = |message: String| {
                faults.push(Fault { key: key.name.to_owned(), source: source.clone(), message });
            };
            match value {
                Ok(_) if layer.places.contains_key(key.name) => {
                    fault(format!("set twice: {} and as a file", key.variable()));
                }
                Ok(value) => {
                    insert(&mut layer.values, key.name, value);
                    layer.places.insert(key.name.to_owned(), Place::Variable(variable));
                }
                Err(why) => fault(why),
            }
        }
        layer
    }

    pub(super) fn report_unknown_keys(&self, faults: &mut Vec<Fault>) {
        let mut names = Vec::new();
        flatten("", &self.values, &mut names);
        for name in names {
            if !KEYS.iter().any(|key| key.name == name) && !name.starts_with("limiter.tenants.") {
                let message = unknown(&name, KEYS.iter().map(|key| key.name.to_owned()));
                let source = match self.places.get(&name) {
                    Some(Place::Line(line)) => format!("{}, line {line}", self.name),
                    _ => self.name.clone(),
                };
                faults.push(Fault { key: name, source, message });
            }
        }
    }
}

/// The key of a tenant's own quotas, where `variable` sets them.
fn named(variable: &str) -> Option<String> {
    let name = variable.strip_prefix("RELAY_LIMITER_TENANTS_").filter(|name| !name.is_empty())?;
    Some(format!("limiter.tenants.{}", name.to_ascii_lowercase()))
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

/// In which line of a TOML file each key stands.
fn lines(text: &str) -> BTreeMap<String, Place> {
    fn walk(text: &str, prefix: &str, table: &dyn TableLike, lines: &mut BTreeMap<String, Place>) {
        for (name, item) in table.iter() {
            let name = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
            match item.as_table_like() {
                Some(table) => walk(text, &name, table, lines),
                None => {
                    let before = item.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
                    lines.insert(name, Place::Line(before.split('\n').count()));
                }
            }
        }
    }
    let mut lines = BTreeMap::new();
    if let Ok(document) = ImDocument::parse(text)
        && let Item::Table(table) = document.as_item()
    {
        walk(text, "", table, &mut lines);
    }
    lines
}

/// Puts `text` at the dotted place `name`.
fn insert(values: &mut Dict, name: &str, text: String) {
    match name.split_once('.') {
        None => {
            values.insert(name.to_owned(), text.into());
        }
        Some((table, rest)) => {
            let table =
                values.entry(table.to_owned()).or_insert_with(|| Value::Dict(Tag::Default, Dict::new()));
            if let Value::Dict(_, table) = table {
                insert(table, rest, text);
            }
        }
    }
}

/// The dotted names of all values in `values`.
fn flatten(prefix: &str, values: &Dict, names: &mut Vec<String>) {
    for (name, value) in values {
        let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Dict(_, table) => flatten(&name, table, names),
            _ => names.push(name),
        }
    }
}

fn unknown(name: &str, known: impl Iterator<Item = String>) -> String {
    const FAR: usize = 4;
    let near = known.filter(|known| known.len().abs_diff(name.len()) <= FAR);
    let closest = near.map(|known| (strsim::damerau_levenshtein(name, &known), known)).min();
    match closest {
        Some((distance, known)) if distance <= FAR => format!("there is no such key; did you mean {known}?"),
        _ => "there is no such key".to_owned(),
    }
}
