//! The token's text: its strict form (RFC 7515, RFC 7519) and the claims in it. It reads; it must
//! not decide whom to trust. Nothing read here may be used before the signature is verified, but
//! for `jwks_host`, which says where to look for the key.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::AuthError;

/// The longest token read at all.
const TOKEN: usize = 8192;
/// The longest key id looked up.
const KID: usize = 256;
/// The longest API key taken.
const API_KEY: usize = 256;
/// How many entities per observable where the token does not say.
const DEFAULT_LIMIT: u32 = 100;
/// The most entities per observable, whatever the token says.
const LARGEST_LIMIT: u32 = 1000;

/// A token taken apart, not yet verified.
#[derive(Debug)]
pub(super) struct Jwt<'a> {
    /// What was signed: header and payload as they came.
    pub(super) message: &'a str,
    /// The signature, in base64url.
    pub(super) signature: &'a str,
    pub(super) header: Header,
    pub(super) claims: Claims,
}

#[derive(Debug, Deserialize)]
pub(super) struct Header {
    alg: Option<Value>,
    kid: Option<Value>,
    typ: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    crit: Option<Value>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Claims {
    #[serde(default, deserialize_with = "present")]
    jwks_host: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    aud: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    exp: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    nbf: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    iat: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    iss: Option<Value>,
    api_key: Option<Value>,
    host: Option<Value>,
    #[serde(rename = "CTR_ENTITIES_LIMIT")]
    entities_limit: Option<Value>,
}

/// `null` is a value here: a claim that is present and wrong, not an absent one.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl<'a> Jwt<'a> {
    /// Takes `token` apart: three parts in strict base64url, two JSON objects without repeated
    /// keys, nothing critical that we do not understand.
    pub(super) fn parse(token: &'a str) -> Result<Self, AuthError> {
        if token.len() > TOKEN {
            return Err(AuthError::Malformed);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(AuthError::Malformed)?;
        let (header, payload) = message.split_once('.').ok_or(AuthError::Malformed)?;
        URL_SAFE_NO_PAD.decode(signature).map_err(|_| AuthError::Malformed)?;
        let header: Header = part(header)?;
        // RFC 7515 §4.1.11: an extension marked critical that is not understood spoils the token,
        // and none is understood here.
        if header.crit.is_some() || !header.typ.as_ref().is_none_or(is_jwt) {
            return Err(AuthError::Malformed);
        }
        Ok(Self { message, signature, header, claims: part(payload)? })
    }
}

fn is_jwt(typ: &Value) -> bool {
    typ.as_str().is_some_and(|typ| typ.eq_ignore_ascii_case("JWT"))
}

fn part<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, AuthError> {
    let json = URL_SAFE_NO_PAD.decode(text).map_err(|_| AuthError::Malformed)?;
    // serde alone would take a list for a struct, too.
    if json.trim_ascii_start().first() != Some(&b'{') {
        return Err(AuthError::Malformed);
    }
    // Looked at as a whole: serde_json alone would skip bad bytes in members nobody reads.
    let json = String::from_utf8(json).map_err(|_| AuthError::Malformed)?;
    serde_json::from_str(&json).map_err(|_| AuthError::Malformed)
}

impl Header {
    /// The key id, if it is one that can be looked up.
    pub(super) fn kid(&self) -> Option<&str> {
        self.kid.as_ref()?.as_str().filter(|kid| kid.len() <= KID)
    }

    pub(super) fn is_rs256(&self) -> bool {
        self.alg.as_ref().and_then(Value::as_str) == Some("RS256")
    }
}

impl Claims {
    /// The key issuer: `Ok(None)` where the claim is not text.
    pub(super) fn jwks_host(&self) -> Result<Option<&str>, AuthError> {
        self.jwks_host.as_ref().map(Value::as_str).ok_or(AuthError::MissingIssuer)
    }

    /// Checks `exp`, `nbf` and `iat` against `now`, Unix seconds both, with `leeway` seconds. The
    /// answer is when the token expires.
    pub(super) fn times(&self, now: f64, leeway: f64, require_exp: bool) -> Result<Option<f64>, AuthError> {
        let date = |claim: &Option<Value>| claim.as_ref().map(numeric_date).transpose();
        let (exp, nbf, iat) = (date(&self.exp)?, date(&self.nbf)?, date(&self.iat)?);
        if self.iss.as_ref().is_some_and(|iss| !iss.is_string()) || (require_exp && exp.is_none()) {
            return Err(AuthError::Malformed);
        }
        if exp.is_some_and(|exp| now > exp + leeway) {
            return Err(AuthError::Expired);
        }
        if [nbf, iat].iter().flatten().any(|start| now + leeway < *start) {
            return Err(AuthError::NotYetValid);
        }
        Ok(exp)
    }

