//! The accept loop. It owns connections: who gets in, who has to leave, which clock runs for each,
//! and how all of them end at shutdown. It must not know routes, tenants or what an answer means.
//!
//! Four clocks, at most one of which runs for a connection at any moment: `header_timeout` for a
//! head (and for a fresh connection's first), `idle_timeout` between requests, `WRITE_TIMEOUT` for
//! a peer that does not read, `LINGER` for the last bytes of a request that was answered early.
//! None runs while the service works: the service bounds its own time and that of the body. hyper
//! has one time-out for head and idling together, so it stays off and the clocks are kept here.
//! Behind TLS all of it is the same: a handshake is a part of the time a fresh connection has for its
//! first head, and until then the connection waits like any other.
//!
//! When the house is full, a new connection takes the place of the one that has waited longest for a
//! request. A working connection is never closed for another; one that begins a request in the
//! moment it is asked to leave answers it first, with `connection: close`.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    error::Error as StdError,
    future::{Future, pending, poll_fn},
    io,
    net::SocketAddr,
    num::NonZeroUsize,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use hyper::{
    Request, Response, Version,
    body::{Body, Frame, Incoming, SizeHint},
    header::{CONNECTION, HeaderValue},
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Notify,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_rustls::server::TlsStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use super::{
    framing::{Guard, MAX_FIELDS, MAX_HEAD, Refusal},
    refusals::Refusals,
    tls::{Stream, TlsAcceptor},
};
use crate::metrics::{Handshake, Listener, Metrics, Refused};

/// How long an answer may wait for a peer to take [`WRITE_STEP`] of it.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// A peer that takes a byte at a time makes no progress until it has taken this much.
const WRITE_STEP: usize = 16 * 1024;
/// How long a peer may go on sending after it was answered and the answer was the last.
const LINGER: Duration = Duration::from_secs(5);
/// Connections that may wait to be accepted; the kernel makes less of it where it is told to. With the usual 128 a
/// storm lets others wait a second, until their kernel tries again.
const BACKLOG: u32 = 4096;
/// The first pause after an accept error that the next accept would meet as well.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// The longest pause, and the shortest time between two log lines about it.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Limits of the public listener.
#[derive(Debug, Clone)]
pub struct Config {
    /// Connections at any moment.
    pub max_connections: NonZeroUsize,
    /// From the first byte of a request's head to its last; for a fresh connection, from accept.
    pub header_timeout: Duration,
    /// How long a connection may wait for its next request. Longer than that of the load balancer
    /// in front, or it sends a request into a connection that is being closed.
    pub idle_timeout: Duration,
    /// How long requests in flight may take after shutdown has begun.
    pub shutdown_timeout: Duration,
}

/// What is known of the connection, in every request's extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The address at its other end.
    pub address: SocketAddr,
    /// Whether it is TLS of our own.
    pub tls: bool,
}

/// What a listener is beside its socket.
pub struct Front {
    /// Which one.
    pub listener: Listener,
    /// Takes its connections, where it speaks TLS.
    pub tls: Option<TlsAcceptor>,
    /// Where its connections and refusals are counted.
    pub metrics: Metrics,
}

/// The public listener, without TLS.
impl From<Metrics> for Front {
    fn from(metrics: Metrics) -> Self {
        Self { listener: Listener::Public, tls: None, metrics }
    }
}

/// Listens on `address`, with a queue that a storm of connections does not fill.
///
/// # Errors
/// When the address is taken or not ours.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A relay that is started again must not wait for the connections of the one before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves until `shutdown` is cancelled, then drains: stops accepting, closes connections that wait
/// for a request, and lets those in flight end for at most [`Config::shutdown_timeout`], after which
/// they are aborted. No task is left when it returns.
pub async fn serve<A, S, B>(
    mut listener: A,
    service: S,
    config: Config,
    front: impl Into<Front>,
    shutdown: CancellationToken,
) where
    A: Accept,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let front = front.into();
    let refusals = Refusals::new(front.listener, front.metrics.clone());
    let house = Arc::new(House::new(config.max_connections));
    let tasks = TaskTracker::new();
    let abort = CancellationToken::new();
    // Whoever drops this future drops its connections too.
    let _abort_on_drop = abort.clone().drop_guard();

    let accepting = async {
        let mut pauses = Pauses::default();
        loop {
            let (io, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) if concerns_one_peer(&error) => continue,
                Err(error) => {
                    // Most likely out of file descriptors: the one thing that gives some back.
                    house.evict_longest_waiting();
                    sleep(pauses.next(&error)).await;
                    continue;
                }
            };
            pauses.over();
            let seat = House::admit(&house, shutdown.child_token()).await;
            let connection = Connection {
                peer: Peer { address: peer, tls: front.tls.is_some() },
                seat,
                config: config.clone(),
                refusals: refusals.clone(),
            };
            let connection = connection.attend(io, front.tls.clone(), service.clone());
            let abort = abort.clone();
            let open = Open::new(&front);
            tasks.spawn(async move {
                let _open = open;
                abort.run_until_cancelled(connection).await
            });
        }
    };
    let serving = async {
        tokio::select! {
            never = accepting => never,
            never = refusals.report() => never,
        }
    };
    let _: Option<Infallible> = shutdown.run_until_cancelled(serving).await;

    drop(listener);
    tasks.close();
    if timeout(config.shutdown_timeout, tasks.wait()).await.is_err() {
        warn!(connections = tasks.len(), "requests in flight did not end in time and are aborted");
        abort.cancel();
        tasks.wait().await;
    }
}

/// Counts a client's connection as open until it is dropped; those of operators are not clients'.
struct Open(Metrics);

impl Open {
    fn new(front: &Front) -> Option<Self> {
        (front.listener == Listener::Public).then(|| {
            front.metrics.connections.add((), 1);
            Self(front.metrics.clone())
        })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.connections.add((), -1);
    }
}

