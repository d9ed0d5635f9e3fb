//! What must hold of any observable that becomes part of a path.

use url::Url;

use super::client::path;
use crate::ctim::Observable;

/// The value of an observable.
pub fn observable(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    for (kind, resources) in [("ip", ["ip", "vulnerabilities/ip"]), ("domain", ["domain", "domain"])] {
        let Some(observable) = Observable::new(kind, text) else {
            continue;
        };
        assert_eq!((observable.kind(), observable.value()), (kind, text));
        let canonical = observable.subject().to_string();
        let again = Observable::new(kind, &canonical).expect("a canonical spelling is one, too");
        assert_eq!(again.subject(), observable.subject());
        for resource in resources {
            let path = path(resource, &canonical);
            let segment = path.strip_prefix(&format!("/api/v1/{resource}/")).expect("a path of the template");
            let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".:_-".contains(&b);
            assert!(!segment.is_empty() && segment.bytes().all(plain), "{path}");
            // Dots alone would be resolved away.
            let url = Url::parse(&format!("https://api.example.com{path}")).expect("a URL with this path");
            assert_eq!((url.path(), url.query(), url.fragment()), (&*path, None, None));
        }
    }
}
