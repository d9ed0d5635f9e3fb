//! What a Redis has done between two moments, as it counts itself.

use std::{
    collections::HashMap,
    ops::{AddAssign, Div, Sub},
    time::Duration,
};

use deadpool_redis::redis::InfoDict;
use tokio::time::Instant;

use crate::redis::RedisServer;

/// What Redis has done, all told or per something.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// Commands, those of scripts among them.
    pub(crate) commands: f64,
    /// Bytes it received.
    pub(crate) received: f64,
    /// Bytes it sent.
    pub(crate) sent: f64,
    /// Microseconds of its main thread, whatever for.
    pub(crate) cpu: f64,
    /// Microseconds within commands alone.
    pub(crate) within: f64,
    /// Events in its stream.
    pub(crate) events: f64,
}

impl Cost {
    fn each(self, other: Self, change: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            commands: change(self.commands, other.commands),
            received: change(self.received, other.received),
            sent: change(self.sent, other.sent),
            cpu: change(self.cpu, other.cpu),
            within: change(self.within, other.within),
            events: change(self.events, other.events),
        }
    }

    /// As a row of a table.
    pub(crate) fn row(&self, what: &str) -> String {
        let Self { commands, received, sent, cpu, within, events } = self;
        format!(
            "| {what} | {commands:.2} | {received:.0} | {sent:.0} | {cpu:.0} | {within:.0} | {events:.3} |"
        )
    }
}

impl Sub for Cost {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self.each(other, |one, other| one - other)
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        *self = self.each(other, |one, other| one + other);
    }
}

impl Div<f64> for Cost {
    type Output = Self;

    fn div(self, number: f64) -> Self {
        self.each(self, |one, _| one / number)
    }
}

impl std::ops::Mul<f64> for Cost {
    type Output = Self;

    fn mul(self, number: f64) -> Self {
        self.each(self, |one, _| one * number)
    }
}

/// A moment, and what Redis had done by then.
pub(crate) struct Moment {
    at: Instant,
    done: Cost,
}

impl Moment {
    pub(crate) async fn of(server: &RedisServer) -> Self {
        let info: InfoDict = server.ask(&["INFO", "everything"]).await;
        let number = |name: &str| info.get::<f64>(name).unwrap();
        let within = server.ask::<String>(&["INFO", "commandstats"]).await;
        // What scripts call is counted besides; its time is theirs.
        let usec = |line: &str| {
            let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(':')?;
            let sent = ["evalsha", "mget", "xread", "xadd", "xrange", "xrevrange", "xtrim", "ping"];
            let usec = rest.split(",usec=").nth(1)?.split(',').next()?;
            sent.contains(&name).then(|| usec.parse::<f64>().ok())?
        };
        let stream: Result<HashMap<String, deadpool_redis::redis::Value>, _> =
            server.try_ask(&["XINFO", "STREAM", "relay:1:events"]).await;
        let added = stream.ok().and_then(|stream| {
            deadpool_redis::redis::from_redis_value::<f64>(stream.get("entries-added")?.clone()).ok()
        });
        let seconds = number("used_cpu_user_main_thread") + number("used_cpu_sys_main_thread");
        let done = Cost {
            commands: number("total_commands_processed"),
            received: number("total_net_input_bytes"),
            sent: number("total_net_output_bytes"),
            cpu: seconds * 1e6,
            within: within.lines().filter_map(usec).sum(),
            events: added.unwrap_or(0.0),
        };
        Self { at: Instant::now(), done }
    }

    /// What has been done since, and how long it took.
    pub(crate) async fn until_now(&self, server: &RedisServer) -> (Cost, Duration) {
        let now = Self::of(server).await;
        (now.done - self.done, now.at - self.at)
    }
}
