//! What is a fault, what is understood, and that no secret is told.

use super::*;
use url::Url;

use crate::settings::reader::is_secret;

fn load(file: &str, environment: &[(&str, &str)]) -> Result<Settings, Faults> {
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), file).unwrap();
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Settings::load(Some(path.path()), environment)
}

#[test]
fn the_documented_defaults_are_the_defaults() {
    let settings = Settings::load(None, []).unwrap();
    assert_eq!(settings.listen.to_string(), "0.0.0.0:9090");
    assert_eq!(settings.enrich.deadline, Duration::from_secs(20));
    assert_eq!(settings.http.body_limit, 1 << 20);
    assert_eq!(settings.auth.jwks_hosts.len(), 3);
    assert!(settings.cyberscan.hosts.allow(&"api.cyberscan.io".parse().unwrap()));
    assert!(settings.effective().iter().all(|key| key.source == "default"));
}

#[test]
fn the_environment_is_laid_over_the_file_and_the_file_over_the_defaults() {
    let file = "listen = \"127.0.0.1:1\"\n[request]\ndeadline = \"7s\"\nconcurrency = 3\n";
    let environment = [
        ("RELAY_LISTEN", "127.0.0.1:2"),
        ("RELAY_CYBERSCAN_HOSTS", "a.example, b.example"),
        ("RELAY_AUTH_REQUIRE_EXP", "true"),
        ("PATH", "/bin"),
    ];
    let settings = load(file, &environment).unwrap();
    assert_eq!(settings.listen.port(), 2);
    assert_eq!(settings.enrich.deadline, Duration::from_secs(7));
    assert_eq!(settings.enrich.concurrency.get(), 3);
    assert!(settings.auth.require_exp);
    assert!(settings.cyberscan.hosts.allow(&"b.example".parse().unwrap()));
    let source = |key| settings.effective().iter().find(|e| e.key == key).map(|e| e.source.clone()).unwrap();
    assert_eq!(source("listen"), "environment variable RELAY_LISTEN");
    assert!(source("request.deadline").starts_with("file "));
    assert_eq!(source("log.level"), "default");
}

#[test]
fn all_faults_are_told_at_once_with_key_source_and_what_was_expected() {
    let file = "lisen = \"x\"\n[request]\ndeadline = \"soon\"\nconcurrency = 0\n[server]\nbody_limit = [1]\n";
    let environment = [
        ("RELAY_CTIM_TLP", "purple"),
        ("RELAY_EGRESS_ALLOW_CIDRS", "10.0.0.0/8,nonsense"),
        ("RELAY_LOG_LEVLE", "info"),
    ];
    let Faults(faults) = load(file, &environment).unwrap_err();
    let told: Vec<(&str, &str, &str)> = faults
        .iter()
        .map(|f| {
            let place = f.source.rsplit_once(", ").map_or(f.source.as_str(), |(_, line)| line);
            (f.key.as_str(), place, f.message.as_str())
        })
        .collect();
    assert_eq!(
        told,
        [
            ("RELAY_LOG_LEVLE", "environment", "there is no such key; did you mean RELAY_LOG_LEVEL?"),
            ("lisen", "line 1", "there is no such key; did you mean listen?"),
            (
                "server.body_limit",
                "line 6",
                "expected a size such as 64MiB, or a number of bytes, from 256 to 64MiB (one observable takes some bytes; \
                 a body is held in memory), found a list"
            ),
            (
                "request.deadline",
                "line 3",
                "expected a duration such as 500ms, 10s or 15m, from 1s to 10m (CyberScan takes a while; nobody waits \
                 longer), found \"soon\""
            ),
            (
                "request.concurrency",
                "line 4",
                "expected a number from 1 to 1024 (each is a call to CyberScan at once), found \"0\""
            ),
            (
                "egress.allow_cidrs",
                "environment variable RELAY_EGRESS_ALLOW_CIDRS",
                "expected networks such as 10.0.0.0/8, found \"nonsense\""
            ),
            (
                "ctim.tlp",
                "environment variable RELAY_CTIM_TLP",
                "expected white, green, amber or red, found \"purple\""
            ),
        ]
    );
}

