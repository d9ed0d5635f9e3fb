//! What this replica knows of an account's calls: those it made, in each window; those Redis has not been told
//! of; those Redis has forgotten. It owns the arithmetic of windows and what there is to report; it must
//! not know how Redis is asked, nor who waits. Whoever owns a ledger has it behind one lock.
//!
//! There are two things to report. Calls made while Redis was away: their number only ever grows, and Redis
//! notes how far it has been told, so a report whose answer got lost is sent again and counted once. And what
//! was granted before Redis lost its memory, or a part of it: Redis notes who has told it that, too. It is also
//! told how far its clock must have come, so that a step of that clock ends no window early and none late.

use std::time::Duration;

use super::{
    bucket::{LONGEST_SPACED, nanos},
    calls::Calls,
    report::{Heard, Memory, Report, Told},
    window::Window,
};

/// Redis was away for so long that others will have made calls without it, too.
const AWAY: Duration = Duration::from_secs(1);
/// One window of an account.
struct Line {
    window: Window,
    /// Calls granted, also those an answer of Redis is awaited for.
    granted: Calls,
    /// Calls made while Redis was away: those in the window, and all there ever were.
    alone: Calls,
    ever_alone: u64,
    /// Of these, those that Redis has counted.
    known_alone: u64,
    /// Since when Redis has lost what it had granted, and not been told again.
    lost: Option<u64>,
    /// Calls of all replicas, as Redis last said, and when.
    heard: Option<(u64, u32)>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Ledger {
    lines: Vec<Line>,
    /// Of the calls granted those an answer of Redis is awaited for.
    awaited: u32,
    /// Redis may not have heard of all calls made while it was away.
    unreported: bool,
    /// The state of Redis's memory.
    memory: Option<Heard>,
    /// Since when Redis has been away.
    away: Option<u64>,
}

impl Ledger {
    /// For `windows`; those that were in `before` go on.
    pub(super) fn new(windows: &[Window], before: Self) -> Self {
        let mut lines = before.lines;
        let mut line = |window: &Window| match lines.iter().position(|line| line.window.per == window.per) {
            Some(place) => Line { window: *window, ..lines.swap_remove(place) },
            None => Line {
                window: *window,
                granted: Calls::new(window.per),
                alone: Calls::new(window.per),
                ever_alone: 0,
                known_alone: 0,
                lost: None,
                heard: None,
            },
        };
        Self { lines: windows.iter().map(&mut line).collect(), ..Self { lines: Vec::new(), ..before } }
    }

    /// How many calls the windows that are not spaced allow this replica, whoever else there is; if none, in how
    /// long there is one. The share `reserve` of each window is left out.
    pub(super) fn free(&mut self, now: u64, reserve: f64) -> (u32, Duration) {
        least(self.lines.iter_mut().filter(|line| !line.spaced()).map(|line| {
            let limit = line.window.limit.get();
            let left = limit - (f64::from(limit) * reserve) as u32;
            let free = left.saturating_sub(line.granted.made(now));
            (free, if free == 0 { line.granted.leaves(now) } else { Duration::ZERO })
        }))
    }

    /// As [`Ledger::free`] while Redis is away: that share of what it last said was left.
    pub(super) fn free_alone(&mut self, now: u64, share: f64) -> (u32, Duration) {
        let awaited = self.awaited;
        least(self.lines.iter_mut().filter(|line| !line.spaced()).map(|line| {
            let limit = line.window.limit.get();
            // What was made alone and Redis does not know of is among what was granted, and what is to be decided now.
            let unknown = u32::try_from(line.ever_alone - line.known_alone).unwrap_or(u32::MAX);
            let alone = line.alone.made(now).min(unknown);
            let before = line.granted.made(now).saturating_sub(alone + awaited);
            let left = limit.saturating_sub(before.max(line.heard(now).unwrap_or_default()));
            // Of a quota too small to be shared one call, unless it is known to be used up.
            let least = if f64::from(limit) * share < 1.0 { left.min(1) } else { 0 };
            let left = ((f64::from(left) * share) as u32).max(least);
            let free = left.saturating_sub(alone);
            (free, if free == 0 { line.window.per / 100 } else { Duration::ZERO })
        }))
    }

    /// Calls are granted if Redis agrees.
    pub(super) fn begin(&mut self, now: u64, calls: u32) {
        self.awaited += calls;
        self.lines.iter_mut().for_each(|line| line.granted.add(now, calls));
    }

    /// Of calls begun so many will not be made.
    pub(super) fn give_back(&mut self, calls: u32) {
        self.awaited = self.awaited.saturating_sub(calls);
        self.lines.iter_mut().for_each(|line| line.granted.take_back(calls));
    }

    /// Of calls begun, `made` are made.
    pub(super) fn end(&mut self, begun: u32, made: u32) {
        self.give_back(begun - made);
        self.awaited = self.awaited.saturating_sub(made);
    }

    /// Of the calls begun so many are made without Redis.
    pub(super) fn made_alone(&mut self, now: u64, calls: u32) {
        self.unreported |= calls > 0;
        for line in &mut self.lines {
            line.alone.add(now, calls);
            line.ever_alone += u64::from(calls);
        }
    }

