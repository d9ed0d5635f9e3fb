//! cyberscan-relay: the relay between Cisco SecureX/XDR and CyberScan.
//!
//! The modules, in reading order: values and guards at the bottom first, then the way of a
//! question from CyberScan up to the listener, then what puts it all together.

pub mod clock;
pub mod chance;
pub mod surrogates;
pub mod sync;
pub mod flight;
pub mod live;
pub mod metrics;
pub mod trace;
pub mod redis_pool;
pub mod egress;
pub mod tenant;
pub mod ctim;
pub mod cyberscan;
pub mod cache;
pub mod limiter;
pub mod worker;
pub mod auth;
pub mod enrich;
pub mod http;
pub mod sandbox;
pub mod telemetry;
pub mod hardening;
pub mod reload;
pub mod settings;
pub mod admin;
pub mod app;
pub mod probe;
pub mod module_type;
pub mod demo;
pub mod doctor;
#[cfg(any(test, fuzzing))]
pub mod fuzz;

/// The one Redis fixture, which unit tests share with the integration tests.
#[cfg(test)]
#[path = "../tests/it/redis.rs"]
#[expect(dead_code, clippy::disallowed_methods, reason = "unit tests need a part of it; it is test code")]
pub(crate) mod redis_server;
