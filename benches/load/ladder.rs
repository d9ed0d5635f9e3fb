//! The ladder: how long answers take at rates that go up. The load is open: requests come when they are due, however
//! long others take, and an answer's time counts from when its request was due. So whoever falls behind cannot hide it.

use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use tokio::sync::{Mutex, mpsc};

use crate::{
    distinct, fill, load,
    parties::{SEVEN, Server, THREADS, World, cpu},
    repeated, warm_up,
};

/// How long each step takes.
const STEP: Duration = Duration::from_secs(5);
/// Connections; who waits for one waits on the clock.
const CONNECTIONS: usize = 64;
/// How long CyberScan takes for an answer that is not in the cache.
const LATENCY: Duration = Duration::from_millis(20);
/// Calls per second that the limiter grants.
const QUOTA: u64 = 200;

/// What a step came to.
struct Step {
    name: &'static str,
    rate: u64,
    /// Milliseconds from when a request was due to the last byte of its answer, sorted.
    took: Vec<f64>,
    seconds: f64,
    /// Parts of one core: of the relay, of this process, of Redis.
    cpu: [f64; 3],
}

/// Climbs all ladders and gives the table.
pub(crate) fn climb() -> String {
    let world = World::start(Duration::ZERO);
    let mut steps = Vec::new();

    let one_thread = world.relay(false, &[(THREADS, "1")]);
    warm_up(&one_thread, world.token());
    let again = repeated(&[SEVEN]);
    let rates = [1_000, 2_500, 5_000, 10_000, 20_000];
    steps.extend(rates.map(|rate| Step::take(&world, &one_thread, "L1 hit, 1 observable", rate, &again)));
    drop(one_thread);

    let relay = world.relay(false, &[]);
    let many: Vec<String> = (0..50).map(|n| format!("198.18.0.{n}")).collect();
    let many = repeated(&many.iter().map(String::as_str).collect::<Vec<_>>());
    load(&relay, world.token(), |k| (k < 10).then(|| many(k)).flatten());
    let rates = [100, 300, 1_000];
    steps.extend(rates.map(|rate| Step::take(&world, &relay, "L1 hit, 50 observables", rate, &many)));
    drop(relay);

    let filling = world.relay(true, &[]);
    warm_up(&filling, world.token());
    fill(&world, &filling);
    drop(filling);
    for rate in [500, 1_000, 2_000, 4_000] {
        let relay = world.relay(true, &[]);
        warm_up(&relay, world.token());
        let step = Step::take(&world, &relay, "L2 hit, 1 observable", rate, |k| distinct(k, 1));
        assert_eq!(world.redis.count("mget"), step.took.len() as u64, "each was one round trip");
        steps.push(step);
    }

    let world = World::start(LATENCY);
    for rate in [QUOTA / 2, QUOTA * 9 / 10] {
        let quota = format!("{QUOTA}/s");
        let relay = world.relay(true, &[("RELAY_LIMITER_TENANT", &quota)]);
        warm_up(&relay, world.token());
        world.redis.ask("FLUSHALL", "+OK\r\n");
        steps.push(Step::take(&world, &relay, "miss, CyberScan takes 20 ms", rate, |k| distinct(k, 1)));
    }

    let mut table = format!("{} s a step, {CONNECTIONS} connections.\n\n", STEP.as_secs());
    table += "| case | offered per s | answered per s | p50 ms | p99 ms | p99.9 ms | relay's CPU | generator's | Redis's |\n";
    table += "|---|---|---|---|---|---|---|---|---|\n";
    for step in &steps {
        table += &step.row();
    }
    print!("{table}");
    table
}

impl Step {
    fn take(
        world: &World,
        relay: &Server,
        name: &'static str,
        rate: u64,
        body: impl Fn(u64) -> Option<String>,
    ) -> Self {
        world.redis.ask("CONFIG RESETSTAT", "+OK\r\n");
        let used = || [relay.party.cpu(), cpu(std::process::id()), world.redis.party.cpu()];
        let before = used();
        let started = Instant::now();
        let mut took = offer(relay, world.token(), rate, body);
        let seconds = started.elapsed().as_secs_f64();
        let after = used();
        took.sort_by(f64::total_cmp);
        let part = |n: usize| (after[n] - before[n]) / 1e6 / seconds;
        Self { name, rate, took, seconds, cpu: [part(0), part(1), part(2)] }
    }

    fn row(&self) -> String {
        let quantile = |of: f64| self.took[((self.took.len() - 1) as f64 * of) as usize];
        let [relay, generator, redis] = self.cpu.map(|part| part * 100.0);
        format!(
            "| {} | {} | {:.0} | {:.2} | {:.2} | {:.2} | {relay:.0} % | {generator:.0} % | {redis:.0} % |\n",
            self.name,
            self.rate,
            self.took.len() as f64 / self.seconds,
            quantile(0.5),
            quantile(0.99),
            quantile(0.999),
        )
    }
}

/// Sends the bodies that `body` makes of 0, 1, 2 … at `rate`; how many milliseconds each answer took. Every answer has
/// to be a good one.
#[tokio::main(flavor = "current_thread")]
async fn offer(server: &Server, token: &str, rate: u64, body: impl Fn(u64) -> Option<String>) -> Vec<f64> {
    let authorization = header::HeaderValue::try_from(format!("Bearer {token}")).unwrap();
    let (due, waiting) = mpsc::unbounded_channel::<(Instant, String)>();
    let waiting = Mutex::new(waiting);
    let took = RefCell::new(Vec::new());
    let connection = async || {
        let stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let asking = async {
            loop {
                let next = waiting.lock().await.recv().await;
                let Some((due, body)) = next else { break };
                let request = Request::post("/observe/observables")
                    .header(header::HOST, "relay.bench")
                    .header(header::AUTHORIZATION, authorization.clone())
                    .header(header::CONTENT_TYPE, "application/json")
                    .body(Full::new(Bytes::from(body)));
                let answer = sender.send_request(request.unwrap()).await.unwrap();
                assert_eq!(answer.status(), StatusCode::OK);
                let answer = answer.into_body().collect().await.unwrap().to_bytes();
                assert!(
                    answer.starts_with(b"{\"data\":{\"sightings\"") && !answer.ends_with(b"]}"),
                    "{answer:?}"
                );
                took.borrow_mut().push(due.elapsed().as_secs_f64() * 1e3);
            }
            drop(sender);
        };
        tokio::join!(asking, connection).1.unwrap();
    };
    let offering = async {
        let started = Instant::now();
        for k in 0..rate * STEP.as_secs() {
            let at = started + Duration::from_secs_f64(k as f64 / rate as f64);
            // Timers are good to a millisecond: several requests are sent at once, each on its own time.
            tokio::time::sleep_until(at.into()).await;
            due.send((at, body(k).unwrap())).unwrap();
        }
        drop(due);
    };
    tokio::join!(offering, join_all((0..CONNECTIONS).map(|_| connection())));
    took.into_inner()
}