    /// The audiences, where the claim is a text or a list of texts.
    pub(super) fn audiences(&self) -> Vec<String> {
        let texts = match &self.aud {
            Some(Value::String(audience)) => Some(vec![audience.clone()]),
            Some(Value::Array(list)) => list.iter().map(|item| item.as_str().map(String::from)).collect(),
            _ => None,
        };
        texts.unwrap_or_default()
    }

    /// API key and host, as they were typed in, but for what pasting leaves around them.
    pub(super) fn credentials(&self) -> Result<(&str, &str), AuthError> {
        let (Some(Value::String(key)), Some(Value::String(host))) = (&self.api_key, &self.host) else {
            return Err(AuthError::MissingClaims);
        };
        let (key, host) = (pasted(key), pasted(host));
        let sound = (1..=API_KEY).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic());
        if sound { Ok((key, host)) } else { Err(AuthError::MissingClaims) }
    }

    /// How many sightings at most per observable.
    ///
    /// A positive integer, a decimal string (of any script's digits, with blanks around it, a
    /// leading plus or zeros), or a number with a fraction, which is cut off; everything else
    /// means the default, and nothing means more than a thousand.
    pub(super) fn entities_limit(&self) -> u32 {
        let limit = match &self.entities_limit {
            Some(Value::Number(number)) => number.as_f64(),
            Some(Value::String(text)) => decimal(text),
            _ => None,
        };
        match limit {
            Some(limit) if limit >= f64::from(LARGEST_LIMIT) => LARGEST_LIMIT,
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 1 and the largest"
            )]
            Some(limit) if limit >= 1.0 => limit as u32,
            _ => DEFAULT_LIMIT,
        }
    }
}

/// `text` without the blanks and line breaks around it, invisible ones of web pages and spreadsheets among them.
fn pasted(text: &str) -> &str {
    let invisible =
        |c: char| matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}' | '\u{feff}');
    text.trim_matches(|c: char| c.is_whitespace() || invisible(c))
}

/// A point in time (RFC 7519 §2), as a number or as a number in a string.
fn numeric_date(value: &Value) -> Result<f64, AuthError> {
    let date = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    };
    date.filter(|date| date.is_finite()).ok_or(AuthError::Malformed)
}

/// The value of a decimal string, whatever script its digits are of.
fn decimal(text: &str) -> Option<f64> {
    let text = text.trim();
    let digits = text.strip_prefix('+').unwrap_or(text);
    let value = |digits: &str| {
        digits.chars().try_fold(0.0, |value, char| Some(value * 10.0 + f64::from(digit(char)?)))
    };
    if digits.is_empty() { None } else { value(digits) }
}

