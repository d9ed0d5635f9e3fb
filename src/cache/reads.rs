//! What is read, noted for whoever wants to know what is asked for often. It owns how cheap that is: one
//! addition per read, and one note per answer between two collections; it must not know what notes are for.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use super::tier::Key;
use crate::{ctim::Subject, tenant::Tenant};

/// The most notes between two collections; what is read beyond them is not noted.
const NOTES: usize = 65_536;

/// How an answer in memory is used.
#[derive(Debug, Default)]
pub struct Reads {
    /// It was brought here for a look-up that has not come yet.
    pub(super) unread: AtomicBool,
    /// CyberScan was asked for it because of a reader, and that has not been noted yet.
    pub(super) filled: AtomicBool,
    /// Redis has a newer one.
    pub(super) superseded: AtomicBool,
    /// Reads since the last collection.
    count: AtomicU32,
    /// Somebody will renew it in time: a read need not.
    cared_for: AtomicBool,
}

impl Reads {
    /// Reads since the last time this was asked.
    #[must_use]
    pub fn take(&self) -> u32 {
        self.count.swap(0, Ordering::Relaxed)
    }

    /// Says whether somebody will renew the answer shortly before its end.
    pub fn care(&self, cared_for: bool) {
        self.cared_for.store(cared_for, Ordering::Relaxed);
    }

    pub(super) fn cared_for(&self) -> bool {
        self.cared_for.load(Ordering::Relaxed)
    }
}

/// An answer that somebody who waited for it got.
#[derive(Clone, Debug)]
pub struct Note {
    /// Who asked.
    pub tenant: Arc<Tenant>,
    /// What it is kept under.
    pub key: Key,
    /// What it is an answer about.
    pub subject: Subject,
    /// Where a domain leads.
    pub address: Option<IpAddr>,
    /// How long it stays fresh.
    pub expires_in: Duration,
    /// How long it is fresh in all.
    pub life: Duration,
    /// CyberScan was asked for it because of a reader, since the last note.
    pub filled: bool,
    /// Its reads.
    pub reads: Arc<Reads>,
}

/// Notes that wait to be collected; a cheap clone.
#[derive(Clone, Default)]
pub struct Notes(Arc<Mutex<Vec<Note>>>);

impl Notes {
    /// What was read since the last collection, each answer once.
    #[must_use]
    pub fn collect(&self) -> Vec<Note> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn read(&self, reads: &Arc<Reads>, note: impl FnOnce(Arc<Reads>) -> Note) {
        if reads.count.fetch_add(1, Ordering::Relaxed) > 0 {
            return;
        }
        let note = note(Arc::clone(reads));
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() < NOTES {
            notes.push(note);
        }
    }
}
