//! Who asks: so many questions a second, whether answers come or not, over connections that are kept and now and then
//! replaced, as a load balancer does. It owns connections and what became of each question; it must not know
//! what is right nor what goes wrong.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cyberscan_relay::chance::chance;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::world::{Trouble, World};

/// Questions a second to all relays together: about half of what two debug builds and all that is around them
/// can do on two shared cores.
pub(crate) const RATE: u32 = 100;
/// How long an answer is waited for: longer than any that is on its way can take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Connections kept to each relay, so that a relay has as many before a crowd came as after it.
const KEPT: usize = 16;
/// The share of connections that is not used again.
const REPLACED: f64 = 0.02;
/// Somebody who could not ask for so long does not make up for it: the machine stood still.
const STANDSTILL: Duration = Duration::from_secs(1);

/// A relay, as the load balancer has it.
pub(crate) struct Door {
    address: SocketAddr,
    kept: Mutex<VecDeque<SendRequest<Full<Bytes>>>>,
}

/// What became of a question; times since the start.
pub(crate) struct Asked {
    pub(crate) due: Duration,
    pub(crate) answered: Duration,
    pub(crate) trouble: Option<Box<Trouble>>,
}

/// A steady stream of questions and what became of them.
pub(crate) struct Load {
    pub(crate) started: Instant,
    /// How many times [`RATE`].
    pub(crate) times: AtomicU32,
    pub(crate) asked: Mutex<Vec<Asked>>,
    /// When this process could not go on, and for how long.
    pub(crate) standstills: Mutex<Vec<(Duration, Duration)>>,
    pub(crate) doors: Mutex<Vec<Arc<Door>>>,
    world: Arc<World>,
    turn: AtomicUsize,
    asking: TaskTracker,
}

impl Load {
    pub(crate) fn new(world: Arc<World>) -> Self {
        Self {
            started: Instant::now(),
            times: AtomicU32::new(1),
            asked: Mutex::default(),
            standstills: Mutex::default(),
            doors: Mutex::default(),
            world,
            turn: AtomicUsize::new(0),
            asking: TaskTracker::new(),
        }
    }

    /// Asks until it is told to stop, and waits for the last answers.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut due = Instant::now();
        while stop.run_until_cancelled(sleep_until(due)).await.is_some() {
            let late = due.elapsed();
            if late > STANDSTILL {
                self.standstills.lock().unwrap().push((self.started.elapsed(), late));
                due = Instant::now();
            }
            let load = Arc::clone(&self);
            self.asking.spawn(async move { load.ask(due).await });
            due += Duration::from_secs(1) / (RATE * self.times.load(Ordering::Relaxed));
        }
        self.asking.close();
        self.asking.wait().await;
    }

    async fn ask(&self, due: Instant) {
        let door = {
            let doors = self.doors.lock().unwrap();
            Arc::clone(&doors[self.turn.fetch_add(1, Ordering::Relaxed) % doors.len()])
        };
        let question = self.world.question();
        let answer = timeout(PATIENCE, door.exchange(question.request())).await;
        let trouble = match answer {
            Ok(Ok((status, body))) => self.world.judge(&question, status, &body),
            Ok(Err(error)) => Some(Trouble::None(format!("{error:#}"))),
            Err(_) => Some(Trouble::None(format!("nothing within {PATIENCE:?}"))),
        };
        let (due, answered) = (due - self.started, self.started.elapsed());
        self.asked.lock().unwrap().push(Asked { due, answered, trouble: trouble.map(Box::new) });
    }
}

impl Door {
    pub(crate) fn to(address: SocketAddr) -> Arc<Self> {
        Arc::new(Self { address, kept: Mutex::default() })
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> anyhow::Result<(StatusCode, Bytes)> {
        let mut connection = self.connection().await?;
        let (head, body) = connection.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        let mut kept = self.kept.lock().unwrap();
        if kept.len() < KEPT && chance() >= REPLACED {
            kept.push_back(connection);
        }
        Ok((head.status, body))
    }

    /// The one that was used longest ago, so that none idles for long, or a new one.
    async fn connection(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        loop {
            let kept = self.kept.lock().unwrap().pop_front();
            let Some(mut connection) = kept else { break };
            if connection.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let (connection, driver) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(driver);
        Ok(connection)
    }
}