/// The value of a decimal digit. Unicode has them in runs of ten, zero first, some runs directly
/// one after the other.
fn digit(char: char) -> Option<u32> {
    use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};
    let is_digit = |c: &char| c.general_category() == GeneralCategory::DecimalNumber;
    if char.is_ascii_digit() || !is_digit(&char) {
        return char.to_digit(10);
    }
    let before = (1..=u32::from(char)).map_while(|back| char::from_u32(u32::from(char) - back));
    u32::try_from(before.take_while(is_digit).count() % 10).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token(header: &str, payload: &str, signature: &str) -> String {
        let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.{signature}", encode(header), encode(payload))
    }

    fn claims(payload: &str) -> Claims {
        serde_json::from_str(payload).unwrap()
    }

    const HEADER: &str = r#"{"alg":"RS256","kid":"k"}"#;

    #[test]
    fn a_token_has_three_parts_of_strict_base64url_and_json_objects() {
        assert!(Jwt::parse(&token(HEADER, "{}", "AAAA")).is_ok());
        assert!(Jwt::parse(&token(HEADER, " \n{} ", "")).is_ok());
        let good = token(HEADER, "{}", "AAAA");
        // Not every length is one of base64's; of two in a row one is.
        let longest = ["{}", "{ }"].map(|payload| {
            let unsigned = token(HEADER, payload, "");
            format!("{unsigned}{}", "A".repeat(TOKEN - unsigned.len()))
        });
        assert!(longest.iter().any(|token| Jwt::parse(token).is_ok()));
        for bad in [
            "",
            ".",
            "..",
            "a.b.c",
            "...",
            &format!("{good}.x"),
            &format!("{good}=="),
            &format!("{good}!*!*"),
            &good.replace("AAAA", "AAB"), // not the canonical spelling of its bytes
            &format!("{good}{}", "A".repeat(TOKEN)),
            &token("{bad", "{}", ""),
            &token(HEADER, "[]", ""),
            &token(HEADER, "null", ""),
            &token("[\"RS256\"]", "{}", ""),
            &token(HEADER, "\u{feff}{}", ""),
            &token(HEADER, r#"{"x":NaN}"#, ""),
            &token(HEADER, r#"{"api_key":"a","api_key":"b"}"#, ""),
            &token(r#"{"alg":"RS256","alg":"none"}"#, "{}", ""),
            &token(r#"{"alg":"RS256","crit":["exotic"]}"#, "{}", ""),
            &token(r#"{"alg":"RS256","crit":null}"#, "{}", ""),
            &token(r#"{"alg":"RS256","crit":["b64"],"b64":false}"#, "{}", ""),
            &token(r#"{"alg":"RS256","typ":"JWE"}"#, "{}", ""),
            &token(r#"{"alg":"RS256","typ":5}"#, "{}", ""),
            &token(HEADER, r#"{"x":"?"}"#, "").replace(
                &URL_SAFE_NO_PAD.encode(r#"{"x":"?"}"#),
                &URL_SAFE_NO_PAD.encode(b"{\"x\":\"\xff\"}"),
            ),
        ] {
            assert_eq!(Jwt::parse(bad).err(), Some(AuthError::Malformed), "{bad}");
        }
    }

    #[test]
    fn key_ids_are_texts_of_bearable_length() {
        let kid = |json: &str| {
            let token = token(&format!(r#"{{"alg":"RS256"{json}}}"#), "{}", "");
            Jwt::parse(&token).unwrap().header.kid().map(String::from)
        };
        assert_eq!(kid(r#","kid":"a""#), Some("a".into()));
        let longest = "a".repeat(KID);
        assert_eq!(kid(&format!(r#","kid":"{longest}""#)), Some(longest));
        for json in [
            "",
            r#","kid":null"#,
            r#","kid":5"#,
            r#","kid":["a"]"#,
            &format!(r#","kid":"{}""#, "a".repeat(KID + 1)),
        ] {
            assert_eq!(kid(json), None);
        }
    }

    #[test]
    fn times_are_checked_when_present() {
        let check = |payload: &str| claims(payload).times(1_000_000.0, 300.0, false);
        assert_eq!(check("{}"), Ok(None));
        for (payload, outcome) in [
            (r#"{"exp":1000000}"#, Ok(Some(1_000_000.0))),
            (r#"{"exp":999700}"#, Ok(Some(999_700.0))),
            (r#"{"exp":999699.5}"#, Err(AuthError::Expired)),
            (r#"{"exp":0}"#, Err(AuthError::Expired)),
            (r#"{"exp":-1}"#, Err(AuthError::Expired)),
            (r#"{"exp":1e300}"#, Ok(Some(1e300))),
            (r#"{"exp":18446744073709551615}"#, Ok(Some(18_446_744_073_709_551_615.0))),
            (r#"{"exp":"1000000"}"#, Ok(Some(1_000_000.0))),
            (r#"{"exp":"1"}"#, Err(AuthError::Expired)),
            (r#"{"exp":"tomorrow"}"#, Err(AuthError::Malformed)),
            (r#"{"exp":"1e9"}"#, Err(AuthError::Malformed)),
            (r#"{"exp":"+1000000"}"#, Err(AuthError::Malformed)),
            (r#"{"exp":""}"#, Err(AuthError::Malformed)),
            (r#"{"exp":null}"#, Err(AuthError::Malformed)),
            (r#"{"exp":true}"#, Err(AuthError::Malformed)),
            (r#"{"exp":[1]}"#, Err(AuthError::Malformed)),
            (r#"{"nbf":1000300}"#, Ok(None)),
            (r#"{"nbf":1000301}"#, Err(AuthError::NotYetValid)),
            (r#"{"nbf":"x"}"#, Err(AuthError::Malformed)),
            (r#"{"iat":1000301}"#, Err(AuthError::NotYetValid)),
            (r#"{"iat":1}"#, Ok(None)),
            (r#"{"iss":"IROH Auth"}"#, Ok(None)),
            (r#"{"iss":5}"#, Err(AuthError::Malformed)),
        ] {
            assert_eq!(check(payload), outcome, "{payload}");
        }
        assert_eq!(claims("{}").times(0.0, 300.0, true), Err(AuthError::Malformed));
    }

    #[test]
    fn audiences_are_a_text_or_a_list_of_texts() {
        let audiences = |payload: &str| claims(payload).audiences();
        assert_eq!(audiences(r#"{"aud":"a"}"#), ["a"]);
        assert_eq!(audiences(r#"{"aud":["a","b"]}"#), ["a", "b"]);
        for payload in [
            "{}",
            r#"{"aud":null}"#,
            r#"{"aud":5}"#,
            r#"{"aud":["a",5]}"#,
            r#"{"aud":{"a":1}}"#,
            r#"{"aud":[]}"#,
        ] {
            assert!(audiences(payload).is_empty(), "{payload}");
        }
    }

    #[test]
    fn limits_are_read_as_they_always_were_and_capped() {
        for (json, limit) in [
            ("1", 1),
            ("7", 7),
            ("1000", 1000),
            ("1001", 1000),
            ("0", 100),
            ("-1", 100),
            ("2.9", 2),
            ("0.5", 100),
            ("3.0", 3),
            ("1e30", 1000),
            ("null", 100),
            ("false", 100),
            ("true", 100),
            ("[3]", 100),
            ("{}", 100),
            (r#""3""#, 3),
            (r#""003""#, 3),
            (r#"" +3 ""#, 3),
            (r#""3.0""#, 100),
            (r#""-3""#, 100),
            (r#""""#, 100),
            (r#""+""#, 100),
            (r#""٣""#, 3),
            (r#""３０""#, 30),
            (r#""٩९""#, 99),
            (r#""½""#, 100),
            (r#""99999999999999999999999""#, 1000),
            (r#""1_0""#, 100),
            (r#""0""#, 100),
        ] {
            let claims = claims(&format!(r#"{{"CTR_ENTITIES_LIMIT":{json}}}"#));
            assert_eq!(claims.entities_limit(), limit, "{json}");
        }
        assert_eq!(claims(r#"{"ctr_entities_limit":2}"#).entities_limit(), 100);
    }

    #[test]
    fn the_module_type_asks_for_the_claims_that_are_read() {
        let module: Value =
            serde_json::from_str(include_str!("../../deploy/securex/module_type.json")).unwrap();
        let asked = module["configuration_spec"].as_array().unwrap().iter();
        let mut asked: Vec<&str> = asked.map(|field| field["key"].as_str().unwrap()).collect();
        asked.sort_unstable();
        assert_eq!(asked, ["custom_CTR_ENTITIES_LIMIT", "custom_api_key", "custom_host", "custom_jwks_host"]);
    }

    #[test]
    fn credentials_are_visible_texts() {
        for payload in [
            "{}",
            r#"{"api_key":"k"}"#,
            r#"{"host":"h"}"#,
            r#"{"api_key":"","host":"h"}"#,
            r#"{"api_key":null,"host":"h"}"#,
            r#"{"api_key":["k"],"host":"h"}"#,
            r#"{"api_key":"k","host":5}"#,
            r#"{"api_key":"a b","host":"h"}"#,
            r#"{"api_key":" \n","host":"h"}"#,
            r#"{"api_key":"k\nl","host":"h"}"#,
            r#"{"api_key":"k\u0000","host":"h"}"#,
        ] {
            assert_eq!(claims(payload).credentials(), Err(AuthError::MissingClaims), "{payload}");
        }
        // An empty or odd host is told apart later, where the URL that will not be called is named.
        assert_eq!(claims(r#"{"api_key":"k","host":""}"#).credentials(), Ok(("k", "")));
    }

    #[test]
    fn what_pasting_leaves_around_credentials_is_no_part_of_them() {
        for around in [" ", "\\n", "\\r\\n", "\\t ", "\\u00a0", "\\ufeff", "\\u200b \\n", "\\u202a"] {
            let payload =
                format!(r#"{{"api_key":"{around}good-key{around}","host":"{around}api.example{around}"}}"#);
            assert_eq!(claims(&payload).credentials(), Ok(("good-key", "api.example")), "{payload}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_apart_or_refused(text in "\\PC{0,60}|[A-Za-z0-9_.=-]{0,80}") {
            let _ = Jwt::parse(&text);
        }

        #[test]
        fn any_payload_gives_claims_or_is_refused(payload in "\\{(\"(exp|aud|host|api_key|CTR_ENTITIES_LIMIT)\":(null|5|-1e9|\"x\"|\\[1\\]|\\{\\})){0,1}\\}") {
            let parsed = token(HEADER, &payload, "");
            if let Ok(jwt) = Jwt::parse(&parsed) {
                prop_assert!((1..=LARGEST_LIMIT).contains(&jwt.claims.entities_limit()));
                let _ = (jwt.claims.times(0.0, 300.0, false), jwt.claims.audiences(), jwt.claims.credentials().is_ok());
            }
        }
    }
}
