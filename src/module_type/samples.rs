//! Holds our document against the public ones: what names and types they use, as facts.
//!
//! Read were the 44 module types that public repositories have. Of these 40 use `configuration-token`: 36 with RS256 and a
//! key issuer of the platform's (the original relay's among them), four with HS256 and a shared key.
//!
//! That ours looks like those is all that is shown here: it was not tried in a tenant.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{ModuleType, Region};

/// Top-level keys that the public documents of this kind have, and how many of the 40 do.
const TOP: [(&str, u32); 12] = [
    ("title", 40),
    ("default_name", 40),
    ("description", 40),
    ("tips", 40),
    ("external_references", 40),
    ("configuration_spec", 40),
    ("capabilities", 40),
    ("properties", 40),
    ("logo", 40),
    ("short_description", 39),
    ("flags", 10),
    ("product_categories", 1),
];
/// Properties, and how many of the 36 with RS256 have them.
const PROPERTIES: [(&str, u32); 8] = [
    ("supported-apis", 36),
    ("auth-type", 36),
    ("configuration-token-alg", 36),
    ("custom_jwks_host", 36),
    ("url", 34),
    ("configuration-token-audience", 7),
    ("proxy", 1),
    ("proxy-endpoint-metadata", 1),
];
/// What a field of the form may have.
const FIELD: [&str; 7] = ["key", "type", "label", "required", "tooltip", "group", "options"];
/// Keys and types of fields that stand for a key, a host and the limit.
const FIELDS: [(&str, &str, bool); 3] = [
    ("custom_api_key", "api_key", true),
    ("custom_host", "string", true),
    ("custom_CTR_ENTITIES_LIMIT", "integer", false),
];
/// A capability, and the routes a document lists with it.
const CAPABILITIES: [(&str, &str); 3] =
    [("health", "health"), ("observe", "observe/observables"), ("refer", "refer/observables")];
/// What the platform's own form adds to each module type's.
const PLATFORMS_OWN: [&str; 2] = ["Integration Module Name", "Save"];

fn documents() -> Vec<Value> {
    let audiences = [None, Some("https://gateway.example.com")];
    let all = Region::ALL.iter().flat_map(|region| audiences.map(|audience| (region, audience)));
    all.map(|(region, audience)| {
        let module_type = ModuleType {
            url: "https://relay.example.com".parse().unwrap(),
            audience: audience.map(|audience| audience.parse().unwrap()),
            jwks_host: region.host().to_owned(),
        };
        module_type.document()
    })
    .collect()
}

fn keys(object: &Value) -> BTreeSet<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

#[test]
fn the_document_has_what_all_public_ones_have_and_nothing_that_none_has() {
    for document in documents() {
        let (top, properties) = (keys(&document), keys(&document["properties"]));
        assert!(top.iter().all(|key| TOP.iter().any(|(known, _)| known == key)), "{top:?}");
        assert!(TOP.iter().all(|(key, count)| *count < 39 || top.contains(key)), "{top:?}");
        let known = |key: &&str| PROPERTIES.iter().any(|(known, _)| known == key);
        assert!(properties.iter().all(known), "{properties:?}");
        assert!(
            PROPERTIES.iter().all(|(key, count)| *count < 34 || properties.contains(key)),
            "{properties:?}"
        );
        for key in ["title", "default_name", "short_description", "description", "tips", "logo"] {
            assert!(document[key].as_str().is_some_and(|text| !text.is_empty()), "{key}");
        }
        assert!(document["logo"].as_str().unwrap().starts_with("data:image/svg+xml;base64,"));
        for reference in list(&document["external_references"]) {
            assert_eq!(keys(reference), BTreeSet::from(["label", "link"]));
        }
    }
}

#[test]
fn tokens_are_signed_by_the_region_and_carry_what_the_relay_reads() {
    for (index, document) in documents().iter().enumerate() {
        let properties = &document["properties"];
        assert_eq!(properties["auth-type"], "configuration-token");
        assert_eq!(properties["configuration-token-alg"], "RS256");
        assert_eq!(properties["custom_jwks_host"], Region::ALL[index / 2].host());
        assert_eq!(properties["url"], "https://relay.example.com");
    }
}

#[test]
fn the_form_asks_for_key_host_and_limit_in_fields_such_as_others_have() {
    for document in documents() {
        let spec = list(&document["configuration_spec"]);
        let fields: Vec<(&str, &str, bool)> = spec
            .iter()
            .map(|field| {
                let text = |key: &str| field[key].as_str().unwrap();
                assert!(keys(field).iter().all(|key| FIELD.contains(key)), "{field}");
                assert!(!text("label").is_empty() && !text("tooltip").is_empty());
                (text("key"), text("type"), field["required"].as_bool().unwrap())
            })
            .collect();
        assert_eq!(fields, FIELDS);
    }
}

#[test]
fn each_capability_has_its_route_and_each_route_its_capability() {
    for document in documents() {
        let capabilities = list(&document["capabilities"]).iter().map(|capability| {
            assert_eq!(keys(capability), BTreeSet::from(["description", "id"]));
            capability["id"].as_str().unwrap()
        });
        let routes = list(&document["properties"]["supported-apis"]).iter().map(|api| api.as_str().unwrap());
        assert_eq!(capabilities.zip(routes).collect::<Vec<_>>(), CAPABILITIES);
    }
}

#[test]
fn a_field_that_a_tip_names_is_in_the_form_and_each_of_the_form_is_in_the_tips() {
    let document = &documents()[0];
    let tips = document["tips"].as_str().unwrap();
    let named: BTreeSet<&str> = tips.split("**").skip(1).step_by(2).collect();
    let labels = list(&document["configuration_spec"]).iter().map(|field| field["label"].as_str().unwrap());
    assert_eq!(named, labels.chain(PLATFORMS_OWN).collect());
}

#[test]
fn it_says_what_it_answers_and_that_nobody_has_tried_it() {
    let document = &documents()[0];
    let description = document["description"].as_str().unwrap();
    for words in ["`ip`, `ipv6` and `domain`", "not tried in a tenant"] {
        assert!(description.contains(words), "{words}");
    }
}
