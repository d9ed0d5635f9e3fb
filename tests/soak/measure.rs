//! What processes hold: memory, files, tasks, threads, series; and how often CyberScan is called. It owns samples and
//! what can be read off them; it must not know why they change.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cyberscan_relay::{probe, sandbox::Recorded};
use http::{Request, header};
use http_body_util::Full;
use tokio::time::Instant;

/// A relay from its start to its end.
pub(crate) struct Life {
    pub(crate) name: String,
    pub(crate) samples: Mutex<Vec<Sample>>,
    /// It is about to be ended.
    pub(crate) over: AtomicBool,
    pid: u32,
    admin: SocketAddr,
}

/// What a relay holds at one time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Since the start of the soak.
    pub(crate) at: Duration,
    /// In the order of [`HELD`].
    pub(crate) held: [f64; HELD.len()],
    pub(crate) cpu: Duration,
}

/// What is held, and how much more of it a relay may hold at the end.
pub(crate) const HELD: [Held; 5] = [
    // What a leak of 800 bytes in each answer comes to between the beginning and the end of five minutes, and one of 70
    // bytes in an hour. The cache is full when measuring begins; what remains are the allocator's holes, which come and
    // go with crowds.
    Held { name: "resident memory, MiB", more: 8.0 },
    // Connections to CyberScan that idle: as many as there may be calls under way at once, 4 for each tenant
    // that asks much. They stay for a minute after a crowd.
    Held { name: "files", more: 8.0 },
    // One for each of these connections, and a few that end just then.
    Held { name: "tasks", more: 10.0 },
    // Names are looked up on threads that end when they have idled for ten seconds.
    Held { name: "threads", more: 2.0 },
    Held { name: "series", more: 0.0 },
];
pub(crate) const MEMORY: usize = 0;
pub(crate) const SERIES: usize = 4;

pub(crate) struct Held {
    pub(crate) name: &'static str,
    pub(crate) more: f64,
}

impl Life {
    pub(crate) fn new(name: String, pid: u32, admin: SocketAddr) -> Arc<Self> {
        Arc::new(Self { name, samples: Mutex::default(), over: AtomicBool::new(false), pid, admin })
    }

    /// Notes what it holds now, if it tells.
    pub(crate) async fn sample(&self, started: Instant) {
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        let request =
            Request::get("/metrics").header(header::HOST, "localhost").body(Full::default()).unwrap();
        let Ok(answer) = probe::call(self.admin, request).await else { return };
        let Some(memory) = resident(self.pid) else { return };
        let metrics = String::from_utf8_lossy(answer.body());
        let value = |name: &str| {
            let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap().parse::<f64>().unwrap()
        };
        let series = metrics.lines().filter(|line| !line.starts_with('#')).count() as f64;
        let held =
            [memory, value("process_open_fds"), value("relay_tasks"), value("process_threads"), series];
        let sample = Sample { at: started.elapsed(), held, cpu: cpu(&self.pid.to_string()) };
        self.samples.lock().unwrap().push(sample);
    }

    /// The least it held of that in the span before each of these moments: what is under way at a time comes on
    /// top. Moments at which it was not there are left out.
    pub(crate) fn levels(&self, held: usize, moments: &[Duration], span: Duration) -> Vec<(Duration, f64)> {
        let samples = self.samples.lock().unwrap();
        let level = |moment: &Duration| {
            let before =
                samples.iter().filter(|sample| (moment.saturating_sub(span)..*moment).contains(&sample.at));
            Some((*moment, before.map(|sample| sample.held[held]).min_by(f64::total_cmp)?))
        };
        moments.iter().filter_map(level).collect()
    }
}

/// MiB of memory that a process has resident.
fn resident(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}

/// Processor time of a process (or `self`) since its start. Linux counts it for us in hundredths of a second.
pub(crate) fn cpu(pid: &str) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name of the program is in brackets and may contain anything; user and system time are the 12th and 13th
    // after it.
    let after = stat.rsplit_once(") ").map(|(_, after)| after).unwrap_or_default();
    let ticks: u64 = after.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}

/// The middle one; of an even number the upper.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// By how much a level rises in an hour, by least squares.
pub(crate) fn slope(levels: &[(Duration, f64)]) -> f64 {
    let count = levels.len() as f64;
    let hours = |at: Duration| at.as_secs_f64() / 3600.0;
    let mean_at = levels.iter().map(|(at, _)| hours(*at)).sum::<f64>() / count;
    let mean = levels.iter().map(|(_, level)| level).sum::<f64>() / count;
    let both: f64 = levels.iter().map(|(at, level)| (hours(*at) - mean_at) * (level - mean)).sum();
    let squares: f64 = levels.iter().map(|(at, _)| (hours(*at) - mean_at).powi(2)).sum();
    both / squares
}

/// The calls CyberScan got, and the most of them in any span.
pub(crate) struct Calls {
    span: Duration,
    recent: VecDeque<Instant>,
    /// The most, and when the last of them came.
    pub(crate) most: (usize, Option<Instant>),
    /// When there were more than were granted.
    pub(crate) too_many: Vec<(Instant, usize)>,
    granted: usize,
    pub(crate) all: usize,
}

impl Calls {
    /// Of which `granted` may come within `span`.
    pub(crate) fn within(span: Duration, granted: usize) -> Self {
        Self { span, recent: VecDeque::new(), most: (0, None), too_many: Vec::new(), granted, all: 0 }
    }

    pub(crate) fn add(&mut self, calls: &[Recorded]) {
        for call in calls {
            self.recent.push_back(call.when);
            while self.recent.front().is_some_and(|first| call.when - *first >= self.span) {
                self.recent.pop_front();
            }
            if self.recent.len() > self.most.0 {
                self.most = (self.recent.len(), Some(call.when));
            }
            if self.recent.len() > self.granted {
                self.too_many.push((call.when, self.recent.len()));
            }
        }
        self.all += calls.len();
    }
}
