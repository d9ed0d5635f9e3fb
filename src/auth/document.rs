//! The document in which a key issuer publishes its keys (RFC 7517): brought over HTTPS, read into keys
//! that can be used. It must not know when it is wanted, nor what came before.

use std::{collections::HashMap, time::Duration};

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, Method};
use jsonwebtoken::DecodingKey;
use serde_json::Value;
use tokio::time::Instant;

use super::IssuerAddress;
use crate::{
    egress::{Http, client::Call},
    metrics::{Label, Success},
    trace::{self, Stage},
};

/// How long one fetch may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The most bytes of a key set; it also bounds how many keys there can be.
pub(super) const BODY: usize = 64 << 10;
/// Numbers of keys. RFC 7518 §2 has no padding; some issuers pad nevertheless.
const NUMBER: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Usable keys by their id.
pub(super) type Keys = HashMap<String, DecodingKey>;

/// Fetches the keys behind an issuer's address, or says in a word why there are none.
pub(super) async fn fetch(http: Http, address: IssuerAddress) -> Result<Keys, String> {
    let call = Call {
        method: Method::GET,
        host: address.host(),
        path: address.jwks_path(),
        headers: HeaderMap::new(),
        json: None,
        limit: BODY,
        deadline: Instant::now() + TIMEOUT,
    };
    let fetching = async {
        let reply = http.send(call).await.map_err(|error| error.to_string())?;
        if !reply.status.is_success() {
            return Err(format!("status {}", reply.status.as_u16()));
        }
        import(&reply.body).ok_or_else(|| "not a key set".to_owned())
    };
    let fetched = trace::stage(Stage::KeySet, fetching, |outcome, facts| {
        if outcome.is_err() {
            facts.failed(Success::Failed.as_str());
        }
    });
    fetched.await
}

/// The usable keys of a key set (RFC 7517); `None` when `body` is none.
///
/// Keys that cannot verify RS256 are left out: other types, other uses, other algorithms, weak or
/// malformed ones. Of several keys with one id the first usable one counts. A document in which no
/// key has an id is not a key set that tokens could refer to.
pub(super) fn import(body: &[u8]) -> Option<Keys> {
    let document: Value = serde_json::from_slice(body).ok()?;
    let entries = document.as_object()?.get("keys")?.as_array()?;
    if !entries.is_empty() && entries.iter().all(|entry| entry.get("kid").is_none()) {
        return None;
    }
    let mut keys = Keys::new();
    for entry in entries {
        if let Some((kid, key)) = usable(entry) {
            keys.entry(kid).or_insert(key);
        }
    }
    Some(keys)
}

fn usable(entry: &Value) -> Option<(String, DecodingKey)> {
    let text = |name: &str| member(entry, name).and_then(Value::as_str);
    let absent_or = |name: &str, value: &str| member(entry, name).is_none_or(|v| v.as_str() == Some(value));
    if text("kty") != Some("RSA") || !absent_or("use", "sig") || !absent_or("alg", "RS256") {
        return None;
    }
    let kid = text("kid").filter(|kid| !kid.is_empty() && kid.len() <= 256)?;
    let (modulus, exponent) = (number(text("n")?)?, number(text("e")?)?);
    let bits = modulus.len() * 8 - modulus.first()?.leading_zeros() as usize;
    let odd = |number: &[u8]| number.last().is_some_and(|byte| byte % 2 == 1);
    let sound = (2048..=8192).contains(&bits)
        && odd(&modulus)
        && odd(&exponent)
        && exponent.len() <= 8
        && exponent != [1];
    sound.then(|| (kid.to_owned(), DecodingKey::from_rsa_raw_components(&modulus, &exponent)))
}

/// A member of a key; `null` is as good as none.
fn member<'a>(entry: &'a Value, name: &str) -> Option<&'a Value> {
    entry.get(name).filter(|value| !value.is_null())
}