#[test]
fn a_file_that_is_no_toml_is_a_fault_and_so_is_one_that_is_not_there() {
    let Faults(faults) = load("[auth]\nlisten = ", &[]).unwrap_err();
    assert_eq!(faults.len(), 1);
    assert!(faults[0].message.starts_with("line 2, column 10: "), "{}", faults[0].message);
    let missing = Settings::load(Some(Path::new("/nonexistent/relay.toml")), []).unwrap_err();
    assert!(missing.to_string().contains("/nonexistent/relay.toml"));
}

#[test]
fn a_secret_shows_neither_in_the_effective_settings_nor_in_a_fault() {
    let settings = load("", &[("RELAY_EGRESS_PROXY", "http://user:s3cret@proxy.example")]).unwrap();
    assert!(settings.egress.proxy.is_some());
    assert!(!format!("{:?}", settings.effective()).contains("s3cret"));
    let faults = load("", &[("RELAY_EGRESS_PROXY", "s3cret")]).unwrap_err();
    assert!(!faults.to_string().contains("s3cret"), "{faults}");
    // Quotes that were forgotten make a file that is no TOML.
    for file in ["[admin]\ntoken = s3cret", "admin.token = 's3cret", "admin.token = 5s3cret\nlisten = 1"] {
        let faults = load(file, &[]).unwrap_err();
        assert!(!faults.to_string().contains("s3cret"), "{faults}");
    }
}

#[test]
fn secrets_can_come_from_files_but_not_twice() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "http://proxy.example:3128\n").unwrap();
    let path = file.path().to_str().unwrap();
    let settings = load("", &[("RELAY_EGRESS_PROXY_FILE", path)]).unwrap();
    assert_eq!(settings.egress.proxy.unwrap().port(), Some(3128));
    let twice = [("RELAY_EGRESS_PROXY_FILE", path), ("RELAY_EGRESS_PROXY", "http://other.example")];
    assert!(load("", &twice).unwrap_err().to_string().contains("set twice"));
}

