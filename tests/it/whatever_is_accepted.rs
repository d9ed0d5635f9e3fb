//! Whatever configuration `check` accepts serves: it starts, is ready, answers, and stops.

use std::{sync::Arc, time::Duration};

use cyberscan_relay::{
    sandbox::{Options, Sandbox},
    settings::{KEYS, Key, Kind},
};
use http::{Method, StatusCode};
use tokio::time::timeout;

use crate::harness::{TestRelay, list};

/// How many configurations are tried.
const TRIED: u64 = 150;

/// A generator (splitmix64), so that a configuration is found again by its number.
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn of<'a>(&mut self, values: &[&'a str]) -> &'a str {
        values[self.below(values.len() as u64) as usize]
    }

    /// Mostly one of the two ends, else something between them.
    fn between(&mut self, least: u64, most: u64) -> u64 {
        match self.below(4) {
            0 => least,
            1 => most,
            2 => least + self.below(2).min(most - least),
            _ => least + self.below(most - least + 1),
        }
    }

    /// A value of `key`, as a rule one that it may have; `None` to leave it as it is.
    fn value(&mut self, key: &Key) -> Option<String> {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap();
        Some(match key.kind {
            // It is what a stop waits for.
            Kind::Duration(_) if key.name == "server.shutdown_delay" => format!("{}ms", self.below(50)),
            Kind::Duration(bounds) => {
                format!("{}ms", self.between(milliseconds(bounds.least), milliseconds(bounds.most)))
            }
            Kind::Number(bounds) | Kind::Size(bounds) => self.between(bounds.least, bounds.most).to_string(),
            Kind::Share(bounds) => {
                let drawn = self.between(0, 1000) as f64 / 1000.0;
                (bounds.least + drawn * (bounds.most - bounds.least)).to_string()
            }
            Kind::Flag => self.of(&["true", "false"]).to_owned(),
            Kind::OneOf(words) => self.of(words).to_owned(),
            Kind::Value(_) | Kind::List(_) => self.of(texts(key.name)?).to_owned(),
        })
    }
}

/// Values of keys that have a form of their own, odd ones and wrong ones among them.
fn texts(key: &str) -> Option<&'static [&'static str]> {
    Some(match key {
        "auth.audiences" => &[
            "",
            "https://relay.test",
            "\"https://relay.test/\"",
            "https://relay.test,https://b.test/x/",
            "relay",
        ],
        "auth.trusted_proxies" => &["", "127.0.0.1", "10.0.0.0/8,::1/128", "0.0.0.0/0", "nowhere"],
        "egress.proxy" => &[
            "",
            "http://127.0.0.1:1",
            "http://user:word@proxy.invalid:3128",
            "https://proxy.invalid",
            "socks",
        ],
        "log.level" => &["info", "off", "trace", "warn,hyper=debug", "warning", ""],
        "redis.url" => &[
            "",
            "redis://127.0.0.1:1",
            "redis://127.0.0.1:1,redis://127.0.0.1:2",
            "rediss://redis.invalid",
            "redis://h/abc",
            "redis://user:word@127.0.0.1:1/7",
            "redis://[::1]:1",
        ],
        "redis.encryption_key" => {
            &["", "00", "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"]
        }
        "redis.master_name" => &["mymaster", "a b", "x"],
        "redis.sentinel.username" | "redis.sentinel.password" => &["", "watch", "p@ss/w:rd %", "a\u{7}b"],
        "redis.sentinel.tls" => &["", "true", "false", "perhaps"],
        "redis.key_prefix" => &["relay:", "xdr:prod:", "", "a b", "{one}", "all*"],
        "redis.ca_file" => &["", "", "", "/dev/null"],
        "admin.token" => &["", "short", "0123456789abcdef0123456789abcdef", "two words"],
        "limiter.tenant" | "limiter.fleet" => &[
            "",
            "1/s",
            "1/30d",
            "1000000/s",
            "10/s,600/m,5000/d",
            "20/s,10/s",
            "100000/30d",
            "0/s",
            "18446744073709551615/s",
            "4294967295/d",
            "5/1000000h",
        ],
        // The harness has its own listeners, hosts and certificates.
        _ => return None,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_that_check_accepts_serves() {
    let sandbox = Arc::new(Sandbox::start(Options::default()).await.unwrap());
    let mut accepted = 0;
    for number in 0..TRIED {
        let mut draw = Draw(number << 32);
        // A few keys, or most of them.
        let share = if draw.below(2) == 0 { 12 } else { 2 };
        let drawn: Vec<(String, String)> = KEYS
            .iter()
            .filter_map(|key| (draw.below(share) == 0).then(|| Some((key.variable(), draw.value(key)?)))?)
            .collect();
        let settings: Vec<(&str, &str)> = drawn.iter().map(|(name, value)| (&**name, &**value)).collect();
        let Ok(relay) = TestRelay::attempt(&sandbox, &settings).await else { continue };
        accepted += 1;
        let served = async {
            let ready = relay.administer(Method::GET, "/readyz", None, "").await;
            assert_eq!(ready.status, StatusCode::OK, "{settings:?}");
            // Whatever can be had with these settings: a whole answer, or an error that says why not.
            let answer =
                relay.post("/observe/observables", &relay.token(), list(&[("ip", "198.18.0.1")])).await;
            let answer = answer.json();
            assert!(answer.get("data").or(answer.get("errors")).is_some(), "{answer} {settings:?}");
            let version = relay.post("/version", "", "").await.json();
            assert!(version["version"].is_string(), "{version} {settings:?}");
            let panics = relay.series().await["relay_panics_total"];
            assert!(panics == 0.0, "{settings:?}");
            relay.stop().await;
        };
        let within = Duration::from_secs(30);
        assert!(
            timeout(within, served).await.is_ok(),
            "not served and stopped within {within:?}: {settings:?}"
        );
    }
    eprintln!("{accepted} of {TRIED} configurations are accepted, and serve");
    assert!(accepted > TRIED / 4, "{accepted} of {TRIED}: hardly anything is tried");
}
