//! An answer depends on what was asked, not on whom, when, or what happens to be in whose memory; and nothing is asked
//! of CyberScan that is nobody's on the internet.

use cyberscan_relay::sandbox::{Call, Rule};
use serde_json::{Value, json};

use crate::{
    fleet::{PATIENT, addresses, fleet, fresh_ip, sharing_within},
    harness::{TestRelay, codes, list, seen},
    redis::RedisServer,
};

/// A question to one of three replicas.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Refer(usize),
    Observe(usize),
}

/// Every order of referring at one replica and observing at each.
fn orders() -> Vec<Vec<Step>> {
    fn extend(done: &[Step], left: &[Step], orders: &mut Vec<Vec<Step>>) {
        if left.is_empty() {
            orders.push(done.to_vec());
        }
        for step in left {
            let rest: Vec<Step> = left.iter().copied().filter(|other| other != step).collect();
            extend(&[done, &[*step]].concat(), &rest, orders);
        }
    }
    let mut orders = Vec::new();
    extend(&[], &[Step::Refer(0), Step::Observe(0), Step::Observe(1), Step::Observe(2)], &mut orders);
    orders
}

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_give_one_answer_in_every_order_of_refer_and_observe() {
    let redis = RedisServer::start().await;
    let url = redis.url();
    for page in ["false", "true"] {
        let settings = [("RELAY_REDIS_URL", url.as_str()), PATIENT, ("RELAY_CTIM_IP_DETAILS_PAGE", page)];
        let relays = fleet(3, &settings).await;
        sharing_within(std::time::Duration::from_secs(10), &relays[0].sandbox, &addresses(&relays)).await;
        for order in orders() {
            let ip = fresh_ip();
            let body = list(&[("ip", &ip)]);
            let mut answers = Vec::new();
            // Round again, so that each has been asked before and after all others.
            for step in order.iter().chain(&order) {
                let (relay, route) = match step {
                    Step::Refer(at) => (&relays[*at], "/refer/observables"),
                    Step::Observe(at) => (&relays[*at], "/observe/observables"),
                };
                let answer = relay.post(route, &relay.token(), body.clone()).await;
                if let Step::Observe(_) = step {
                    answers.push(answer.body);
                }
            }
            let first: Value = serde_json::from_slice(&answers[0]).unwrap();
            assert_eq!(seen(&first), [ip.as_str()], "{order:?}: {first}");
            for doc in first["data"]["sightings"]["docs"].as_array().unwrap() {
                assert_eq!(doc.get("source_uri").is_some(), page == "true", "{order:?}: {doc}");
            }
            assert!(answers.iter().all(|answer| *answer == answers[0]), "{order:?}: {answers:?}");
        }
    }
}

#[tokio::test]
async fn a_page_of_an_address_is_paid_for_where_something_was_found_and_costs_no_finding() {
    let relay = TestRelay::with(&[("RELAY_CTIM_IP_DETAILS_PAGE", "true")]).await;
    let cyberscan = &relay.sandbox.cyberscan;
    cyberscan.set_vulnerabilities("203.0.113.77", &json!({"ip": "203.0.113.77", "vulnerabilities": []}));
    assert_eq!(relay.observe(&[("ip", "203.0.113.77")]).await, json!({"data": {}}));
    assert_eq!(cyberscan.count(Call::Ip), 0);

    let ip = fresh_ip();
    cyberscan.script(Rule::on(Call::Ip).value(&ip).answer(503));
    let answer = relay.observe(&[("ip", &ip)]).await;
    assert_eq!((seen(&answer), codes(&answer)), (vec![ip.as_str()], vec!["service unavailable"]));
    assert!(answer["data"]["sightings"]["docs"][0].get("source_uri").is_none());
}

/// Addresses that are nobody's, in more spellings than one.
const NOBODYS: [(&str, &str); 14] = [
    ("ip", "10.0.0.1"),
    ("ip", "172.16.5.5"),
    ("ip", "192.168.1.1"),
    ("ip", "127.0.0.1"),
    ("ip", "169.254.169.254"),
    ("ip", "100.64.0.1"),
    ("ip", "224.0.0.1"),
    ("ip", "0.0.0.0"),
    ("ip", "::ffff:10.0.0.2"),
    ("ipv6", "::1"),
    ("ipv6", "fd00::1"),
    ("ip", "fe80::1"),
    ("ipv6", "ff02::1"),
    ("ipv6", "::"),
];