/// A number in base64url, big-endian. Zeros in front, which some libraries write to keep the sign positive, are taken
/// off: the verifier refuses a number that has them.
fn number(text: &str) -> Option<Vec<u8>> {
    // Some write it in plain base64.
    let text = text.replace('+', "-").replace('/', "_");
    let bytes = NUMBER.decode(text).ok()?;
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    Some(bytes.get(zeros..)?.to_vec())
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;

    const N: &str = "ngYq_pxlxLv45e14mSpULWLlJbcpyAboFKQg3im_gk_H5QYSiNCVOtlpaMJnGnetztyG8M_YJ8v5i9G2SRu7ZB3J_z-KVukaiO8dAz5jdctm2aC5jtBC4Jy2JwlKPuO15LbC47TfEasFapu9pKsLcJlujA-HQUcYhK4CG3JH-OThFH6bVDgOmGeloTrYH2ro-kY3ph4PbtDx6TlZgLjkbBLP8cugvVFwtL0tuHRpTftMYqgbFDjwHFBv-_7FAaX2igFjkLPKJtTIS_P2P7sGBBZp55mgeLro-EdPTBo9kriP3Dzh1BQ7lcz3OQEVBcj4dj-SXHsjCxmF_gREDnweGw";

    fn kids(document: &str) -> Option<Vec<String>> {
        let mut kids: Vec<String> = import(document.as_bytes())?.into_keys().collect();
        kids.sort();
        Some(kids)
    }

    #[test]
    fn only_keys_that_can_verify_rs256_are_imported() {
        let key = |members: &str| format!(r#"{{"n":"{N}","e":"AQAB",{members}}}"#);
        let good = key(r#""kid":"good","kty":"RSA","alg":"RS256","use":"sig""#);
        let odd = [
            key(r#""kid":"a","kty":"oct","k":"c2VjcmV0""#),
            key(r#""kid":"b","kty":"EC""#),
            key(r#""kid":"c","kty":"RSA","use":"enc""#),
            key(r#""kid":"d","kty":"RSA","alg":"RS512""#),
            key(r#""kid":5,"kty":"RSA""#),
            key(r#""kty":"RSA""#),
            key(r#""kid":"","kty":"RSA""#),
            key(&format!(r#""kid":"{}","kty":"RSA""#, "a".repeat(257))),
            format!(r#"{{"kid":"e","kty":"RSA","e":"AQAB","n":"{}"}}"#, &N[..171]),
            format!(r#"{{"kid":"f","kty":"RSA","e":"AQAA","n":"{N}"}}"#),
            format!(r#"{{"kid":"g","kty":"RSA","e":"AQ","n":"{N}"}}"#),
            r#"{"kid":"h","kty":"RSA","e":"AQAB","n":"!!!"}"#.to_owned(),
            r#"{"kid":"i","kty":"RSA","e":"AQAB","n":5}"#.to_owned(),
            r#""text""#.to_owned(),
            "null".to_owned(),
        ];
        let document = format!(r#"{{"keys":[{},{good}]}}"#, odd.join(","));
        assert_eq!(kids(&document), Some(vec!["good".into()]));
        let minimal = format!(r#"{{"keys":[{}]}}"#, key(r#""kid":"k","kty":"RSA""#));
        assert_eq!(kids(&minimal), Some(vec!["k".into()]));
    }

    #[test]
    fn a_key_is_as_long_as_its_modulus_without_leading_zeros() {
        let imported = |modulus: &[u8]| {
            let n = URL_SAFE_NO_PAD.encode(modulus);
            kids(&format!(r#"{{"keys":[{{"kid":"k","kty":"RSA","n":"{n}","e":"AQAB"}}]}}"#)).unwrap().len()
        };
        let modulus = URL_SAFE_NO_PAD.decode(N).unwrap();
        let with_first = |byte: u8| [&[byte], &modulus[1..]].concat();
        assert_eq!(imported(&with_first(0x80)), 1, "2048 bits");
        assert_eq!(imported(&with_first(0x7f)), 0, "2047 bits");
        assert_eq!(imported(&[&[0], modulus.as_slice()].concat()), 1, "2048 bits behind a zero");
        assert_eq!(imported(&[&[0], &modulus[1..]].concat()), 0, "2040 bits behind a zero");
        assert_eq!(imported(&[0; 256]), 0);
        let even = [&modulus[..255], &[0x1a]].concat();
        assert_eq!(imported(&even), 0, "an even number is no modulus");
    }

    #[test]
    fn what_is_no_key_set_is_told_from_an_empty_one() {
        assert_eq!(kids(r#"{"keys":[]}"#), Some(vec![]));
        for document in [
            "",
            "{}",
            "[]",
            "5",
            "<html>",
            r#"{"keys":{}}"#,
            r#"{"keys":[{"kty":"RSA"}]}"#,
            r#"{"keys":["a"]}"#,
        ] {
            assert_eq!(kids(document), None, "{document}");
        }
    }

    #[test]
    fn every_key_of_a_set_is_taken() {
        let keys: Vec<String> =
            (0..100).map(|i| format!(r#"{{"kid":"{i}","kty":"RSA","n":"{N}","e":"AQAB"}}"#)).collect();
        assert_eq!(kids(&format!(r#"{{"keys":[{}]}}"#, keys.join(","))).unwrap().len(), 100);
    }
}
