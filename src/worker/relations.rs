//! Whether analysts follow a tenant's domains to their addresses. It owns the evidence for that: only where
//! most domains were followed lately is anything fetched on the guess that the next one will be.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    time::Duration,
};

use tokio::time::Instant;

use crate::{cache::reads::Note, ctim::Subject, cyberscan::RecordType};

/// How long after a domain its address counts as asked for because of it.
const SOON: Duration = Duration::from_secs(30);
/// Domains that are watched at once.
const WATCHED: usize = 1_000;
/// Domains that must have been watched before anything is concluded.
const ENOUGH: f64 = 5.0;
/// The share of them that must have been followed.
const MOST: f64 = 0.5;
/// What is old counts less: each domain makes those before it count so much.
const FADE: f64 = 0.99;

/// The evidence of one tenant.
#[derive(Debug, Default)]
pub(super) struct Relations {
    asked: f64,
    followed: f64,
    watched: HashMap<IpAddr, Instant>,
    order: VecDeque<(Instant, IpAddr)>,
}

impl Relations {
    /// Takes in that something was read; addresses worth fetching go to `follow`.
    pub(super) fn read(&mut self, note: &Note, follow: &mut Vec<IpAddr>) {
        let now = Instant::now();
        match (note.key.record_type, &note.subject, note.address) {
            (RecordType::Domain, _, Some(ip)) => {
                while let Some((since, old)) = self.order.front().copied()
                    && (now - since > SOON || self.order.len() >= WATCHED)
                {
                    self.order.pop_front();
                    if self.watched.get(&old) == Some(&since) {
                        self.watched.remove(&old);
                        self.asked = self.asked * FADE + 1.0;
                        self.followed *= FADE;
                    }
                }
                if self.watched.contains_key(&ip) {
                    return;
                }
                self.watched.insert(ip, now);
                self.order.push_back((now, ip));
                if self.asked >= ENOUGH && self.followed >= MOST * self.asked {
                    follow.push(ip);
                }
            }
            // A domain brings the vulnerabilities of its address anyway; its record only who follows asks for.
            (RecordType::Host, Subject::Ip(ip), _)
                if self.watched.remove(ip).is_some_and(|since| now - since <= SOON) =>
            {
                self.asked = self.asked * FADE + 1.0;
                self.followed = self.followed * FADE + 1.0;
            }
            _ => {}
        }
    }
}