/// Where connections come from: a listening socket, or a test.
pub trait Accept {
    /// The stream of one connection.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection and the address at its other end.
    ///
    /// # Errors
    /// As accept(2): about one peer, or about this process.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Io, SocketAddr)>> + Send;
}

impl Accept for TcpListener {
    type Io = TcpStream;

    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, peer) = TcpListener::accept(self).await?;
        // An answer is written whole; waiting for more to send only delays it. The peer may be gone
        // already, which the connection finds out by itself.
        let _ = stream.set_nodelay(true);
        Ok((stream, peer))
    }
}

/// An accept error about the connection that was to be accepted; the next one may well succeed.
/// accept(2) passes on what has already happened to the peer's network.
fn concerns_one_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, Interrupted, NetworkDown,
        NetworkUnreachable,
    };
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | HostUnreachable
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
    )
}

/// Pauses after accept errors: each twice as long as the one before, until an accept succeeds.
#[derive(Default)]
struct Pauses {
    last: Option<Duration>,
    logged: Option<Instant>,
}

impl Pauses {
    fn next(&mut self, error: &io::Error) -> Duration {
        if self.logged.is_none_or(|at| at.elapsed() >= LONGEST_PAUSE) {
            self.logged = Some(Instant::now());
            warn!(%error, "cannot accept connections");
        }
        let pause = self.last.map_or(FIRST_PAUSE, |last| last * 2);
        *self.last.insert(pause.min(LONGEST_PAUSE))
    }

    fn over(&mut self) {
        self.last = None;
    }
}

/// All connections, and the order in which they began to wait for a request.
struct House {
    size: usize,
    rooms: Mutex<Rooms>,
    /// A connection ended, began to wait, or works although it was asked to leave.
    changed: Notify,
}

#[derive(Default)]
struct Rooms {
    open: usize,
    /// Waiting connections by the turn they took when they began to wait: the first waits longest.
    waiting: BTreeMap<u64, CancellationToken>,
    next_turn: u64,
    /// How many were taken from `waiting` to be evicted and have neither ended nor begun a request.
    leaving: usize,
}

impl House {
    fn new(size: NonZeroUsize) -> Self {
        Self { size: size.get(), rooms: Mutex::default(), changed: Notify::new() }
    }

    /// Waits until there is room, making it by eviction if any connection can be evicted.
    async fn admit(house: &Arc<Self>, leave: CancellationToken) -> Arc<Seat> {
        while !house.enter() {
            house.evict_longest_waiting();
            house.changed.notified().await;
        }
        let seat = Seat { house: Arc::clone(house), leave, state: Mutex::new(State::new()) };
        seat.wait(&mut seat.state());
        Arc::new(seat)
    }

    fn enter(&self) -> bool {
        let mut rooms = self.rooms();
        let room = rooms.open < self.size;
        rooms.open += usize::from(room);
        room
    }

    /// Asks the connection that has waited longest to leave, unless one is on its way out.
    fn evict_longest_waiting(&self) {
        let mut rooms = self.rooms();
        if rooms.leaving > 0 {
            return;
        }
        if let Some((_, leave)) = rooms.waiting.pop_first() {
            rooms.leaving += 1;
            drop(rooms);
            leave.cancel();
        }
    }

    fn begin_wait(&self, leave: CancellationToken) -> u64 {
        let mut rooms = self.rooms();
        let turn = rooms.next_turn;
        rooms.next_turn += 1;
        rooms.waiting.insert(turn, leave);
        drop(rooms);
        self.changed.notify_one();
        turn
    }

    /// Says whether the connection had been asked to leave.
    fn end_wait(&self, turn: u64) -> bool {
        let mut rooms = self.rooms();
        let evicted = rooms.waiting.remove(&turn).is_none();
        if evicted {
            // In this very moment. Should it work now, another has to go in its stead.
            rooms.leaving -= 1;
            drop(rooms);
            self.changed.notify_one();
        }
        evicted
    }

    fn exit(&self) {
        self.rooms().open -= 1;
        self.changed.notify_one();
    }

    fn rooms(&self) -> MutexGuard<'_, Rooms> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place in the house, shared by its task, its stream and its answers.
struct Seat {
    house: Arc<House>,
    leave: CancellationToken,
    state: Mutex<State>,
}

struct State {
    doing: Doing,
    /// No request has come yet.
    fresh: bool,
    /// The partial head on the wire, by its ordinal, and when it was first seen.
    head: Option<(u64, Instant)>,
    /// Since when the peer has not taken a [`WRITE_STEP`], and what it has taken of it.
    stalled: Option<(Instant, usize)>,
    /// Since when everything is written and the stream is being closed.
    closing: Option<Instant>,
}

#[derive(Clone, Copy)]
enum Doing {
    /// Waits for a request, and for its turn to be evicted.
    Waiting { since: Instant, turn: u64 },
    /// The service works, or its answer's body is not yet all with hyper.
    Answering,
    /// hyper has all of the answer, the peer has not.
    Flushing,
}

impl State {
    fn new() -> Self {
        Self { doing: Doing::Flushing, fresh: true, head: None, stalled: None, closing: None }
    }
}

impl Seat {
    fn begin_answer(self: &Arc<Self>) -> InFlight {
        let mut state = self.state();
        state.fresh = false;
        if let Doing::Waiting { turn, .. } = std::mem::replace(&mut state.doing, Doing::Answering) {
            self.house.end_wait(turn);
        }
        InFlight(Arc::clone(self))
    }

    /// Ends the connection's waiting with the connection; says whether it was asked to leave.
    fn end_wait(&self) -> bool {
        match std::mem::replace(&mut self.state().doing, Doing::Flushing) {
            Doing::Waiting { turn, .. } => self.house.end_wait(turn),
            Doing::Answering | Doing::Flushing => false,
        }
    }

    fn wait(&self, state: &mut State) {
        state.doing =
            Doing::Waiting { since: Instant::now(), turn: self.house.begin_wait(self.leave.clone()) };
    }

    fn is_waiting(&self) -> bool {
        matches!(self.state().doing, Doing::Waiting { .. })
    }

