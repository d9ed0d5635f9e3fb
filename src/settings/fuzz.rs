//! What must hold of any configuration an operator may write.

use std::sync::LazyLock;

use super::{DEFAULTS, Effective, Fault, Faults, Layer, Settings, reader::is_secret};

/// A TOML file; behind a line of `---`, lines of `VARIABLE=value`.
pub fn settings(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let (file, environment) = text.split_once("\n---\n").unwrap_or((text, ""));
    let variables = environment.lines().filter_map(|line| line.split_once('='));
    // Files are none of this: a name that ends so is one of a file to read.
    let variables = variables.filter(|(name, _)| !name.ends_with("_FILE"));
    let variables: Vec<(String, String)> =
        variables.map(|(name, value)| (name.into(), value.into())).collect();
    match load(file, &variables) {
        Ok(settings) => {
            let effective = shown(&settings);
            // What is shown of the settings in force, written into a file, is the same settings.
            let file: String =
                effective.iter().map(|(key, value)| format!("{key} = {}\n", quoted(value))).collect();
            let again = load(&file, &[]);
            assert_eq!(again.as_ref().map(shown), Ok(effective), "{file}");
        }
        Err(Faults(faults)) => {
            assert!(!faults.is_empty());
            for fault in faults {
                assert!(!fault.key.is_empty() && !fault.message.is_empty() && !fault.source.is_empty());
                let told = is_secret(&fault.key) && fault.message.contains("found \"");
                assert!(!told, "{}: {}", fault.key, fault.message);
            }
        }
    }
}

fn load(file: &str, variables: &[(String, String)]) -> Result<Settings, Faults> {
    // The same each time, and more to read than most inputs.
    static DEFAULT: LazyLock<Result<Layer, Fault>> = LazyLock::new(|| Layer::toml("default", DEFAULTS));
    let mut faults = Vec::new();
    let environment = Layer::environment(variables.iter().cloned(), &mut faults);
    Settings::of([DEFAULT.clone(), Layer::toml("file", file), Ok(environment)], faults)
}

/// Keys and values in force, without the secrets.
fn shown(settings: &Settings) -> Vec<(&'static str, String)> {
    let shown = settings.effective().iter().filter(|effective| {
        assert!(!is_secret(effective.key) || matches!(effective.value.as_str(), "" | "(set)"));
        !is_secret(effective.key)
    });
    shown.map(|Effective { key, value, .. }| (*key, value.clone())).collect()
}

/// A basic string of TOML, which differs from one of JSON in this one character.
pub(super) fn quoted(value: &str) -> String {
    serde_json::Value::from(value).to_string().replace('\u{7f}', "\\u007f")
}
