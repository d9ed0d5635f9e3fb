//! cyberscan-relay: the relay between Cisco SecureX/XDR and CyberScan.
//!
//! The modules, in reading order: values first, then the way of a request from the outside in.

pub mod auth;
pub mod clock;
pub mod ctim;
pub mod cyberscan;
pub mod egress;
pub mod flight;
pub mod sandbox;
pub mod tenant;