    /// The peer took `count` bytes of an answer, or none although it should have.
    fn wrote(&self, count: usize) {
        let mut state = self.state();
        state.stalled = match (state.stalled, count) {
            (None, 0) => Some((Instant::now(), 0)),
            (Some((since, taken)), _) if taken + count < WRITE_STEP => Some((since, taken + count)),
            _ => None,
        };
    }

    /// hyper has nothing more to write.
    fn flushed(&self) {
        let mut state = self.state();
        state.stalled = None;
        if matches!(state.doing, Doing::Flushing) {
            self.wait(&mut state);
        }
    }

    fn closing(&self) {
        self.state().closing.get_or_insert_with(Instant::now);
    }

    /// When the connection has to end unless something happens before, and what is refused by that, if
    /// anything is; `None` for never.
    fn deadline(&self, partial_head: Option<u64>, config: &Config) -> Option<(Instant, Option<Refused>)> {
        let mut state = self.state();
        let (since, limit, refused) = match (state.closing, state.stalled, state.doing) {
            (Some(since), _, _) => (since, LINGER, None),
            (None, Some((since, _)), _) => (since, WRITE_TIMEOUT, None),
            (None, None, Doing::Answering | Doing::Flushing) => return None,
            (None, None, Doing::Waiting { since, .. }) => {
                let seen = state.head.filter(|&(head, _)| Some(head) == partial_head);
                state.head = seen.or(partial_head.map(|head| (head, Instant::now())));
                match (state.head, state.fresh) {
                    (None, true) => (since, config.header_timeout, Some(Refused::NoRequest)),
                    (Some(_), true) => (since, config.header_timeout, Some(Refused::HeaderTimeout)),
                    (Some((_, since)), false) => (since, config.header_timeout, Some(Refused::HeaderTimeout)),
                    (None, false) => (since, config.idle_timeout, None),
                }
            }
        };
        Some((since.checked_add(limit)?, refused))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.end_wait();
        self.house.exit();
    }
}

/// A request in flight: from the call of the service until hyper has dropped the answer's body.
struct InFlight(Arc<Seat>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.state().doing = Doing::Flushing;
    }
}

/// One connection, from accept to its end.
struct Connection {
    peer: Peer,
    seat: Arc<Seat>,
    config: Config,
    refusals: Refusals,
}

impl Connection {
    /// Drives it to its end.
    async fn attend<IO, S, B>(self, io: IO, tls: Option<TlsAcceptor>, service: S)
    where
        IO: AsyncRead + AsyncWrite + Unpin,
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        B: Body + Unpin + 'static,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        // Below TLS: there alone it shows whether the peer takes what is written.
        let io = Watched { io, seat: Arc::clone(&self.seat) };
        let refused = match tls {
            None => self.converse(Stream::Plain(io), service).await,
            Some(acceptor) => match self.shake_hands(&acceptor, io).await {
                Ok(io) => self.converse(Stream::Tls(Box::new(io)), service).await,
                Err(refused) => refused,
            },
        };
        let evicted = self.seat.end_wait().then_some(Refused::ConnectionLimit);
        if let Some(reason) = refused.or(evicted) {
            self.refusals.note(reason, self.peer.address);
        }
    }

    /// The TLS handshake, within the time for a first head.
    async fn shake_hands<IO>(&self, acceptor: &TlsAcceptor, io: IO) -> Result<TlsStream<IO>, Option<Refused>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let end = self.seat.deadline(None, &self.config);
        let end = async {
            match end {
                Some((end, _)) => sleep_until(end).await,
                None => pending().await,
            }
        };
        let shaken = tokio::select! {
            biased;
            shaken = acceptor.accept(io) => shaken,
            () = self.seat.leave.cancelled() => Err(Handshake::Evicted),
            () = end => Err(Handshake::Timeout),
        };
        self.refusals.handshake(shaken.as_ref().err().copied().unwrap_or(Handshake::Ok));
        shaken.map_err(|outcome| match outcome {
            // Whoever leaves was not refused; an eviction is counted where it is told from a drain.
            Handshake::Ok | Handshake::Closed | Handshake::Evicted => None,
            _ => Some(Refused::Handshake),
        })
    }

    /// Requests and answers; says what was refused in the end, if anything was.
    async fn converse<IO, S, B>(&self, io: IO, service: S) -> Option<Refused>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        B: Body + Unpin + 'static,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        let Self { peer, seat, config, .. } = self;
        let (peer, called, refusals) = (*peer, Arc::clone(seat), self.refusals.clone());
        let guard = Guard::new(io);
        let progress = guard.progress();
        let answering = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer);
            if !request.uri().path().starts_with('/') {
                refusals.note(Refused::NoPath, peer.address);
            }
            let version = request.version();
            let in_flight = called.begin_answer();
            let answer = service.call(request);
            async move {
                let answer: Result<_, Infallible> = answer.await;
                answer.map(|response| closing_old(version, response.map(|body| Answer { body, in_flight })))
            }
        });
        let mut connection = pin!(
            http1::Builder::new()
                .header_read_timeout(None)
                .max_buf_size(MAX_HEAD)
                .max_headers(MAX_FIELDS)
                .keep_alive(true)
                .half_close(false)
                .pipeline_flush(false)
                .serve_connection(TokioIo::new(guard), answering)
        );
        let mut leave = pin!(seat.leave.cancelled());
        let mut alarm = pin!(sleep_until(Instant::now()));
        let mut leaving = false;

        // All that moves a clock happens while the connection is polled, so looking at the clocks after
        // each poll is enough.
        let ended = poll_fn(|cx| {
            loop {
                if let Poll::Ready(end) = connection.as_mut().poll(cx) {
                    let Err(error) = end else { return Poll::Ready(None) };
                    debug!(%error, "connection closed");
                    // hyper has an opinion of its own on targets.
                    return Poll::Ready(error.is_parse().then_some(Refused::Malformed));
                }
                if !leaving && leave.as_mut().poll(cx).is_ready() {
                    leaving = true;
                    connection.as_mut().graceful_shutdown();
                    continue;
                }
                if leaving && seat.is_waiting() {
                    return Poll::Ready(None);
                }
                let Some((deadline, refused)) = seat.deadline(progress.partial_head(), config) else {
                    return Poll::Pending;
                };
                if alarm.deadline() != deadline {
                    alarm.as_mut().reset(deadline);
                }
                return alarm.as_mut().poll(cx).map(|()| refused);
            }
        })
        .await;
        // However the connection ended: after a refused head, its peer may not have been in a hurry.
        match progress.refusal() {
            Some(Refusal::Malformed) => Some(Refused::Malformed),
            Some(Refusal::TooLarge) => Some(Refused::HeadTooLarge),
            Some(Refusal::Version) => Some(Refused::Version),
            Some(Refusal::Tls) => Some(Refused::TlsToPlain),
            None => ended,
        }
    }
}

