//! Crowds with one question, spread over three relay processes on one Redis: CyberScan hears it once.

use std::{net::SocketAddr, time::Duration};

use cyberscan_relay::sandbox::{Behaviour, Call, Options, Rule, Sandbox};
use serde_json::Value;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    fleet::{PATIENT, RelayProcess, ask, fresh_ip},
    harness::{AUDIENCE, TestRelay, codes, seen},
    redis::{RedisServer, eventually},
};

/// Three relays and their world.
struct Storm {
    _redis: RedisServer,
    sandbox: Sandbox,
    relays: Vec<RelayProcess>,
    token: String,
}

impl Storm {
    async fn gathers(settings: &[(&str, &str)]) -> Self {
        let redis = RedisServer::process(&[]).await;
        let sandbox = Sandbox::start(Options::default()).await.unwrap();
        let url = redis.url();
        let settings = [settings, &[("RELAY_REDIS_URL", url.as_str()), PATIENT]].concat();
        let relays = RelayProcess::fleet(3, &sandbox, &settings).await;
        let token = sandbox.token(AUDIENCE);
        sandbox.cyberscan.reset_counts();
        Self { _redis: redis, sandbox, relays, token }
    }

    fn address(&self, caller: usize) -> SocketAddr {
        self.relays[caller % self.relays.len()].address
    }

    fn calls(&self, ip: &str) -> usize {
        self.sandbox.cyberscan.count_of(Call::Vulnerabilities, ip)
    }

