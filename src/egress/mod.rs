//! The egress guard: every call out of this process goes through here. It owns which hosts may be
//! called ([`host`]), which addresses may be connected to ([`address`], [`resolver`]), which
//! certificates are believed ([`tls`]) and how much of an answer is read ([`client`]). It must not
//! know what the calls are for.

pub mod address;
pub mod client;
#[cfg(feature = "otel")]
mod collector;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod host;
pub mod resolver;
pub mod tls;

pub use address::AddressGuard;
pub use client::{Config, Http, Reply, Transport};
#[cfg(feature = "otel")]
pub(crate) use collector::Collector;
pub use host::{Host, HostPatterns};
