//! What must hold of any input, one function for each place where input comes in. `fuzz/` hands them what libFuzzer
//! makes up, and every `cargo test` the seeds, among them whatever did not hold once.

pub use crate::{
    auth::fuzz::{key_set, token},
    cache::fuzz::redis_value,
    cyberscan::fuzz::observable,
    egress::fuzz::host,
    enrich::fuzz::upstream,
    http::fuzz::{http, request_body},
    settings::fuzz::settings,
};

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    type Target = fn(&[u8]);

    const TARGETS: [(&str, Target); 9] = [
        ("host", host),
        ("http", http),
        ("key_set", key_set),
        ("observable", observable),
        ("redis_value", redis_value),
        ("request_body", request_body),
        ("settings", settings),
        ("token", token),
        ("upstream", upstream),
    ];

    fn names(directory: &Path) -> Vec<String> {
        let entries =
            fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn everything_holds_of_every_seed() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let expected: Vec<String> = TARGETS.iter().map(|(name, _)| format!("{name}.rs")).collect();
        assert_eq!(names(&fuzz.join("targets")), expected);
        let mut broken = Vec::new();
        for (name, _) in TARGETS {
            let seeds = fuzz.join("seeds").join(name);
            let files = names(&seeds);
            assert!(files.len() >= 8, "{name} has {} seeds", files.len());
            for file in files {
                let seed = fs::read(seeds.join(&file)).unwrap();
                // What is meant for one may well be sent to another.
                for (other, target) in TARGETS {
                    if std::panic::catch_unwind(|| target(&seed)).is_err() {
                        broken.push(format!("{other} does not hold of fuzz/seeds/{name}/{file}"));
                    }
                }
            }
        }
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }
}