/// The answer to an HTTP/1.0 request is the connection's last, also where the request asks for more, which
/// hyper would grant.
pub(super) fn closing_old<B>(version: Version, mut answer: Response<B>) -> Response<B> {
    if version < Version::HTTP_11 {
        *answer.version_mut() = Version::HTTP_10;
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

/// The body of an answer; the request is in flight for as long as it lives.
struct Answer<B> {
    body: B,
    #[expect(dead_code, reason = "held for its drop")]
    in_flight: InFlight,
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The socket, telling the seat how writing goes.
struct Watched<IO> {
    io: IO,
    seat: Arc<Seat>,
}

impl<IO> Watched<IO> {
    fn note(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Pending => self.seat.wrote(0),
            Poll::Ready(Ok(count)) => self.seat.wrote(*count),
            Poll::Ready(Err(_)) => {}
        }
        written
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Watched<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, out)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Watched<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        if flushed.is_ready() {
            self.seat.flushed();
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.seat.closing();
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use bytes::Bytes;
    use http_body_util::{BodyExt, Full};
    use rstest::rstest;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        sync::mpsc,
        task::yield_now,
    };
    use tokio_rustls::client;
    use tokio_util::either::Either;

    use super::{
        super::tls::tests::{Issued, trusting},
        *,
    };
    use crate::clock::Clock;

    const PEER: &str = "203.0.113.7:4711";

    /// Connections and accept errors as a test hands them in.
    struct Door(mpsc::UnboundedReceiver<io::Result<DuplexStream>>);

    impl Accept for Door {
        type Io = DuplexStream;

        async fn accept(&mut self) -> io::Result<(DuplexStream, SocketAddr)> {
            match self.0.recv().await {
                Some(accepted) => accepted.map(|io| (io, PEER.parse().unwrap())),
                None => pending().await,
            }
        }
    }

    /// What connections are made of: everything here holds over both.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Over {
        Plain,
        Tls,
    }

    /// A server on a paused clock, and the clients' side of its door.
    struct Server {
        issued: Option<Issued>,
        metrics: Metrics,
        door: mpsc::UnboundedSender<io::Result<DuplexStream>>,
        shutdown: CancellationToken,
        tasks: TaskTracker,
        started: Instant,
    }

    impl Server {
        fn start(over: Over, max_connections: usize) -> Self {
            let issued = (over == Over::Tls).then(|| Issued::to("relay.test"));
            let metrics = Metrics::new();
            let acceptor =
                |issued: &Issued| TlsAcceptor::new(issued.pair(), Clock::system(), metrics.clone());
            let tls = issued.as_ref().map(acceptor);
            let front = Front { listener: Listener::Public, tls, metrics: metrics.clone() };
            let (door, accepted) = mpsc::unbounded_channel();
            let shutdown = CancellationToken::new();
            let tasks = TaskTracker::new();
            let serving = serve(
                Door(accepted),
                service_fn(move |request| answer(over, request)),
                config(max_connections),
                front,
                shutdown.clone(),
            );
            tasks.spawn(serving);
            tasks.close();
            let started = Instant::now();
            Self { issued, metrics, door, shutdown, tasks, started }
        }

        fn connect(&self) -> Client {
            self.connect_with_buffer(64 * 1024)
        }

        fn connect_with_buffer(&self, size: usize) -> Client {
            let (client, io) = duplex(size);
            self.door.send(Ok(io)).unwrap();
            match &self.issued {
                None => Client::Ready(Either::Left(client)),
                Some(issued) => Client::Silent(issued.pem.clone(), Some(client)),
            }
        }

        fn refused(&self, reason: Refused) -> u64 {
            self.metrics.refused.get((Listener::Public, reason))
        }

        /// All refusals there were, whatever for.
        fn refusals(&self) -> u64 {
            self.metrics.refused.sum()
        }

        /// Whole seconds since the start; fails when the clock stands between two.
        fn seconds(&self) -> u64 {
            let since = self.started.elapsed();
            assert!(since.subsec_millis() < 50, "{since:?} is not a whole number of seconds");
            since.as_secs()
        }
    }

    enum Client {
        /// It has not sent a byte yet, not even of a handshake; and whom it will believe.
        Silent(String, Option<DuplexStream>),
        Ready(Either<DuplexStream, Box<client::TlsStream<DuplexStream>>>),
        /// The server did not wait for its handshake.
        Closed,
    }

    impl Client {
        /// The stream of HTTP, for which TLS has to come about first; `None` if it does not.
        async fn io(&mut self) -> Option<&mut Either<DuplexStream, Box<client::TlsStream<DuplexStream>>>> {
            if let Self::Silent(believed, stream) = self {
                let stream =
                    trusting(believed).connect("relay.test".try_into().unwrap(), stream.take()?).await;
                *self = stream.map_or(Self::Closed, |stream| Self::Ready(Either::Right(Box::new(stream))));
            }
            match self {
                Self::Ready(io) => Some(io),
                Self::Silent(..) | Self::Closed => None,
            }
        }

        /// What the stream of HTTP is sent on.
        fn wire(&mut self) -> &mut DuplexStream {
            match self {
                Self::Silent(_, wire) => wire.as_mut().unwrap(),
                Self::Ready(Either::Left(wire)) => wire,
                Self::Ready(Either::Right(tls)) => tls.get_mut().0,
                Self::Closed => panic!("closed"),
            }
        }

        async fn write(&mut self, raw: &[u8]) -> io::Result<()> {
            let io = self.io().await.ok_or(io::ErrorKind::BrokenPipe)?;
            io.write_all(raw).await?;
            io.flush().await
        }

        async fn send(&mut self, raw: &str) {
            self.write(raw.as_bytes()).await.unwrap();
        }

        async fn get(&mut self, target: &str) -> String {
            self.send(&get(target)).await;
            self.answer().await
        }

        /// One answer with a short body, or what came before the end.
        async fn answer(&mut self) -> String {
            let mut text = String::new();
            let Some(io) = self.io().await else { return text };
            while !text.ends_with("\r\n\r\n.") {
                match io.read_u8().await {
                    Ok(byte) => text.push(char::from(byte)),
                    Err(_) => break,
                }
            }
            text
        }

        /// Everything up to the end of the stream.
        async fn rest(&mut self) -> Vec<u8> {
            let mut all = Vec::new();
            if let Some(io) = self.io().await
                && let Err(error) = io.read_to_end(&mut all).await
            {
                // TLS that ends without a word of farewell.
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            }
            all
        }

        async fn is_open(&mut self) -> bool {
            let io = self.io().await.unwrap();
            timeout(Duration::from_millis(1), io.read_u8()).await.is_err()
        }
    }

    fn get(target: &str) -> String {
        format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n")
    }

    fn config(max_connections: usize) -> Config {
        Config {
            max_connections: NonZeroUsize::new(max_connections).unwrap(),
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            shutdown_timeout: Duration::from_secs(20),
        }
    }

    /// `/SECONDS` answers so much later, `/large` with a megabyte, `/panic` never; `/body` reads the
    /// request's body first, and CONNECT is refused as the routes would.
    async fn answer(over: Over, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let peer = Peer { address: PEER.parse().unwrap(), tls: over == Over::Tls };
        assert_eq!(request.extensions().get(), Some(&peer));
        let mut response = Response::new(Full::from("."));
        match request.uri().path() {
            "/large" => *response.body_mut() = Full::from(vec![b'.'; 1_000_000]),
            "/panic" => panic!("on purpose"),
            "/body" => drop(request.into_body().collect().await),
            _ if request.method() == "CONNECT" => {
                *response.status_mut() = hyper::StatusCode::METHOD_NOT_ALLOWED
            }
            path => {
                let seconds = path.trim_start_matches('/').parse().unwrap_or_default();
                sleep(Duration::from_secs(seconds)).await;
            }
        }
        Ok(response)
    }

    fn is_200(answer: &str) -> bool {
        answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\n.")
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_is_closed_at_the_header_timeout(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        assert_eq!(server.connect().rest().await, b"");
        assert_eq!(server.seconds(), 10);
        assert_eq!((server.refused(Refused::NoRequest), server.refusals()), (1, 1));
        // One that does not even begin a handshake has no other clock.
        let mut silent = server.connect();
        assert_eq!(silent.wire().read(&mut [0]).await.unwrap(), 0);
        assert_eq!(server.seconds(), 20);
        assert_eq!(server.refusals(), 2);
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn half_a_head_is_closed_at_the_header_timeout_however_slowly_it_comes(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        let mut half = server.connect();
        half.send("GET / HTTP/1.1\r\nHo").await;
        assert_eq!(half.rest().await, b"");
        assert_eq!(server.seconds(), 10);

        let mut slow = server.connect();
        for byte in ["G", "E", "T"] {
            sleep(Duration::from_secs(3)).await;
            slow.send(byte).await;
        }
        assert_eq!(slow.rest().await, b"");
        assert_eq!(server.seconds(), 20);
        assert_eq!((server.refused(Refused::HeaderTimeout), server.refusals()), (2, 2));
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_is_closed_at_the_idle_timeout_and_a_working_one_is_not(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        let mut client = server.connect();
        assert!(is_200(&client.get("/200").await));
        assert_eq!(server.seconds(), 200);
        assert_eq!(client.rest().await, b"");
        assert_eq!(server.seconds(), 275);
        assert_eq!(server.refusals(), 0);
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn the_header_timeout_of_a_later_request_runs_from_its_first_byte(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        let mut client = server.connect();
        assert!(is_200(&client.get("/0").await));
        for begun in [70, 150] {
            sleep(Duration::from_secs(begun - server.seconds())).await;
            client.send("GET /0 HT").await;
            sleep(Duration::from_secs(9)).await;
            client.send("TP/1.1\r\nHost: h\r\n\r\n").await;
            assert!(is_200(&client.answer().await), "begun at {begun}");
        }
        // The end of one head and the beginning of the next in one packet: a new clock.
        client.send("GET /0 HT").await;
        sleep(Duration::from_secs(9)).await;
        client.send("TP/1.1\r\nHost: h\r\n\r\nGET /0").await;
        assert!(is_200(&client.answer().await));
        assert_eq!(server.seconds(), 168);
        assert_eq!(client.rest().await, b"");
        assert_eq!(server.seconds(), 178);
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn a_pipelined_half_head_has_its_time_when_its_turn_has_come(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        let mut client = server.connect();
        client.send(&(get("/100") + "GET /")).await;
        assert!(is_200(&client.answer().await));
        assert_eq!(server.seconds(), 100);
        assert_eq!(client.rest().await, b"");
        assert_eq!(server.seconds(), 110);
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn a_new_connection_takes_the_place_of_the_one_that_waited_longest(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 3);
        let (mut first, mut second, mut third) = (server.connect(), server.connect(), server.connect());
        for client in [&mut first, &mut second, &mut third] {
            assert!(is_200(&client.get("/0").await));
        }
        assert!(is_200(&first.get("/0").await));
        second.send("GET /half").await;
        let (mut fourth, mut fifth) = (server.connect(), server.connect());
        assert!(is_200(&fourth.get("/0").await), "the newcomer is served");
        assert_eq!(second.rest().await, b"", "half a head is not a request");
        assert!(is_200(&fifth.get("/0").await));
        assert_eq!(third.rest().await, b"");
        assert!(first.is_open().await);
        assert!(is_200(&first.get("/0").await));
        assert_eq!(server.seconds(), 0);
        assert_eq!((server.refused(Refused::ConnectionLimit), server.refusals()), (2, 2));
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn a_working_connection_is_never_closed_for_a_new_one_which_waits_instead(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 2);
        let (mut first, mut second) = (server.connect(), server.connect());
        first.send(&get("/30")).await;
        second.send(&get("/60")).await;
        yield_now().await;
        let mut third = server.connect();
        assert!(is_200(&third.get("/0").await));
        assert_eq!(server.seconds(), 30, "served when the first one was done");
        assert!(is_200(&first.answer().await), "which has its answer");
        assert_eq!(first.rest().await, b"");
        let mut fourth = server.connect();
        assert!(is_200(&fourth.get("/0").await));
        assert_eq!(third.rest().await, b"");
        assert!(is_200(&second.answer().await));
        assert_eq!(server.seconds(), 60);
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn a_request_that_comes_in_the_moment_of_eviction_is_answered(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        for newcomer_first in [true, false] {
            let server = Server::start(over, 1);
            let mut victim = server.connect();
            assert!(is_200(&victim.get("/0").await));
            let mut newcomer = if newcomer_first {
                let newcomer = server.connect();
                victim.send(&get("/30")).await;
                newcomer
            } else {
                victim.send(&get("/30")).await;
                server.connect()
            };
            newcomer.send(&get("/0")).await;
            assert!(is_200(&victim.answer().await));
            assert!(is_200(&newcomer.answer().await));
            assert_eq!(server.seconds(), 30);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_evicted_connection_that_works_after_all_lets_another_one_go_in_its_stead() {
        let house = Arc::new(House::new(NonZeroUsize::new(2).unwrap()));
        let first = House::admit(&house, CancellationToken::new()).await;
        let second = House::admit(&house, CancellationToken::new()).await;
        house.evict_longest_waiting();
        assert!(first.leave.is_cancelled());
        house.evict_longest_waiting();
        assert!(!second.leave.is_cancelled(), "one at a time");
        let answering = first.begin_answer();
        house.evict_longest_waiting();
        assert!(second.leave.is_cancelled());
        drop((second, answering));
        assert!(!first.is_waiting(), "the answer is not flushed");
        first.flushed();
        assert!(first.is_waiting());
        drop(first);
        let rooms = house.rooms();
        assert_eq!((rooms.open, rooms.waiting.len(), rooms.leaving), (0, 0, 0));
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn a_panic_of_the_service_gives_the_place_back(#[values(Over::Plain, Over::Tls)] over: Over) {
        let server = Server::start(over, 1);
        assert_eq!(server.connect().get("/panic").await, "");
        assert!(is_200(&server.connect().get("/0").await));
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_is_closed_at_the_write_timeout(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        let mut client = server.connect_with_buffer(1024);
        client.send(&get("/large")).await;
        sleep(Duration::from_secs(29)).await;
        assert_eq!(server.tasks.len(), 1);
        sleep(Duration::from_secs(2)).await;
        let mut rest = Vec::new();
        client.wire().read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest.len(), 1024, "what was in the buffer");
        assert_eq!(server.refusals(), 0, "it was answered");
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn a_peer_that_reads_by_the_byte_makes_no_progress_and_one_that_reads_slowly_does(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        let mut drip = server.connect_with_buffer(1024);
        drip.send(&get("/large")).await;
        let mut taken = 0;
        while drip.wire().read_u8().await.is_ok() {
            taken += 1;
            if taken < 40 {
                sleep(Duration::from_secs(1)).await;
            }
        }
        assert!((1024..1100).contains(&taken), "{taken} bytes");

        let mut slow = server.connect_with_buffer(1024);
        slow.send(&get("/large")).await;
        let mut block = vec![0; 20_000];
        for _ in 0..50 {
            slow.wire().read_exact(&mut block).await.unwrap();
            sleep(Duration::from_secs(20)).await;
        }
        assert!(server.started.elapsed() > Duration::from_secs(1000));
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn drain_ends_what_waits_and_lets_what_works_end(#[values(Over::Plain, Over::Tls)] over: Over) {
        let server = Server::start(over, 9);
        let (mut silent, mut idle, mut half, mut working, mut body) =
            (server.connect(), server.connect(), server.connect(), server.connect(), server.connect());
        assert!(is_200(&idle.get("/0").await));
        half.send("GET / HT").await;
        working.send(&get("/15")).await;
        body.send("POST /body HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n").await;
        sleep(Duration::from_secs(5)).await;
        server.shutdown.cancel();
        for waiting in [&mut silent, &mut idle, &mut half] {
            assert_eq!(waiting.rest().await, b"");
        }
        assert_eq!(server.seconds(), 5, "at once");
        let (_, late) = duplex(1);
        assert!(server.door.send(Ok(late)).is_err(), "the listener is gone");
        body.send("ab").await;
        for client in [&mut body, &mut working] {
            let answer = client.answer().await;
            assert!(is_200(&answer) && answer.contains("connection: close\r\n"), "{answer}");
            assert_eq!(client.rest().await, b"");
        }
        server.tasks.wait().await;
        assert_eq!(server.seconds(), 15, "it returns with its last connection");
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn requests_that_outlast_the_shutdown_timeout_are_aborted(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        let mut client = server.connect();
        client.send(&get("/1000")).await;
        sleep(Duration::from_secs(5)).await;
        server.shutdown.cancel();
        server.tasks.wait().await;
        assert_eq!(server.seconds(), 25);
        assert_eq!(client.rest().await, b"");
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn shutdown_is_not_held_up_by_a_connection_that_waits_for_room(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 1);
        let mut working = server.connect();
        working.send(&get("/10")).await;
        yield_now().await;
        let mut outside = server.connect();
        sleep(Duration::from_secs(1)).await;
        server.shutdown.cancel();
        assert_eq!(outside.rest().await, b"");
        assert_eq!(server.seconds(), 1);
        assert!(is_200(&working.answer().await));
        server.tasks.wait().await;
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn an_early_answer_reaches_a_peer_that_is_still_sending(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        let mut client = server.connect_with_buffer(4096);
        client.send("POST /0 HTTP/1.1\r\nHost: h\r\nContent-Length: 9000000\r\n\r\n").await;
        for _ in 0..100 {
            client.send(&"b".repeat(10_000)).await;
        }
        assert!(is_200(&client.answer().await));
        assert_eq!(server.seconds(), 0);
        while client.write(b"b").await.is_ok() {
            sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(server.started.elapsed().as_secs(), LINGER.as_secs(), "but not for ever");
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn a_peer_that_goes_on_sending_after_its_answer_gives_way_at_once(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 1);
        let mut sending = server.connect();
        let head = "POST /0 HTTP/1.1\r\nHost: h\r\nContent-Length: 9000000\r\n\r\n";
        sending.send(head).await;
        assert!(is_200(&sending.answer().await));
        assert!(is_200(&server.connect().get("/0").await));
        assert!(sending.write(b"b").await.is_err());
        assert_eq!(server.seconds(), 0);

        let mut sending = server.connect();
        sending.send(head).await;
        assert!(is_200(&sending.answer().await));
        server.shutdown.cancel();
        server.tasks.wait().await;
        assert_eq!(server.seconds(), 0);
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn a_bad_head_is_answered_400_and_closed(#[values(Over::Plain, Over::Tls)] over: Over) {
        let server = Server::start(over, 9);
        let mut client = server.connect();
        client.send("GET /0 HTTP/1.1\r\n\r\n").await;
        let answer = String::from_utf8(client.rest().await).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\nconnection: close\r\n"), "{answer}");
        assert_eq!(server.seconds(), 0);
        drop(client);
        sleep(Duration::from_millis(1)).await;
        assert_eq!((server.refused(Refused::Malformed), server.refusals()), (1, 1));
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn what_is_refused_before_the_service_is_counted_by_reason(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let many = format!("GET /0 HTTP/1.1\r\nHost: h\r\n{}\r\n", "X: y\r\n".repeat(64));
        let many_and_body = many.replace("Host: h\r\n", "Host: h\r\nContent-Length: 9\r\n");
        let long = "a".repeat(MAX_HEAD + 1);
        for (sent, reason) in [
            ("GET /0\r\n\r\n", Refused::Malformed),
            // hyper's opinion.
            ("GET a:b:c HTTP/1.1\r\nHost: h\r\n\r\n", Refused::Malformed),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Refused::Version),
            ("GET /0 HTTP/1.2\r\nHost: h\r\n\r\n", Refused::Version),
            (many.as_str(), Refused::HeadTooLarge),
            (many_and_body.as_str(), Refused::HeadTooLarge),
            (long.as_str(), Refused::HeadTooLarge),
            ("\x16\x03\x01\x02", Refused::TlsToPlain),
        ] {
            let server = Server::start(over, 9);
            let mut client = server.connect();
            // After a good one, so that it is the request which is refused.
            assert!(is_200(&client.get("/0").await));
            client.send(sent).await;
            client.rest().await;
            // The server lingers, should the client not close.
            sleep(LINGER + Duration::from_millis(1)).await;
            assert_eq!((server.refused(reason), server.refusals()), (1, 1), "{sent:?}");
        }
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn http_1_0_is_answered_and_the_connection_closed(#[values(Over::Plain, Over::Tls)] over: Over) {
        let server = Server::start(over, 9);
        for request in [
            "GET /3 HTTP/1.0\r\n\r\n",
            "GET /3 HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\n\r\n",
            "POST /body HTTP/1.0\r\nContent-Length: 2\r\n\r\nab",
            "GET /3 HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n",
        ] {
            let mut client = server.connect();
            client.send(request).await;
            let answer = String::from_utf8(client.rest().await).unwrap();
            assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
            assert!(answer.contains("connection: close\r\n") && answer.ends_with("\r\n\r\n."), "{answer}");
            assert_eq!(answer.matches("HTTP/1.").count(), 1, "{answer}");
        }
        // A client that has said that it sends no more is still there.
        let mut client = server.connect();
        client.send("GET /3 HTTP/1.0\r\n\r\n").await;
        client.io().await.unwrap().shutdown().await.unwrap();
        assert!(client.rest().await.ends_with(b"\r\n\r\n."));
        assert_eq!(server.seconds(), 12);
        assert_eq!(server.refusals(), 0);
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn connect_and_other_forms_of_target_reach_the_service(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        let mut client = server.connect();
        client.send("CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n").await;
        assert!(client.answer().await.starts_with("HTTP/1.1 405 "));
        assert_eq!((server.refused(Refused::NoPath), server.refusals()), (1, 1));
        client.send("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n").await;
        assert!(is_200(&client.answer().await));
        assert!(is_200(&client.get("http://h/0").await));
    }

    #[rstest]
    #[tokio::test(start_paused = true)]
    async fn accept_errors_end_nothing_and_those_of_this_process_evict_and_pause(
        #[values(Over::Plain, Over::Tls)] over: Over,
    ) {
        let server = Server::start(over, 9);
        let mut idle: VecDeque<_> = [server.connect(), server.connect()].into();
        for client in &mut idle {
            assert!(is_200(&client.get("/0").await));
        }
        server.door.send(Err(io::ErrorKind::ConnectionAborted.into())).unwrap();
        assert!(is_200(&server.connect().get("/0").await));
        assert_eq!(server.started.elapsed(), Duration::ZERO, "no pause");
        let out_of_files = 24;
        server.door.send(Err(io::Error::from_raw_os_error(out_of_files))).unwrap();
        assert_eq!(idle[0].rest().await, b"");
        assert!(idle[1].is_open().await);
        assert!(is_200(&server.connect().get("/0").await));
        assert!(server.started.elapsed() < Duration::from_millis(20));
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_double_up_to_a_second_and_begin_anew_after_an_accept() {
        let mut pauses = Pauses::default();
        let error = io::Error::from_raw_os_error(24);
        let taken: Vec<_> = (0..9).map(|_| pauses.next(&error).as_millis()).collect();
        assert_eq!(taken, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        pauses.over();
        assert_eq!(pauses.next(&error).as_millis(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn every_handshake_is_counted_by_how_it_ended() {
        let server = Server::start(Over::Tls, 1);
        let count = |outcome| server.metrics.tls_handshakes.get((outcome,));
        let sent = async |bytes: &[u8]| {
            let mut client = server.connect();
            let wire = client.wire();
            wire.write_all(bytes).await.unwrap();
            let mut answer = Vec::new();
            let ended = timeout(Duration::from_secs(60), wire.read_to_end(&mut answer)).await;
            ended.expect("the server does not close").unwrap();
            answer
        };
        assert!(is_200(&server.connect().get("/0").await));
        assert_eq!(count(Handshake::Ok), 1);

        for request in [get("/0"), "PRI * HTTP/2.0\r\n\r\n".into(), "x".repeat(100_000)] {
            let wanted = server.refused(Refused::Handshake) + 1;
            let answer = timeout(Duration::from_secs(1), async {
                let mut client = server.connect();
                let (mut read, mut write) = tokio::io::split(client.wire());
                let mut answer = Vec::new();
                let _ = tokio::join!(write.write_all(request.as_bytes()), async {
                    while !answer.ends_with(b"here\n") && read.read_buf(&mut answer).await.unwrap() > 0 {}
                });
                String::from_utf8(answer).unwrap()
            });
            let answer = answer.await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{answer}");
            sleep(Duration::from_millis(1)).await;
            assert_eq!(server.refused(Refused::Handshake), wanted);
        }
        assert_eq!(count(Handshake::PlainHttp), 3);

        // A handshake that is none; one that offers what is not spoken; one that leaves; one that stays silent.
        assert_eq!(sent(&[0]).await, b"");
        sent(b"\x16\x03\x01\x00\x05hello").await;
        assert_eq!(count(Handshake::Failed), 2);
        let alert = sent(super::super::tls::tests::TLS_1_0).await;
        assert!(alert.starts_with(&[21, 3]), "an alert: {alert:?}");
        assert_eq!(count(Handshake::Incompatible), 1);
        drop(server.connect());
        assert!(is_200(&server.connect().get("/0").await));
        assert_eq!(count(Handshake::Closed), 1);
        let refused = server.refused(Refused::Handshake);
        assert_eq!(refused, 6, "all but those that came about and the one that left");
        assert_eq!(server.seconds(), 0);
        assert_eq!(sent(&[0x16, 3]).await, b"");
        assert_eq!((server.seconds(), count(Handshake::Timeout)), (10, 1));

        // One that waits for a peer gives way like any other.
        let mut silent = server.connect();
        silent.wire().write_all(&[0x16, 3]).await.unwrap();
        assert!(is_200(&server.connect().get("/0").await));
        assert_eq!((server.seconds(), count(Handshake::Evicted)), (10, 1));
        assert!(server.refused(Refused::ConnectionLimit) >= 1);
        // A client that does not believe the certificate says so.
        let elsewhere = Issued::to("relay.test");
        let mut strange = Client::Silent(elsewhere.pem.clone(), None);
        if let (Client::Silent(_, to), Client::Silent(_, from)) = (&mut strange, server.connect()) {
            *to = from;
        }
        assert!(strange.io().await.is_none());
        sleep(Duration::from_millis(1)).await;
        assert_eq!(count(Handshake::Rejected), 1);
    }

    /// On real sockets and threads: a full house under churn loses no answer and no place.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_full_house_on_real_sockets_serves_everyone_and_drains() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let server = TaskTracker::new();
        let service = service_fn(|request: Request<Incoming>| async move {
            let Peer { address, .. } = request.extensions().get().copied().unwrap();
            sleep(Duration::from_millis(u64::from(address.port() % 3))).await;
            Ok(Response::new(Full::<Bytes>::from(".")))
        });
        server.spawn(serve(listener, service, config(4), Metrics::new(), shutdown.clone()));
        server.close();

        let clients = TaskTracker::new();
        let answered = Arc::new(Mutex::new(0));
        for _ in 0..40 {
            let answered = Arc::clone(&answered);
            clients.spawn(async move {
                let mut left = 5;
                while left > 0 {
                    let mut stream = TcpStream::connect(address).await.unwrap();
                    // An idle connection may be evicted between two requests, never in one.
                    while left > 0 && stream.write_all(get("/").as_bytes()).await.is_ok() {
                        let mut text = Vec::new();
                        while !text.ends_with(b"\r\n\r\n.") {
                            match stream.read_u8().await {
                                Ok(byte) => text.push(byte),
                                Err(_) => break,
                            }
                        }
                        if text.is_empty() {
                            break;
                        }
                        assert!(text.ends_with(b"\r\n\r\n."), "half an answer");
                        left -= 1;
                        *answered.lock().unwrap() += 1;
                    }
                }
            });
        }
        clients.close();
        timeout(Duration::from_secs(20), clients.wait()).await.unwrap();
        assert_eq!(*answered.lock().unwrap(), 200);
        let mut silent = TcpStream::connect(address).await.unwrap();
        sleep(Duration::from_millis(50)).await;
        shutdown.cancel();
        timeout(Duration::from_secs(2), server.wait()).await.unwrap();
        assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
        assert!(TcpStream::connect(address).await.is_err());
    }
}
