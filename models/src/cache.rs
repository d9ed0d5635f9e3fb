//! The cache's order of purges, from its very source, with as much beside it as it needs.

#[path = "../../src/cache/order.rs"]
#[expect(dead_code, reason = "the relay uses what the models do not")]
pub mod order;

/// What the order asks of keys.
pub mod tier {
    pub type Name = [u8; 16];

    pub struct Key {
        pub label: Name,
        pub subject: Box<str>,
    }
}
