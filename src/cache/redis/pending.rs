//! Writes that wait for Redis to come back. It owns which of them are kept; it must not know how they are written.

use std::{cmp::Reverse, collections::HashMap};

use crate::cache::tier::{Name, Write};

/// Bytes that wait at most.
const BYTES: usize = 16 << 20;
/// What a write takes beside what it is of.
const SLOT: usize = 256;

/// The newest write of each name, and of all as many of the newest as there is room for.
#[derive(Default)]
pub(super) struct Pending {
    writes: HashMap<Name, Write>,
    bytes: usize,
}

impl Pending {
    /// Keeps `write`, unless a newer one of its name is kept. It is nobody's any more: its lock will be lost.
    pub(super) fn add(&mut self, write: Write) {
        if self.writes.get(&write.name).is_some_and(|present| present.version >= write.version) {
            return;
        }
        self.remove(write.name);
        self.bytes += write.size + SLOT;
        self.writes.insert(write.name, Write { owner: None, ..write });
        while self.bytes > BYTES
            && let Some(oldest) =
                self.writes.values().min_by_key(|write| write.version).map(|write| write.name)
        {
            self.remove(oldest);
        }
    }

    /// Takes all writes out, the newest first.
    pub(super) fn take(&mut self) -> Vec<Write> {
        self.bytes = 0;
        let mut writes: Vec<Write> = self.writes.drain().map(|(_, write)| write).collect();
        writes.sort_unstable_by_key(|write| Reverse(write.version));
        writes
    }

    fn remove(&mut self, name: Name) {
        if let Some(write) = self.writes.remove(&name) {
            self.bytes -= write.size + SLOT;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::time::Instant;

    use super::*;
    use crate::cache::tier::Value;

    fn write(name: u8, version: u64, size: usize) -> Write {
        let (until, value) = (Instant::now(), Value(Arc::new(|_| None)));
        Write { name: [name; 16], version, until, owner: Some("owner".into()), size, value }
    }

    fn waiting(pending: &mut Pending) -> Vec<(u8, u64)> {
        pending.take().iter().map(|write| (write.name[0], write.version)).collect()
    }

    #[test]
    fn the_newest_of_each_name_waits_and_the_newest_goes_first() {
        let mut pending = Pending::default();
        for (name, version) in [(1, 7), (2, 9), (1, 6), (3, 8), (1, 10), (2, 9)] {
            pending.add(write(name, version, 100));
        }
        assert_eq!(pending.bytes, 3 * (100 + SLOT));
        assert_eq!(waiting(&mut pending), [(1, 10), (2, 9), (3, 8)]);
        assert_eq!((waiting(&mut pending), pending.bytes), (Vec::new(), 0));
    }

    #[test]
    fn what_waits_is_bounded_in_bytes_and_the_oldest_makes_room() {
        let mut pending = Pending::default();
        for name in 0..40 {
            pending.add(write(name, 100 + u64::from(name), 1 << 20));
            assert!(pending.bytes <= BYTES);
        }
        let left = waiting(&mut pending);
        assert_eq!((left.len(), left[0], left[14]), (15, (39, 139), (25, 125)));
        pending.add(write(1, 1, BYTES));
        assert_eq!(waiting(&mut pending), [], "larger than all the room there is");
    }
}
