//! What the process asks of the operating system for itself, before it holds a secret: no core dump, no look into its
//! memory for other processes of its user, as many open files as it may have. It must not know settings.

use std::{io, num::NonZeroUsize};

#[cfg(target_os = "linux")]
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Files that are left to calls, Redis and the listeners however few there are.
const LEAST_LEFT: u64 = 32;

/// What the operating system granted.
#[derive(Debug)]
pub struct Hardened {
    refused: Vec<(&'static str, io::Error)>,
    /// Files that may be open at once; `None` for any number.
    files: Option<u64>,
}

/// Asks for all of it. A refusal ends nothing; [`Hardened::tell`] logs it.
#[must_use]
pub fn harden() -> Hardened {
    let mut refused = Vec::new();
    let mut note = |what, outcome: rustix::io::Result<()>| {
        if let Err(error) = outcome {
            refused.push((what, error.into()));
        }
    };
    // Where a service manager has done it already, asking might be what is forbidden.
    let mut limit = |what, resource, wanted: Rlimit| {
        if getrlimit(resource) != wanted {
            note(what, setrlimit(resource, wanted));
        }
    };
    limit("no core dumps", Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let files = getrlimit(Resource::Nofile);
    limit("more open files", Resource::Nofile, Rlimit { current: files.maximum, ..files });
    // Also /proc/<pid>/environ and mem are root's from now on, and no debugger of the same user attaches.
    #[cfg(target_os = "linux")]
    note("not dumpable", set_dumpable_behavior(DumpableBehavior::NotDumpable));
    Hardened { refused, files: getrlimit(Resource::Nofile).current }
}

impl Hardened {
    /// Logs what was refused, in one line.
    pub fn tell(&self) {
        if !self.refused.is_empty() {
            let refused: Vec<String> =
                self.refused.iter().map(|(what, error)| format!("{what}: {error}")).collect();
            warn!(refused = refused.join("; "), "the operating system refuses a part of the hardening");
        }
    }

    /// `wanted` client connections, or as many as leave files for everything else: were the last file a client's,
    /// none would be left to ask CyberScan for it.
    #[must_use]
    pub fn connections(&self, wanted: NonZeroUsize) -> NonZeroUsize {
        let Some(files) = self.files else { return wanted };
        let room = room(files);
        if room < wanted {
            warn!(files, connections = room, "the limit of open files allows fewer connections than are set");
        }
        wanted.min(room)
    }
}

/// Client connections that leave enough of `files` for everything else.
fn room(files: u64) -> NonZeroUsize {
    let room = files.saturating_sub(LEAST_LEFT.max(files / 4));
    usize::try_from(room).ok().and_then(NonZeroUsize::new).unwrap_or(NonZeroUsize::MIN)
}

/// How many files this process may have open at most, and how many client connections that allows; `None` for any
/// number.
#[must_use]
pub fn open_files() -> Option<(u64, NonZeroUsize)> {
    getrlimit(Resource::Nofile).maximum.map(|files| (files, room(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_files_at_least_is_not_for_clients() {
        let connections = |files, wanted| {
            let hardened = Hardened { refused: Vec::new(), files };
            hardened.connections(NonZeroUsize::new(wanted).unwrap()).get()
        };
        assert_eq!(connections(None, 4096), 4096);
        assert_eq!(connections(Some(20_000), 4096), 4096);
        assert_eq!(connections(Some(1024), 4096), 768);
        assert_eq!(connections(Some(64), 4096), 32);
        assert_eq!(connections(Some(8), 4096), 1);
    }
}