/// The settings that `environment` makes, without a file.
fn of(environment: &[(&str, &str)]) -> Result<Settings, Faults> {
    Settings::load(None, environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
}

#[test]
fn every_value_beyond_its_bounds_is_a_fault_that_names_the_key_and_what_was_expected() {
    for key in KEYS {
        let (within, beyond): (Vec<String>, Vec<String>) = match key.kind {
            Kind::Duration(Bounds { least, most, .. }) => {
                let less =
                    least.checked_sub(Duration::from_millis(1)).map(|less| format!("{}ms", less.as_millis()));
                let more = format!("{}ms", most.as_millis() + 1);
                let beyond = less.into_iter().chain([
                    more,
                    "-1s".into(),
                    "9000000h".into(),
                    "10".into(),
                    "1 s x".into(),
                ]);
                (vec![format!("{}ms", least.as_millis()), format!("{}s", most.as_secs())], beyond.collect())
            }
            Kind::Number(Bounds { least, most, .. }) => {
                let beyond = [
                    (most + 1).to_string(),
                    "-1".into(),
                    "1.5".into(),
                    "18446744073709551616".into(),
                    "ten".into(),
                ];
                let less = least.checked_sub(1).map(|less| less.to_string());
                (vec![least.to_string(), most.to_string()], less.into_iter().chain(beyond).collect())
            }
            Kind::Size(Bounds { least, most, .. }) => {
                let beyond = [
                    (least - 1).to_string(),
                    (most + 1).to_string(),
                    "64MB".into(),
                    "-1".into(),
                    "99999999999999999999GiB".into(),
                ];
                (vec![least.to_string(), most.to_string()], beyond.into())
            }
            Kind::Share(Bounds { least, most, .. }) => {
                let beyond =
                    [(most + 0.001).to_string(), "-0.001".into(), "NaN".into(), "inf".into(), "50%".into()];
                (vec![least.to_string(), most.to_string()], beyond.into())
            }
            Kind::Flag => {
                (vec!["true".into(), "false".into()], vec!["yes".into(), "1".into(), "True".into()])
            }
            Kind::OneOf(words) => {
                (words.iter().map(|word| (*word).to_owned()).collect(), vec!["nonsense".into()])
            }
            Kind::Value(_) | Kind::List(_) => (vec![], vec!["\u{1}".into()]),
        };
        for value in within {
            let outcome = of(&[(&key.variable(), &value)]);
            assert!(outcome.is_ok(), "{} = {value}: {outcome:?}", key.name);
        }
        for value in beyond {
            let Err(Faults(faults)) = of(&[(&key.variable(), &value)]) else {
                panic!("{} = {value} is taken", key.name);
            };
            let fault = faults.iter().find(|fault| fault.key == key.name);
            let fault = fault.unwrap_or_else(|| panic!("{} = {value}: {faults:?}", key.name));
            assert_eq!(fault.source, format!("environment variable {}", key.variable()));
            assert!(fault.message.contains(&key.kind.to_string()), "{}", fault.message);
            assert!(key.secret || fault.message.contains(&format!("{value:?}")), "{}", fault.message);
        }
    }
}

#[test]
fn what_serve_could_not_work_with_is_a_fault_and_says_what_would_do() {
    let key = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    let short = key.get(..62).unwrap();
    for (variable, value, said) in [
        ("RELAY_LISTEN", ":9090", "0.0.0.0:9090 is every address"),
        ("RELAY_LISTEN", "localhost:9090", "localhost is 127.0.0.1"),
        ("RELAY_LISTEN", "9090", "an IP address and a port"),
        ("RELAY_LISTEN", "0.0.0.0", "an IP address and a port"),
        ("RELAY_LISTEN", "", "found nothing"),
        ("RELAY_LISTEN", "224.0.0.1:9090", "nobody can connect"),
        ("RELAY_LISTEN", "0.0.0.0:65536", "an IP address and a port"),
        ("RELAY_ADMIN_LISTEN", "0.0.0.0:9090", "another port"),
        ("RELAY_ADMIN_LISTEN", "127.0.0.1:9090", "another port"),
        ("RELAY_ADMIN_LISTEN", "[::]:9090", "another port"),
        ("RELAY_LOG_LEVEL", "warning", "error, warn, info, debug"),
        ("RELAY_LOG_LEVEL", "hyper=debug", "begin with a level"),
        ("RELAY_AUTH_AUDIENCES", "relay.example.com", "begins with https://"),
        ("RELAY_AUTH_AUDIENCES", "https://", "URLs such as"),
        ("RELAY_AUTH_AUDIENCES", "ftp://relay.example.com", "begins with https://"),
        ("RELAY_AUTH_AUDIENCES", "https://relay.example.com?x=1", "no ?"),
        ("RELAY_AUTH_AUDIENCES", "https://me@relay.example.com", "user"),
        ("RELAY_AUTH_AUDIENCES", "https://relay.example.com https://other.example", "URLs such as"),
        ("RELAY_AUTH_AUDIENCES", "https://good.example,bad", "found \"bad\""),
        ("RELAY_AUTH_AUDIENCES", ",", "commas only"),
        ("RELAY_AUTH_AUDIENCES", "['https://relay.example.com']", "URLs such as"),
        ("RELAY_AUTH_JWKS_HOSTS", "http://keys.example", "only https"),
        ("RELAY_AUTH_JWKS_HOSTS", "keys example", "host names"),
        ("RELAY_AUTH_JWKS_HOSTS", "", "at least one"),
        ("RELAY_CYBERSCAN_HOSTS", "", "at least one"),
        ("RELAY_CYBERSCAN_HOSTS", "http://api.cyberscan.io", "only https"),
        ("RELAY_CYBERSCAN_HOSTS", "https://api.cyberscan.io/api/v1", "a path is no part"),
        ("RELAY_CYBERSCAN_HOSTS", ".cyberscan.io", "*.cyberscan.io"),
        ("RELAY_CYBERSCAN_HOSTS", "*cyberscan.io", "host names"),
        ("RELAY_CYBERSCAN_HOSTS", "**", "host names"),
        ("RELAY_EGRESS_ALLOW_CIDRS", "10.0.0.0/33", "networks such as"),
        ("RELAY_EGRESS_ALLOW_CIDRS", "10.0.0.0-10.0.0.9", "networks such as"),
        ("RELAY_EGRESS_PROXY", "proxy.example:3128", "begins with http://"),
        ("RELAY_EGRESS_PROXY", "socks5://proxy.example:1080", "begins with http://"),
        ("RELAY_EGRESS_PROXY", "http://proxy.example:0", "a URL such as"),
        ("RELAY_EGRESS_PROXY", "http://proxy.example/path", "no path"),
        ("RELAY_EGRESS_EXTRA_CA_FILE", "/nonexistent/ca.pem", "No such file"),
        ("RELAY_EGRESS_EXTRA_CA_FILE", "/dev", "it is no file"),
        ("RELAY_EGRESS_EXTRA_CA_FILE", "/dev/zero", "it is no file"),
        (
            "RELAY_EGRESS_EXTRA_CA_FILE",
            concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"),
            "no PEM certificate",
        ),
        ("RELAY_LIMITER_TENANT", "20/s,10/s", "two for 1s"),
        ("RELAY_LIMITER_TENANT", "20/d,10/24h", "two for 1d"),
        ("RELAY_LIMITER_FLEET", "60/m,10/60s", "two for 1m"),
        ("RELAY_LIMITER_TENANT", "20/fortnight", "quotas such as"),
        ("RELAY_LIMITER_TENANT", "0/s", "from 1"),
        ("RELAY_LIMITER_TENANT", "10/100ms", "whole number of seconds"),
        ("RELAY_LIMITER_TENANT", "20", "a slash"),
        ("RELAY_LIMITER_TENANT", "10/s; 5/d", "quotas such as"),
        ("RELAY_REDIS_URL", "redis://h/abc", "number of a database"),
        ("RELAY_REDIS_URL", "redis://h/0/1", "number of a database"),
        ("RELAY_REDIS_URL", "redis://h:port", "host or port"),
        ("RELAY_REDIS_URL", "redis:///0", "host or port"),
        ("RELAY_REDIS_URL", "redis://h:0", "host or port"),
        ("RELAY_REDIS_URL", "redis.example:6379", "begins with redis://"),
        ("RELAY_REDIS_URL", "http://redis.example", "begins with redis://"),
        ("RELAY_REDIS_URL", "unix:///run/redis.sock", "begins with redis://"),
        ("RELAY_REDIS_URL", "redis://h?timeout=5", "protocol="),
        ("RELAY_REDIS_URL", "redis://h?protocol=4", "protocol="),
        ("RELAY_REDIS_URL", "rediss://h/#insecure", "always verified"),
        ("RELAY_REDIS_URL", "redis://:%ff@h", "percent-encoded"),
        ("RELAY_REDIS_URL", "redis://a,redis://b", "mode single"),
        ("RELAY_REDIS_ENCRYPTION_KEY", short, "found 62 characters"),
        (
            "RELAY_REDIS_ENCRYPTION_KEY",
            "0000000000000000000000000000000000000000000000000000000000000000",
            "no random key",
        ),
        ("RELAY_REDIS_ENCRYPTION_KEY", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", "hexadecimal"),
        ("RELAY_REDIS_MASTER_NAME", "my master", "no blanks"),
        ("RELAY_REDIS_MASTER_NAME", "", "found nothing"),
        ("RELAY_ADMIN_TOKEN", "two words", "visible ASCII"),
        ("RELAY_ADMIN_TOKEN", "Schlüssel", "visible ASCII"),
        ("RELAY_ADMIN_TOKEN_FILE", "/nonexistent/token", "cannot be read"),
        ("RELAY_ADMIN_TOKEN_FILE", "/dev/zero", "it is no file"),
        ("RELAY_LOG_FORMAT", "in\u{fffd}fo", "not UTF-8"),
    ] {
        let Err(faults) = of(&[(variable, value)]) else { panic!("{variable}={value} is taken") };
        let key = variable.strip_suffix("_FILE").filter(|_| !variable.contains("_CA_")).unwrap_or(variable);
        let key = KEYS.iter().find(|known| known.variable() == key).unwrap();
        let told = faults
            .0
            .iter()
            .any(|f| f.key == key.name && f.source.contains(variable) && f.message.contains(said));
        assert!(told, "{variable}={value}: {faults}");
        assert_eq!(faults.0.len(), 1, "{variable}={value}: {faults}");
    }
    // What goes together only otherwise.
    for (others, url, said) in [
        ([("RELAY_REDIS_MODE", "cluster"), ("RELAY_CTIM_TLP", "amber")], "redis://a/1", "no database"),
        (
            [("RELAY_REDIS_MODE", "cluster"), ("RELAY_CTIM_TLP", "amber")],
            "redis://:x@a,redis://:y@b",
            "the same user",
        ),
        (
            [("RELAY_REDIS_MODE", "sentinel"), ("RELAY_CTIM_TLP", "amber")],
            "redis://a,rediss://b",
            "the same user",
        ),
        (
            [("RELAY_REDIS_MODE", "sentinel"), ("RELAY_CTIM_TLP", "amber")],
            "redis://a/1,redis://b/2",
            "the same database",
        ),
    ] {
        let faults = of(&[others[0], others[1], ("RELAY_REDIS_URL", url)]).unwrap_err();
        assert!(faults.to_string().contains(said), "{faults}");
    }
}

#[test]
fn a_file_of_certificates_without_any_is_a_fault() {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(["ca.example".to_owned()]).unwrap().self_signed(&key).unwrap();
    let (pem, der) = (certificate.pem(), certificate.der().to_vec());
    for (content, said) in [
        (pem.clone().into_bytes(), None),
        (format!("# a comment\r\n{}", pem.replace('\n', "\r\n")).into_bytes(), None),
        (Vec::new(), Some("no PEM certificate")),
        (key.serialize_pem().into_bytes(), Some("no PEM certificate")),
        (der, Some("openssl x509 -inform der")),
        (pem.replace('M', "").into_bytes(), Some("")),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_vec(), Some("is no root")),
        (b"-----BEGIN CERTIFICATE-----\nAAAA".to_vec(), Some("")),
    ] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let outcome = of(&[("RELAY_EGRESS_EXTRA_CA_FILE", file.path().to_str().unwrap())]);
        match said {
            None => assert!(outcome.is_ok(), "{outcome:?}"),
            Some(said) => {
                let faults = outcome.unwrap_err().to_string();
                assert!(faults.contains("egress.extra_ca_file") && faults.contains(said), "{faults}");
            }
        }
    }
}