#[tokio::test]
async fn nobodys_address_is_answered_as_not_known_without_a_call_also_where_a_domain_leads_there() {
    let relay = TestRelay::start().await;
    let cyberscan = &relay.sandbox.cyberscan;
    assert_eq!(relay.observe(&NOBODYS).await, json!({"data": {}}));
    assert_eq!(relay.refer(&NOBODYS).await, json!({"data": []}));
    let calls = cyberscan.calls();
    assert!(calls.is_empty(), "not even a token is asked for: {calls:?}");

    for (number, (_, address)) in NOBODYS.iter().enumerate() {
        let domain = format!("inside-{number}.example");
        cyberscan.set_domain(&domain, &json!({"domain": domain, "ip": address}));
        assert_eq!(relay.observe(&[("domain", &domain)]).await, json!({"data": {}}), "{address}");
    }
    assert_eq!(cyberscan.count(Call::Domain), NOBODYS.len());
    assert_eq!(cyberscan.count(Call::Vulnerabilities) + cyberscan.count(Call::Ip), 0);

    // Beside others it costs them nothing.
    let ip = fresh_ip();
    let answer = relay.observe(&[("ip", "10.0.0.1"), ("ip", &ip)]).await;
    assert_eq!((seen(&answer), codes(&answer)), (vec![ip.as_str()], vec![]));
}

#[tokio::test]
async fn a_setting_has_nobodys_addresses_looked_up() {
    let relay = TestRelay::with(&[("RELAY_CYBERSCAN_PRIVATE_ADDRESSES", "true")]).await;
    let cyberscan = &relay.sandbox.cyberscan;
    let finding = json!({"ip": "10.0.0.1", "vulnerabilities": [{"name": "Inside"}]});
    cyberscan.set_vulnerabilities("10.0.0.1", &finding);
    cyberscan.set_domain("inside.example", &json!({"domain": "inside.example", "ip": "::ffff:10.0.0.1"}));
    let answer = relay.observe(&[("ip", "10.0.0.1"), ("domain", "inside.example")]).await;
    assert_eq!(seen(&answer), ["10.0.0.1", "inside.example"]);
    assert_eq!(cyberscan.count_of(Call::Vulnerabilities, "10.0.0.1"), 1);
}

#[tokio::test]
async fn an_address_is_one_whatever_its_spelling_and_type_and_is_told_as_it_was_asked() {
    let relay = TestRelay::start().await;
    let cyberscan = &relay.sandbox.cyberscan;
    let finding = json!({"ip": "2001:db8::5", "vulnerabilities": [{"name": "Open door"}]});
    cyberscan.set_vulnerabilities("2001:db8::5", &finding);
    let mut ids = Vec::new();
    for (kind, value) in [
        ("ip", "203.0.113.10"),
        ("ip", "::ffff:203.0.113.10"),
        ("ipv6", "::FFFF:cb00:710a"),
        ("ipv6", "2001:db8::5"),
        ("ip", "2001:DB8:0:0::5"),
    ] {
        let answer = relay.observe(&[(kind, value)]).await;
        let doc = &answer["data"]["sightings"]["docs"][0];
        assert_eq!(doc["observables"], json!([{"type": kind, "value": value}]), "{answer}");
        ids.push(doc["id"].clone());
        let reference = relay.refer(&[(kind, value)]).await;
        if let Some(reference) = reference["data"].as_array().and_then(|list| list.first()) {
            assert_eq!(reference["id"], format!("ref-cyberscan-search-{kind}-{value}"));
        }
    }
    assert!(ids[0] == ids[1] && ids[1] == ids[2] && ids[3] == ids[4], "{ids:?}");
    assert_eq!(cyberscan.count(Call::Vulnerabilities), 2, "{:?}", cyberscan.calls());
    let asked = [
        ("ip", "::ffff:203.0.113.10"),
        ("ip", "203.0.113.10"),
        ("ipv6", "2001:db8::5"),
        ("ip", "2001:db8::5"),
    ];
    assert_eq!(seen(&relay.observe(&asked).await), ["::ffff:203.0.113.10", "2001:db8::5"]);
}
