//! Reads values and collects what is wrong with them. It owns the words of faults and that no secret is in one; it must
//! not know what values mean.

use std::{collections::BTreeMap, num::NonZeroUsize, time::Duration};

use aws_lc_rs::digest;
use figment::{
    Figment,
    value::{Dict, Num, Value},
};

use super::{
    Digests, Effective, Fault,
    keys::{self, Key, Kind},
    layer::Place,
    values::{self, Wrong},
};

/// The most of a value that is repeated.
const SHOWN: usize = 120;

pub(super) struct Reader {
    figment: Figment,
    /// All layers in one. `figment` would merge them again for every key.
    merged: Value,
    /// Where in its layer each key stands, by the layer's name.
    places: Vec<(String, BTreeMap<String, Place>)>,
    pub(super) faults: Vec<Fault>,
    pub(super) effective: Vec<Effective>,
    pub(super) digests: Digests,
}

impl Reader {
    pub(super) fn new(
        figment: Figment,
        places: Vec<(String, BTreeMap<String, Place>)>,
        faults: Vec<Fault>,
    ) -> Self {
        let merged = figment.find_value("").unwrap_or_else(|_| Dict::new().into());
        let (effective, digests) = (Vec::new(), Digests::new());
        Self { figment, merged, places, faults, effective, digests }
    }