#[test]
fn a_tenants_quotas_may_have_a_key_of_their_own() {
    let name = "0123456789abcdef0123456789abcdef";
    let windows = |settings: Result<Settings, Faults>| {
        let tenants = settings.unwrap().limiter.tenants;
        tenants.get(name).cloned()
    };
    let list = of(&[("RELAY_LIMITER_TENANTS", &format!("{name}=20/s,{name}=5000/d"))]);
    let wanted = windows(list);
    assert_eq!(wanted.as_ref().unwrap().len(), 2);
    let variable = format!("RELAY_LIMITER_TENANTS_{}", name.to_ascii_uppercase());
    assert_eq!(windows(of(&[(&variable, "20/s, 5000/d")])), wanted);
    for text in [
        format!("[limiter.tenants]\n{name} = [\"20/s\", \"5000/d\"]"),
        format!("limiter.tenants.{name} = \"20/s,5000/d\""),
    ] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &text).unwrap();
        assert_eq!(windows(Settings::load(Some(file.path()), [])), wanted, "{text}");
    }
    let faults = of(&[(&variable, "20 a day")]).unwrap_err().to_string();
    assert!(faults.contains("limiter.tenants") && faults.contains("expected"), "{faults}");
}

#[test]
fn what_belongs_together_for_redis_is_set_together_or_refused() {
    let url = ("RELAY_REDIS_URL", "rediss://redis.example");
    for (more, said) in [
        (("RELAY_REDIS_CLIENT_CERTIFICATE", "/c.pem"), "redis.client_key"),
        (("RELAY_REDIS_CLIENT_KEY", "/c.key"), "redis.client_certificate"),
        (("RELAY_REDIS_KEY_PREFIX", "{relay}:"), "redis.key_prefix"),
        (("RELAY_REDIS_KEY_PREFIX", "relay*"), "redis.key_prefix"),
        (("RELAY_REDIS_SENTINEL_TLS", "perhaps"), "redis.sentinel.tls"),
    ] {
        let faults = of(&[url, more]).unwrap_err().to_string();
        assert!(faults.contains(said) && !faults.contains("/c."), "{faults}");
    }
    let warned = |settings: &[(&str, &str)]| {
        let settings = of(settings).unwrap();
        let keys = settings.warnings().iter().map(|fault| fault.key.clone());
        keys.filter(|key| key.starts_with("redis.")).collect::<Vec<_>>()
    };
    let sentinel = [("RELAY_REDIS_SENTINEL_USERNAME", "watch"), ("RELAY_REDIS_SENTINEL_TLS", "true")];
    let ca = ("RELAY_REDIS_CA_FILE", "/ca.pem");
    assert_eq!(warned(&[sentinel[0]]), ["redis.sentinel.username"]);
    assert_eq!(warned(&[url, sentinel[0]]), ["redis.sentinel.username"]);
    assert_eq!(warned(&[url, ca]), [""; 0]);
    assert_eq!(warned(&[("RELAY_REDIS_URL", "redis://redis.example"), ca]), ["redis.ca_file"]);
    let with_sentinels = [("RELAY_REDIS_MODE", "sentinel"), ("RELAY_REDIS_URL", "redis://redis.example"), ca];
    assert_eq!(warned(&[&with_sentinels[..], &sentinel].concat()), [""; 0]);
}