    /// What Redis is to be told now.
    pub(super) fn tell(&mut self, now: u64) -> Told {
        // Older than the longest window it matters no more, and Redis may have done away with it.
        let longest = self.lines.iter().map(|line| nanos(line.window.per)).max().unwrap_or_default();
        self.memory = self.memory.filter(|heard| now.saturating_sub(heard.changed) < longest);
        let report = |line: &mut Line| line.report(now, self.unreported, self.awaited);
        Told {
            at: now,
            windows: self.lines.iter_mut().map(report).collect(),
            memory: self.memory.map(|heard| heard.memory),
            clock: self.memory.map(|heard| heard.clock(now)),
            away: self.away_for(now) >= AWAY,
        }
    }

    /// Redis has answered what it was `told`. If it has lost something since it was heard last, that is to be
    /// reported. Whether the answer is of the memory Redis has now: what one granted that it has lost since,
    /// it does not know of.
    pub(super) fn hear(&mut self, now: u64, told: &Told, memory: Memory) -> bool {
        self.away = None;
        let new = Heard { memory, changed: now, asked: told.at, answered: now };
        let Some(known) = self.memory else {
            self.memory = Some(new);
            return true;
        };
        if memory.born == known.memory.born {
            // Answers may overtake each other.
            if memory.at > known.memory.at {
                self.memory = Some(new);
            } else if memory.clock > known.memory.clock {
                let memory = Memory { at: known.memory.at, ..memory };
                self.memory = Some(Heard { memory, changed: known.changed, ..new });
            }
            return true;
        }
        if told.at < known.answered {
            return false;
        }
        // What it was told before it began to lose is there still.
        let since = match memory.lost {
            0 => 0,
            lost => known.changed.saturating_sub(known.memory.at.saturating_sub(lost).saturating_mul(1_000)),
        };
        for line in &mut self.lines {
            line.lost = Some(line.lost.map_or(since, |before| before.min(since)));
        }
        self.memory = Some(new);
        true
    }

    /// Whether there is anything to report.
    pub(super) fn owes(&self) -> bool {
        self.unreported || self.lines.iter().any(|line| line.lost.is_some())
    }

    /// Redis has counted what it was told.
    pub(super) fn acknowledged(&mut self, told: &Told) {
        let born = |memory: Option<Memory>| memory.map(|memory| memory.born);
        if born(told.memory) != born(self.memory.map(|heard| heard.memory)) {
            return;
        }
        let mut all = true;
        for report in &told.windows {
            if let Some(line) = self.lines.iter_mut().find(|line| line.window.per == report.window.per) {
                line.lost = None;
                line.known_alone = line.known_alone.max(report.ever_alone.min(line.ever_alone));
                all &= line.ever_alone == report.ever_alone;
            }
        }
        self.unreported &= !all;
    }

    /// Redis has said how many calls of a window all replicas have made.
    pub(super) fn hear_used(&mut self, now: u64, per: Duration, used: u32) {
        if let Some(line) = self.lines.iter_mut().find(|line| line.window.per == per) {
            line.heard = Some((now, used));
        }
    }

    /// Redis does not answer; whether it did before.
    pub(super) fn lose_redis(&mut self, now: u64) -> bool {
        let before = self.away.is_none();
        self.away.get_or_insert(now);
        before
    }

    pub(super) fn is_away(&self) -> bool {
        self.away.is_some()
    }

    /// For how long Redis has been away.
    pub(super) fn away_for(&self, now: u64) -> Duration {
        Duration::from_nanos(self.away.map_or(0, |since| now.saturating_sub(since)))
    }

    /// Which state the windows are in: another one where Redis, or its memory, was lost or found.
    pub(super) fn epoch(&self) -> u64 {
        if self.is_away() { 0 } else { self.memory.map_or(1, |heard| heard.memory.born) }
    }

    /// Of each window how many calls have been made: by all replicas if that was heard within the window, and by
    /// this one at least.
    pub(super) fn used(&mut self, now: u64) -> Vec<(Window, u32)> {
        let used =
            |line: &mut Line| (line.window, line.heard(now).unwrap_or_default().max(line.granted.made(now)));
        self.lines.iter_mut().map(used).collect()
    }
}

impl Line {
    /// Its bucket sees to it.
    fn spaced(&self) -> bool {
        self.window.per <= LONGEST_SPACED
    }

    /// What Redis is to be told of it: calls made alone, if some of them are `unreported`; what it has lost, but for
    /// the newest calls, where an answer is `awaited`.
    fn report(&mut self, now: u64, unreported: bool, mut awaited: u32) -> Report {
        if !unreported && self.lost.is_none() {
            return Report::nothing(self.window);
        }
        let alone = self.alone.by_part(now);
        let mut lost = Vec::new();
        if let Some(since) = self.lost {
            let first = now.saturating_sub(since) / self.granted.part;
            for (ago, calls) in self.granted.by_part(now) {
                let these = calls.min(awaited);
                awaited -= these;
                let told = alone.iter().find(|(part, _)| *part == ago).map_or(0, |(_, calls)| *calls);
                let calls = (calls - these).saturating_sub(told);
                if calls > 0 && ago <= first + 1 {
                    lost.push((ago, calls));
                }
            }
        }
        Report { window: self.window, ever_alone: self.ever_alone, alone, lost }
    }

    fn heard(&self, now: u64) -> Option<u32> {
        let heard = self.heard.filter(|(at, _)| now.saturating_sub(*at) < nanos(self.window.per));
        heard.map(|(_, used)| used)
    }
}

/// The fewest calls, and the longest wait of those that have none.
fn least(limits: impl Iterator<Item = (u32, Duration)>) -> (u32, Duration) {
    limits.fold((u32::MAX, Duration::ZERO), |(free, wait), (other, until)| (free.min(other), wait.max(until)))
}
