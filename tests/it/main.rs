//! The integration tests: the relay as its users meet it, over sockets, with the sandbox's fake
//! CyberScan and key issuer behind it.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "a test that cannot go on has failed; figures are printed"
)]

mod fleet;
mod harness;
mod redis;
#[path = "../../benches/simulation/mod.rs"]
mod simulation;

mod admin;
mod attacks;
mod canary;
mod command_line;
mod doctor;
mod enrichment;
mod faults;
mod first_day;
mod golden;
mod https;
mod in_front;
mod limits;
mod lost_memory;
#[cfg(feature = "otel")]
mod otel;
mod prefetch;
mod proxies;
mod redis_as_run;
mod redis_trouble;
mod reload;
mod whatever_is_accepted;
mod replicas;
mod routes;
mod same_everywhere;
mod storms;
mod tenancy;
mod upstream;