    /// Asks about `ip` as so many callers at once; those for whom `leaves` says so hang up after that time.
    async fn ask(
        &self,
        callers: usize,
        ip: &str,
        leaves: impl Fn(usize) -> Option<Duration>,
    ) -> Vec<Option<Value>> {
        let mut crowd = JoinSet::new();
        for caller in 0..callers {
            let (address, token, ip) = (self.address(caller), self.token.clone(), ip.to_owned());
            let patience = leaves(caller);
            crowd.spawn(async move {
                let asked = [("ip", ip.as_str())];
                let asking = ask(address, &token, &asked);
                match patience {
                    None => Some(asking.await.unwrap()),
                    Some(patience) => {
                        let _ = timeout(patience, asking).await;
                        None
                    }
                }
            });
        }
        crowd.join_all().await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_callers_of_three_processes_are_one_call() {
    let storm = Storm::gathers(&[]).await;
    storm.sandbox.cyberscan.latency(Duration::from_millis(300));
    let ip = fresh_ip();
    let answers = storm.ask(1000, &ip, |_| None).await;
    assert_eq!(answers.len(), 1000);
    for answer in answers.into_iter().flatten() {
        assert!(answer.get("errors").is_none() && seen(&answer) == [ip.as_str()], "{answer}");
    }
    assert_eq!(storm.calls(&ip), 1);
    assert_eq!(storm.sandbox.cyberscan.calls().len(), 1, "{:?}", storm.sandbox.cyberscan.calls());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_who_leave_early_change_nothing_for_those_who_stay() {
    let storm = Storm::gathers(&[]).await;
    storm.sandbox.cyberscan.latency(Duration::from_millis(300));
    let ip = fresh_ip();
    // Nine of ten, the first one among them, hang up before CyberScan can have answered.
    let leaves = |caller: usize| {
        (caller % 10 != 9).then(|| Duration::from_millis(5 + u64::try_from(caller * 37 % 250).unwrap()))
    };
    let answers = storm.ask(2500, &ip, leaves).await;
    let stayed: Vec<Value> = answers.into_iter().flatten().collect();
    assert_eq!(stayed.len(), 250);
    for answer in stayed {
        assert!(answer.get("errors").is_none() && seen(&answer) == [ip.as_str()], "{answer}");
    }
    assert_eq!(storm.calls(&ip), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_fails_is_every_callers_error_and_few_calls() {
    let storm = Storm::gathers(&[]).await;
    // Long enough for all to have come, also where the machine is busy.
    storm.sandbox.cyberscan.latency(Duration::from_millis(600));
    storm.sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).answer(503));
    let ip = fresh_ip();
    let answers = storm.ask(400, &ip, |_| None).await;
    for answer in answers.into_iter().flatten() {
        assert_eq!(codes(&answer), ["service unavailable"]);
        assert!(answer.get("data").is_none(), "{answer}");
    }
    // One; a second where a process looked for the lock between its return and the news of the failure. Without a
    // lock there would be one for each process.
    assert!(storm.calls(&ip) <= 2, "{} calls", storm.calls(&ip));

    // And when CyberScan is well again, so is the answer, after the pause.
    storm.sandbox.cyberscan.clear_script();
    eventually("an answer", async || {
        let answer = ask(storm.address(0), &storm.token, &[("ip", &ip)]).await.unwrap();
        seen(&answer) == [ip.as_str()]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_killed_while_it_fetches_costs_its_lease_and_no_answer() {
    // The lease is a second longer than the longest fetch.
    let mut storm = Storm::gathers(&[("RELAY_CACHE_FILL_TIMEOUT", "2s")]).await;
    let ip = fresh_ip();
    storm.sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).value(&ip).times(1).does(Behaviour::Hang));
    let (winner, token, asked) = (storm.address(0), storm.token.clone(), ip.clone());
    let lost = tokio::spawn(async move { ask(winner, &token, &[("ip", &asked)]).await });
    eventually("the winner asks", async || storm.calls(&ip) == 1).await;
    let started = Instant::now();
    let others = [1, 2].map(|caller| {
        let (address, token, asked) = (storm.address(caller), storm.token.clone(), ip.clone());
        tokio::spawn(async move { ask(address, &token, &[("ip", &asked)]).await.unwrap() })
    });
    sleep(Duration::from_millis(200)).await;
    storm.relays[0].kill().await;
    assert!(lost.await.unwrap().is_err());
    for other in others {
        let answer = other.await.unwrap();
        assert!(answer.get("errors").is_none() && seen(&answer) == [ip.as_str()], "{answer}");
    }
    let waited = started.elapsed();
    assert!(waited < Duration::from_secs(6), "{waited:?}");
    assert_eq!(storm.calls(&ip), 2, "the dead one's and one more");
}

#[tokio::test]
async fn a_lock_nobody_holds_any_more_is_waited_for_and_no_longer() {
    let redis = RedisServer::start().await;
    let url = redis.url();
    let settings = [("RELAY_REDIS_URL", url.as_str()), PATIENT];
    let relays = crate::fleet::fleet(2, &settings).await;
    let addresses = crate::fleet::addresses(&relays);
    crate::fleet::sharing_within(Duration::from_secs(10), &relays[0].sandbox, &addresses).await;
    let (ip, before) = (fresh_ip(), redis.values().await);
    relays[0].observe(&[("ip", &ip)]).await;
    eventually("its value", async || redis.values().await.len() > before.len()).await;
    let value = redis.values().await.into_iter().find(|key| !before.contains(key)).unwrap();
    let lock = format!("{}:l", value.strip_suffix(":v").unwrap());
    let _: u8 = redis.ask(&["DEL", &value]).await;
    let _: String = redis.ask(&["SET", &lock, "somebody", "PX", "1000"]).await;

    let started = Instant::now();
    let asked = [("ip", ip.as_str())];
    let asking = relays[1].observe(&asked);
    let looking = async {
        sleep(Duration::from_millis(400)).await;
        relays[1].sandbox.cyberscan.count_of(Call::Vulnerabilities, &ip)
    };
    let (answer, meanwhile) = tokio::join!(asking, looking);
    assert_eq!(meanwhile, 1, "asked although somebody else does");
    assert_eq!(seen(&answer), [ip.as_str()]);
    let waited = started.elapsed();
    assert!((Duration::from_millis(500)..Duration::from_secs(5)).contains(&waited), "{waited:?}");
    assert_eq!(count(&relays[1], &ip), 2);
    // A lock of somebody else's stays somebody else's.
    let _: String = redis.ask(&["SET", &lock, "somebody", "PX", "60000"]).await;
    relays[1].observe(&[("ip", &fresh_ip())]).await;
    assert_eq!(redis.ask::<String>(&["GET", &lock]).await, "somebody");
}

fn count(relay: &TestRelay, ip: &str) -> usize {
    relay.sandbox.cyberscan.count_of(Call::Vulnerabilities, ip)
}