    /// The value of `key`; `None` is a fault that has been noted.
    pub(super) fn value<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&str) -> Result<T, Wrong>,
    ) -> Option<T> {
        let value = self.optional(key, read)?;
        if value.is_none() {
            return self.fault(key, format!("expected {}, found nothing", expected(key)));
        }
        value
    }

    /// As [`Reader::value`]; a key that is absent or empty is `Some(None)`.
    pub(super) fn optional<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&str) -> Result<T, Wrong>,
    ) -> Option<Option<T>> {
        let Some(value) = self.find(key) else {
            return Some(None);
        };
        let Some(text) = text(&value) else {
            return self.fault(key, format!("expected {}, found {}", expected(key), form(&value)));
        };
        let text = values::bare(&text);
        self.note(key, text);
        if text.is_empty() {
            return Some(None);
        }
        let value = self.one(key, text, read)?;
        Some(Some(value))
    }

    /// The values of a list: a TOML list, or a text with commas or lines. What is listed twice is there once.
    pub(super) fn list<T: PartialEq>(
        &mut self,
        key: &'static str,
        read: impl Fn(&str) -> Result<T, Wrong>,
    ) -> Option<Vec<T>> {
        let texts: Option<Vec<String>> = match self.find(key) {
            None => Some(Vec::new()),
            Some(Value::Array(_, items)) => items.iter().map(text).collect(),
            // By name: `name = "10/s"` is `name=10/s`.
            Some(Value::Dict(_, named)) if key == "limiter.tenants" => {
                let each = named.iter().map(|(name, value)| {
                    let texts = match value {
                        Value::Array(_, items) => items.iter().map(text).collect::<Option<Vec<_>>>()?,
                        value => vec![text(value)?],
                    };
                    let windows = texts.iter().flat_map(|text| values::bare(text).split([',', '\n']));
                    Some(windows.map(|window| format!("{name}={}", values::bare(window))).collect::<Vec<_>>())
                });
                each.collect::<Option<Vec<_>>>().map(|each| each.concat())
            }
            Some(value) => text(&value).map(|text| vec![text]),
        };
        let Some(texts) = texts else {
            return self.fault(key, format!("expected {}, found something else", expected(key)));
        };
        let parts = || texts.iter().flat_map(|text| values::bare(text).split([',', '\n'])).map(values::bare);
        let items: Vec<&str> = parts().filter(|text| !text.is_empty()).collect();
        self.note(key, &items.join(","));
        if items.is_empty() && parts().count() > 1 {
            return self.fault(key, format!("expected {}, found commas only", expected(key)));
        }
        let mut values = Some(Vec::new());
        for text in items {
            // Each is read, whatever came of the others.
            let value = self.one(key, text, &read);
            values = values.and_then(|mut values: Vec<T>| {
                let value = value?;
                if !values.contains(&value) {
                    values.push(value);
                }
                Some(values)
            });
        }
        values
    }

    pub(super) fn duration(&mut self, key: &'static str) -> Option<Duration> {
        let kind = kind(key);
        self.value(key, |text| match kind {
            Some(Kind::Duration(bounds)) => {
                values::duration(text).and_then(|value| bounds.hold(value)).ok_or(None)
            }
            _ => Err(None),
        })
    }

    pub(super) fn number(&mut self, key: &'static str) -> Option<u64> {
        let kind = kind(key);
        self.value(key, |text| match kind {
            Some(Kind::Number(bounds)) => text.parse().ok().and_then(|value| bounds.hold(value)).ok_or(None),
            _ => Err(None),
        })
    }

    pub(super) fn at_least_one(&mut self, key: &'static str) -> Option<NonZeroUsize> {
        let number = self.number(key)?;
        let number = usize::try_from(number).ok().and_then(NonZeroUsize::new);
        number.or_else(|| self.fault(key, format!("expected {}", expected(key))))
    }

    pub(super) fn size(&mut self, key: &'static str) -> Option<u64> {
        let kind = kind(key);
        self.value(key, |text| match kind {
            Some(Kind::Size(bounds)) => values::size(text).and_then(|value| bounds.hold(value)).ok_or(None),
            _ => Err(None),
        })
    }

    pub(super) fn share(&mut self, key: &'static str) -> Option<f64> {
        let kind = kind(key);
        self.value(key, |text| match kind {
            Some(Kind::Share(bounds)) => text.parse().ok().and_then(|value| bounds.hold(value)).ok_or(None),
            _ => Err(None),
        })
    }

    pub(super) fn flag(&mut self, key: &'static str) -> Option<bool> {
        self.value(key, values::any)
    }

    /// Whether any layer sets `key`.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.merged.find_ref(key).is_some()
    }

    /// Whether `key` is as it was compiled in.
    pub(super) fn is_default(&self, key: &str) -> bool {
        self.source(key) == "default"
    }

    /// Where the value of `key` comes from.
    pub(super) fn source(&self, key: &str) -> String {
        let found = self.merged.find_ref(key).and_then(|value| self.figment.get_metadata(value.tag()));
        let Some(layer) = found.map(|found| found.name.as_ref()) else { return "default".to_owned() };
        let places = self.places.iter().find(|(name, _)| name == layer).map(|(_, places)| places);
        match places.and_then(|places| places.get(key)) {
            Some(Place::Variable(variable)) => format!("environment variable {variable}"),
            Some(Place::Line(line)) if layer != "default" => format!("{layer}, line {line}"),
            _ => layer.to_owned(),
        }
    }

    pub(super) fn fault<T>(&mut self, key: &'static str, message: impl Into<String>) -> Option<T> {
        let fault = Fault { key: key.to_owned(), source: self.source(key), message: message.into() };
        if !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
        None
    }

    fn one<T>(
        &mut self,
        key: &'static str,
        text: &str,
        read: impl FnOnce(&str) -> Result<T, Wrong>,
    ) -> Option<T> {
        // Some readers would leave them out without a word.
        let read = match text.chars().any(char::is_control) {
            true => Err(Some("there is a control character or a line's end in it".to_owned())),
            false => read(text),
        };
        read.map_err(|why| {
            let found = match is_secret(key) {
                true => "something else (not shown)".to_owned(),
                false if text.chars().count() > SHOWN => {
                    format!("{:?} and more", text.chars().take(SHOWN).collect::<String>())
                }
                false => format!("{text:?}"),
            };
            let why = why.map(|why| format!(": {why}")).unwrap_or_default();
            self.fault::<()>(key, format!("expected {}, found {found}{why}", expected(key)));
        })
        .ok()
    }

    fn find(&self, key: &str) -> Option<Value> {
        self.merged.find_ref(key).cloned()
    }

    fn note(&mut self, key: &'static str, text: &str) {
        if self.effective.iter().any(|noted| noted.key == key) {
            return;
        }
        let value = if is_secret(key) && !text.is_empty() { "(set)" } else { text };
        self.effective.push(Effective { key, value: value.to_owned(), source: self.source(key) });
        let mut digest = [0; 32];
        digest.copy_from_slice(digest::digest(&digest::SHA256, text.as_bytes()).as_ref());
        self.digests.insert(key, digest);
    }
}

fn kind(key: &str) -> Option<Kind> {
    keys::find(key).map(|key| key.kind)
}

fn expected(key: &str) -> String {
    kind(key).map(|kind| kind.to_string()).unwrap_or_default()
}

/// Whether the value of that key is never shown.
pub(super) fn is_secret(name: &str) -> bool {
    keys::find(name).is_some_and(|Key { secret, .. }| *secret)
}

/// A scalar as text: `12`, `true` and `"12"` are the same to whoever reads a file or a variable.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(_, text) => Some(text.clone()),
        Value::Bool(_, value) => Some(value.to_string()),
        Value::Num(_, Num::F64(number)) => Some(number.to_string()),
        Value::Num(_, number) => number
            .to_i128()
            .map(|number| number.to_string())
            .or_else(|| number.to_u128().map(|n| n.to_string())),
        _ => None,
    }
}

/// What a value is that is no scalar.
fn form(value: &Value) -> &'static str {
    match value {
        Value::Array(..) => "a list",
        Value::Dict(..) => "a table",
        _ => "something else",
    }
}