#[test]
fn what_only_looks_odd_is_understood() {
    let shown = |settings: &Settings| {
        format!(
            "{:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?}",
            settings.listen,
            // How audiences are spelt is kept besides.
            crate::auth::Config { spellings: Vec::new(), ..settings.auth.clone() },
            settings.cyberscan,
            settings.egress.proxy.as_ref().map(Url::as_str),
            settings.limiter,
            settings.log,
            settings.cache.encryption_keys,
            settings.cache.domain,
            settings.egress.allow_cidrs,
            settings.admin.token.as_ref().map(secrecy::ExposeSecret::expose_secret),
        )
    };
    let key = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    for (variable, odd, plain) in [
        ("RELAY_LISTEN", "\"0.0.0.0:9092\"", "0.0.0.0:9092"),
        ("RELAY_LISTEN", " 0.0.0.0:9092\r", "0.0.0.0:9092"),
        ("RELAY_AUTH_AUDIENCES", "\"https://relay.example.com\"", "https://relay.example.com"),
        ("RELAY_AUTH_AUDIENCES", "'https://relay.example.com'", "https://relay.example.com"),
        ("RELAY_AUTH_AUDIENCES", "\u{feff}https://relay.example.com\u{a0}\r\n", "https://relay.example.com"),
        ("RELAY_AUTH_AUDIENCES", "https://relay.example.com/", "https://relay.example.com"),
        ("RELAY_AUTH_AUDIENCES", "HTTPS://Relay.Example.com:443//", "https://relay.example.com"),
        ("RELAY_AUTH_AUDIENCES", "https://relay.example.com/x/", "https://relay.example.com/x"),
        ("RELAY_AUTH_AUDIENCES", "https://a.test,,https://b.test,", "https://a.test,https://b.test"),
        ("RELAY_AUTH_AUDIENCES", "\"https://a.test\", 'https://b.test'", "https://a.test,https://b.test"),
        ("RELAY_AUTH_AUDIENCES", "https://a.test/,https://a.test", "https://a.test"),
        ("RELAY_AUTH_AUDIENCES", "\"\"", ""),
        ("RELAY_AUTH_JWKS_HOSTS", "https://Keys.example/", "keys.example"),
        ("RELAY_AUTH_JWKS_HOSTS", "keys.example,keys.example", "keys.example"),
        ("RELAY_AUTH_JWKS_HOSTS", "https://keys.example/tenant/.well-known/jwks", "keys.example/tenant"),
        ("RELAY_AUTH_REQUIRE_EXP", "'true'", "true"),
        ("RELAY_AUTH_TRUSTED_PROXIES", "10.0.0.1", "10.0.0.1/32"),
        ("RELAY_AUTH_TRUSTED_PROXIES", "::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("RELAY_CYBERSCAN_HOSTS", "https://API.cyberscan.io/", "api.cyberscan.io"),
        ("RELAY_EGRESS_ALLOW_CIDRS", "10.0.0.0/8\r\n10.0.0.0/8", "10.0.0.0/8"),
        (
            "RELAY_EGRESS_PROXY",
            "\"http://user:pass@proxy.example:3128\"",
            "http://user:pass@proxy.example:3128/",
        ),
        ("RELAY_LIMITER_TENANT", " 10 / s ,\"5/d\"", "10/s,5/d"),
        ("RELAY_LIMITER_TENANT", "1000/week", "1000/7d"),
        ("RELAY_LOG_LEVEL", "\"Info\"", "info"),
        ("RELAY_REDIS_ENCRYPTION_KEY", &format!("{key}\n{key}\n"), key),
        ("RELAY_ADMIN_TOKEN", "\"a-token-of-the-operator\"\r\n", "a-token-of-the-operator"),
        ("RELAY_CACHE_FRESH", "7d", "168h"),
    ] {
        let (odd_settings, plain) = (of(&[(variable, odd)]), of(&[(variable, plain)]).unwrap());
        assert_eq!(odd_settings.as_ref().map(shown), Ok(shown(&plain)), "{variable}={odd}");
    }
}

#[test]
fn what_works_and_looks_odd_is_a_warning() {
    let defaults = of(&[("RELAY_AUTH_AUDIENCES", "https://relay.example.com")]).unwrap();
    assert_eq!(defaults.warnings(), []);
    for (variable, value, key) in [
        ("RELAY_AUTH_AUDIENCES", "", "auth.audiences"),
        ("RELAY_AUTH_AUDIENCES", "http://relay.example.com", "auth.audiences"),
        ("RELAY_AUTH_TRUSTED_PROXIES", "0.0.0.0/0", "auth.trusted_proxies"),
        ("RELAY_CYBERSCAN_TIMEOUT", "30s", "cyberscan.timeout"),
        ("RELAY_CACHE_FILL_TIMEOUT", "1s", "cache.fill_timeout"),
        ("RELAY_CACHE_SOFT_TIMEOUT", "50s", "cache.soft_timeout"),
        ("RELAY_CACHE_HOST_STALE_IF_ERROR", "1m", "cache.host.stale_if_error"),
        ("RELAY_REDIS_MODE", "cluster", "redis.mode"),
        ("RELAY_ADMIN_TOKEN", "secret", "admin.token"),
    ] {
        let settings = of(&[("RELAY_AUTH_JWKS_HOSTS", "a.example"), (variable, value)]).unwrap();
        let told = settings.warnings().iter().any(|warning| warning.key == key);
        assert!(told, "{variable}={value}: {:?}", settings.warnings());
    }
}

#[test]
fn no_secret_is_told_however_odd_it_is() {
    const CANARY: &str = "c4n4ry";
    let files = tempfile::tempdir().unwrap();
    for key in KEYS.iter().filter(|key| key.secret) {
        for form in [
            "{}",
            "\"{}\"",
            "'{}",
            "{} {}",
            "{}\n{}",
            "http://{}",
            "http://u:{}@",
            "http://u:{}@h/{}",
            "redis://{}@h/x",
            "redis://u:{}@h:port",
            "redis://u:{}@h/#{}",
            "redis://u:{}@h?{}={}",
            "rediss://u:{}@h,redis://u:{}@h",
            "redis://u:p/{}@h",
            "{},{}",
            "socks5://u:{}@h",
            "{}\u{1}",
            "\u{fffd}{}",
            "[{}]",
            "{\"a\":\"{}\"}",
            "https://u:{}@proxy.example:3128",
            "redis://u:{}@redis.example/0",
        ] {
            let value = form.replace("{}", CANARY);
            let path = files.path().join("secret");
            std::fs::write(&path, &value).unwrap();
            let from_file = key.variable() + "_FILE";
            let (table, name) = key.name.split_once('.').unwrap();
            let toml = format!("[{table}]\n{name} = {}\n", fuzz::quoted(&value));
            let unquoted = format!("[{table}]\n{name} = {value}\n");
            for outcome in [
                of(&[(&key.variable(), &value)]),
                of(&[(&from_file, path.to_str().unwrap())]),
                load(&toml, &[]),
                load(&unquoted, &[]),
            ] {
                let told = match outcome {
                    Ok(settings) => format!("{:?} {:?}", settings.effective(), settings.warnings()),
                    Err(faults) => faults.to_string(),
                };
                assert!(!told.contains(CANARY), "{} = {value}: {told}", key.name);
            }
        }
    }
}

#[test]
fn every_key_has_a_default_or_says_in_the_file_of_defaults_what_it_is_for() {
    let settings = Settings::load(None, []).unwrap();
    for key in KEYS {
        let set = settings.effective().iter().any(|effective| effective.key == key.name);
        assert!(set || DEFAULTS.contains(key.name) || key.name.matches('.').count() == 2, "{}", key.name);
    }
}

#[test]
fn a_change_of_any_key_is_noticed_also_of_a_secret() {
    let one = of(&[("RELAY_ADMIN_TOKEN", "one-token-of-the-operator"), ("RELAY_CACHE_FRESH", "1m")]).unwrap();
    let other =
        of(&[("RELAY_ADMIN_TOKEN", "two-token-of-the-operator"), ("RELAY_CACHE_HOST_FRESH", "1m")]).unwrap();
    let changed: Vec<_> = one.changed(&other).map(|key| key.name).collect();
    assert_eq!(changed, ["admin.token", "cache.fresh", "cache.host.fresh"]);
    assert_eq!(one.changed(&one).count(), 0);
    assert!(is_secret("admin.token"));
}

#[test]
fn what_needs_a_restart_is_documented() {
    let document = include_str!("../../docs/deploying.md");
    let (_, section) = document.split_once("which of them need a restart.").unwrap();
    let (section, _) = section.split_once("\n- ").unwrap();
    let named: Vec<&str> = section.split('`').skip(1).step_by(2).collect();
    for key in KEYS {
        assert_eq!(named.contains(&key.name), key.reload != Reload::Live, "{}", key.name);
    }
}
