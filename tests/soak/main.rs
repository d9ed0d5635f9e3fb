//! The soak: hours of ordinary days in minutes. Two relays on one Redis are asked steadily while one thing after the
//! other goes wrong around them; every answer is judged, and what a process holds must be the same in the end.
//!
//! `make soak` takes a warm-up and five minutes; without `RELAY_SOAK_SECONDS` each fault comes once, in quick
//! succession, and answers are judged only. It is a test binary of its own because it wants the machine for itself.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stderr,
    dead_code,
    reason = "a test that cannot go on has failed; figures are printed; not all of the harness is needed here"
)]

#[path = "../it/fleet.rs"]
mod fleet;
#[path = "../it/harness.rs"]
mod harness;
#[path = "../it/redis.rs"]
mod redis;

mod world;
mod load;
mod faults;
mod measure;
mod trial;
