//! What a replica and Redis tell each other beside the calls wanted and granted: which of them Redis does not know,
//! the state of its memory, and what its clock must show.

use super::{calls::ByPart, window::Window};

/// One part in so many may two machines' clocks be apart.
const DRIFT: u64 = 1_000;
/// For so long, in microseconds, a demand may be under way before Redis's clock is taken to have stepped.
const SLACK: u64 = 100_000;

/// What goes to Redis with a demand for calls.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    /// When that was, on the clock of this replica.
    pub(super) at: u64,
    /// The state of Redis's memory as last heard, if that matters still.
    pub(super) memory: Option<Memory>,
    /// What Redis's clock must show by now, at least and at most.
    pub(super) clock: Option<(u64, u64)>,
    /// Redis was away: calls may have been made that it does not know.
    pub(super) away: bool,
    /// Of each window what there is to report.
    pub(super) windows: Vec<Report>,
}

/// Calls of a window that Redis may not know of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) window: Window,
    /// All that were ever made while Redis was away, if it may not know of them.
    pub(super) ever_alone: u64,
    /// Those of them that are in the window still.
    pub(super) alone: ByPart,
    /// Those Redis had granted before it lost its memory.
    pub(super) lost: ByPart,
}

impl Report {
    pub(super) fn nothing(window: Window) -> Self {
        Self { window, ever_alone: 0, alone: Vec::new(), lost: Vec::new() }
    }
}

/// The state of an account's memory in Redis, in its own time: microseconds that do not step back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// When it came into being, or last lost something.
    pub(super) born: u64,
    /// From when on it lost what had been told before it was born; nought if everything.
    pub(super) lost: u64,
    /// When it last changed.
    pub(super) at: u64,
    /// What its clock shows.
    pub(super) clock: u64,
}

/// What was last heard of Redis's memory.
#[derive(Clone, Copy)]
pub(super) struct Heard {
    pub(super) memory: Memory,
    /// When that state was first heard of.
    pub(super) changed: u64,
    /// When Redis was asked what its clock shows, and when it answered.
    pub(super) asked: u64,
    pub(super) answered: u64,
}

impl Heard {
    /// What the clock must show at `now`, at least and at most: as much later as this replica's own clock says, give
    /// or take what clocks are apart and what a demand is under way.
    pub(super) fn clock(&self, now: u64) -> (u64, u64) {
        let (least, most) = (now.saturating_sub(self.answered), now.saturating_sub(self.asked));
        let least = self.memory.clock + (least - least / DRIFT) / 1_000;
        let most = self.memory.clock + (most + most / DRIFT) / 1_000;
        (least.saturating_sub(SLACK), most + SLACK)
    }
}
