//! JSON values in the text form that the data table has always shown: as Python prints them, lists
//! and objects as compact JSON, `null` as nothing. Analysts compare tables across relays.

use serde_json::value::RawValue;

/// The text of one cell.
pub(super) fn cell(value: &RawValue) -> String {
    let raw = value.get();
    match raw.as_bytes().first() {
        Some(b'"') => {
            serde_json::from_str::<String>(raw).map(|text| text.trim().to_owned()).unwrap_or_default()
        }
        Some(b'n') | None => String::new(),
        Some(b't') => "True".to_owned(),
        Some(b'f') => "False".to_owned(),
        Some(b'[' | b'{') => match serde_json::from_str::<serde_json::Value>(raw) {
            Ok(value) => value.to_string(),
            Err(_) => raw.to_owned(),
        },
        Some(_) => number(raw),
    }
}

/// A JSON number as Python prints it: integers as they stand, anything with a fraction or an
/// exponent as the shortest text of the double it denotes.
fn number(raw: &str) -> String {
    if !raw.contains(['.', 'e', 'E']) {
        return if raw == "-0" { "0".to_owned() } else { raw.to_owned() };
    }
    match raw.parse::<f64>() {
        Ok(number) => float(number),
        Err(_) => raw.to_owned(),
    }
}

/// Python's `repr` of a float: positional from 1e-4 up to 1e16, scientific outside.
fn float(number: f64) -> String {
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{number:e}"); // the shortest digits that read back as the same double
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let positional = format!("{number}");
        return if positional.contains('.') { positional } else { positional + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_look_as_the_table_has_always_shown_them() {
        for (json, text) in [
            (r#""  padded\n""#, "padded"),
            (r#""""#, ""),
            ("null", ""),
            ("true", "True"),
            ("false", "False"),
            ("5", "5"),
            ("-0", "0"),
            ("123456789012345678901234567890", "123456789012345678901234567890"),
            ("5.0", "5.0"),
            ("6.80", "6.8"),
            ("1e2", "100.0"),
            ("0.0001", "0.0001"),
            ("0.00001", "1e-05"),
            ("1e15", "1000000000000000.0"),
            ("1e16", "1e+16"),
            ("1.5E300", "1.5e+300"),
            ("-2.5e-10", "-2.5e-10"),
            ("1e999", "inf"),
            ("-0.0", "-0.0"),
            ("0.1", "0.1"),
            (r#"[ 1, "a" , {"b": null} ]"#, r#"[1,"a",{"b":null}]"#),
            ("[1e999]", "[1e999]"),
        ] {
            let value: Box<RawValue> = serde_json::from_str(json).unwrap();
            assert_eq!(cell(&value), text, "{json}");
        }
    }
}
