//! Request framing, judged before hyper sees it. It owns the question where a request begins and
//! ends, and answers it in one way only; it must not know what a request means, nor any clock.
//!
//! hyper accepts what a proxy in front may read differently: bare line feeds, `Content-Length`
//! beside `Transfer-Encoding`, no or two `Host`s. Where two readers disagree about the end of a
//! request, one request becomes two. So a head is withheld from hyper until it is complete and
//! beyond doubt (RFC 9112 without its leniencies), and the body is followed to the byte at which the
//! next head begins. In the place of a bad head hyper is handed one that it certainly refuses, and
//! then the end of the stream: it answers 400 or 431 itself and closes, and nothing that came after
//! the bad head is ever interpreted. A bad chunk is a read error: the service's body stream fails.
//!
//! HTTP/1.0 has no chunks and needs no `Host`; its framing is a `Content-Length` or nothing. Its request is
//! the last of the connection, whatever it says of keep-alive: bytes after it are never interpreted, so no
//! proxy that reuses the connection can be led to take one answer for another.

use std::{
    io,
    ops::Range,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

/// The longest head, request line and blank line included. hyper's `max_buf_size` must not be less,
/// or it would refuse a head that passed here.
pub(crate) const MAX_HEAD: usize = 32 * 1024;
/// Fields of a head, at most. Nor must hyper's limit be less than this one.
pub(super) const MAX_FIELDS: usize = 64;
/// The longest line that announces a chunk: 16 digits and room for extensions, which nobody uses.
const MAX_CHUNK_LINE: usize = 16 + 256;
/// All trailer lines of one body together.
const MAX_TRAILERS: usize = 8 * 1024;
/// How much is asked of the socket at a time.
const READ_STEP: usize = 8 * 1024;

/// A TLS record begins with it, and no request does.
const TLS_HANDSHAKE: u8 = 0x16;

/// No method begins with NUL: hyper answers 400.
const REFUSED_HEAD: &[u8] = b"\0\r\n\r\n";

/// The stream between socket and hyper. Reads are judged, writes pass untouched.
pub(crate) struct Guard<IO> {
    io: IO,
    /// Bytes from the socket: `..passed` are judged and wait for hyper, the rest is withheld.
    buf: BytesMut,
    passed: usize,
    /// Where the line being read begins (`passed <= line`), and how far it was searched for its end.
    line: usize,
    searched: usize,
    stage: Stage,
    /// The request under way is the connection's last: it is HTTP/1.0.
    last: bool,
    ended: bool,
    progress: Arc<Progress>,
}

/// How far the stream of requests has come; shared with whoever watches the connection's clocks.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Twice the number of complete heads, and one more while a head is partly there.
    heads: AtomicU64,
    refusal: OnceLock<Refusal>,
}

/// What the next withheld byte belongs to.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Head(Head),
    Sized(u64),
    ChunkLine,
    Chunk(u64),
    ChunkEnd,
    Trailers(usize),
    /// The connection's last request is complete: what follows is not even looked at.
    Over,
    /// A head was refused: its stand-in is in the buffer, and after it the stream is over.
    Refused,
    /// A chunk was refused: every further read fails.
    Broken,
}

/// What the lines of a head have said so far.
#[derive(Clone, Copy, Debug, Default)]
struct Head {
    blank_line: bool,
    version: Option<Version>,
    fields: usize,
    host: bool,
    length: Option<u64>,
    chunked: bool,
}

/// How a request's body is framed.
enum Body {
    None,
    Sized(u64),
    Chunked,
}

/// The versions whose framing is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    Http10,
    Http11,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is not HTTP, or could be read in two ways.
    Malformed,
    /// A head, a chunk's line or trailers beyond their limit.
    TooLarge,
    /// HTTP, but neither 1.0 nor 1.1.
    Version,
    /// TLS, where plain HTTP is spoken.
    Tls,
}

impl Progress {
    /// The ordinal of the head of which some bytes, but not all, have come; `None` between
    /// requests and inside a body.
    pub(crate) fn partial_head(&self) -> Option<u64> {
        let state = self.heads.load(Ordering::Relaxed);
        (state & 1 == 1).then_some(state >> 1)
    }

    /// Why the connection's last head was refused here, if it was.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.refusal.get().copied()
    }

    fn partial(&self, inside: bool) {
        let state = self.heads.load(Ordering::Relaxed) & !1;
        self.heads.store(state | u64::from(inside), Ordering::Relaxed);
    }

    fn head_complete(&self) {
        self.heads.fetch_add(2, Ordering::Relaxed);
    }
}

impl<IO> Guard<IO> {
    pub(crate) fn new(io: IO) -> Self {
        Self {
            io,
            buf: BytesMut::new(),
            passed: 0,
            line: 0,
            searched: 0,
            stage: Stage::Head(Head::default()),
            last: false,
            ended: false,
            progress: Arc::default(),
        }
    }

    pub(crate) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Passes on as much of the withheld bytes as can be judged.
    fn judge(&mut self) {
        while let Some(judged) = self.step().transpose() {
            match judged {
                Ok(next) => self.stage = next,
                Err(refusal) => {
                    self.refuse(refusal);
                    break;
                }
            }
        }
        let inside = matches!(self.stage, Stage::Head(_)) && self.passed < self.buf.len();
        self.progress.partial(inside);
    }

    /// The stage after the next complete line or run of data; `None` when more bytes are wanted.
    fn step(&mut self) -> Result<Option<Stage>, Refusal> {
        match self.stage {
            Stage::Head(head) => self.head_line(head),
            Stage::Sized(left) => Ok(self.data(left).map(|left| match left {
                0 => self.next_request(),
                left => Stage::Sized(left),
            })),
            Stage::ChunkLine => {
                // One more while the line is incomplete: the last byte may be its CR.
                let Some(line) = self.next_line()? else {
                    return within(self.withheld(), MAX_CHUNK_LINE + 1).map(|()| None);
                };
                let size = chunk_size(self.bytes(line))?;
                self.pass(self.line);
                Ok(Some(match size {
                    0 => Stage::Trailers(0),
                    size => Stage::Chunk(size),
                }))
            }
            Stage::Chunk(left) => Ok(self.data(left).map(|left| match left {
                0 => Stage::ChunkEnd,
                left => Stage::Chunk(left),
            })),
            Stage::ChunkEnd => match self.bytes(self.passed..self.buf.len()) {
                [b'\r', b'\n', ..] => {
                    self.pass(self.passed + 2);
                    Ok(Some(Stage::ChunkLine))
                }
                [] | [b'\r'] => Ok(None),
                _ => Err(Refusal::Malformed),
            },
            Stage::Trailers(before) => {
                let Some(line) = self.next_line()? else {
                    return within(before + self.withheld(), MAX_TRAILERS + 1).map(|()| None);
                };
                let size = before + self.line - self.passed;
                let last = line.is_empty();
                if !last {
                    within(size, MAX_TRAILERS)?;
                    field(self.bytes(line))?;
                }
                self.pass(self.line);
                Ok(Some(if last { self.next_request() } else { Stage::Trailers(size) }))
            }
            Stage::Over | Stage::Refused | Stage::Broken => Ok(None),
        }
    }

    fn next_request(&self) -> Stage {
        if self.last { Stage::Over } else { Stage::Head(Head::default()) }
    }

    /// Judges one line of a head. Nothing of the head is passed on before all of it is good.
    fn head_line(&mut self, mut head: Head) -> Result<Option<Stage>, Refusal> {
        // A ClientHello need not have a line feed: its peer would be left to the clock.
        if head.version.is_none() && self.buf.get(self.line) == Some(&TLS_HANDSHAKE) {
            return Err(Refusal::Tls);
        }
        let line = self.next_line()?;
        within(self.searched - self.passed, MAX_HEAD)?;
        let Some(line) = line else {
            return Ok(None);
        };
        match (self.bytes(line), head.version) {
            // RFC 9112 §2.2: an empty line before the request line is let pass, but only one.
            ([], None) if !head.blank_line => head.blank_line = true,
            (line, None) => head.version = Some(request_line(line)?),
            ([], Some(version)) => {
                let length = head.body(version)?;
                self.pass(self.line);
                self.progress.head_complete();
                self.last = version == Version::Http10;
                return Ok(Some(match length {
                    Body::None => self.next_request(),
                    Body::Sized(length) => Stage::Sized(length),
                    Body::Chunked => Stage::ChunkLine,
                }));
            }
            (line, Some(_)) => head.field(line)?,
        }
        Ok(Some(Stage::Head(head)))
    }

    /// Passes on up to `left` bytes of a body and says how many are then still to come.
    fn data(&mut self, left: u64) -> Option<u64> {
        let here = usize::try_from(left).map_or(self.withheld(), |left| left.min(self.withheld()));
        if here == 0 {
            return None;
        }
        self.pass(self.passed + here);
        Some(left - here as u64)
    }

    /// The next line without its CRLF, once all of it is here.
    fn next_line(&mut self) -> Result<Option<Range<usize>>, Refusal> {
        let rest = self.bytes(self.searched..self.buf.len());
        let Some(at) = memchr::memchr(b'\n', rest) else {
            self.searched = self.buf.len();
            return Ok(None);
        };
        let start = self.line;
        let after = self.searched + at + 1;
        self.line = after;
        self.searched = after;
        match self.bytes(start..after) {
            [.., b'\r', b'\n'] => Ok(Some(start..after - 2)),
            _ => Err(Refusal::Malformed),
        }
    }

    fn refuse(&mut self, refusal: Refusal) {
        self.buf.truncate(self.passed);
        self.stage = match (self.stage, refusal) {
            (Stage::Head(_), Refusal::Malformed | Refusal::Version | Refusal::Tls) => {
                self.buf.extend_from_slice(REFUSED_HEAD);
                Stage::Refused
            }
            (Stage::Head(_), Refusal::TooLarge) => {
                // A method that never ends: hyper answers 431 when its buffer is full.
                self.buf.resize(self.passed + MAX_HEAD, b'a');
                Stage::Refused
            }
            _ => Stage::Broken,
        };
        if matches!(self.stage, Stage::Refused) {
            self.progress.refusal.get_or_init(|| refusal);
        }
        self.pass(self.buf.len());
    }

    fn pass(&mut self, until: usize) {
        self.passed = until;
        self.line = until;
        self.searched = until;
    }

    fn withheld(&self) -> usize {
        self.buf.len() - self.passed
    }

    fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.buf.get(range).unwrap_or_default()
    }

    fn hand_over(&mut self, out: &mut ReadBuf<'_>) {
        let count = self.passed.min(out.remaining());
        out.put_slice(self.bytes(0..count));
        self.buf.advance(count);
        self.passed -= count;
        self.line -= count;
        self.searched -= count;
    }
}

impl Head {
    fn field(&mut self, line: &[u8]) -> Result<(), Refusal> {
        let (name, value) = field(line)?;
        self.fields += 1;
        within(self.fields, MAX_FIELDS)?;
        let again = if name.eq_ignore_ascii_case(b"host") {
            std::mem::replace(&mut self.host, true)
        } else if name.eq_ignore_ascii_case(b"content-length") {
            let length = number(value, 10).ok_or(Refusal::Malformed)?;
            self.length.replace(length).is_some()
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            // Any coding but chunked, and any list, is refused: RFC 9112 §6.1 allows the server that.
            let known = value.eq_ignore_ascii_case(b"chunked");
            !known || std::mem::replace(&mut self.chunked, true)
        } else {
            false
        };
        require(!again)
    }

    /// How the body is framed, when the head as a whole is good. RFC 9112 §6.1: a transfer coding in
    /// HTTP/1.0 means that somebody on the way did not understand it.
    fn body(self, version: Version) -> Result<Body, Refusal> {
        require(self.host || version == Version::Http10)?;
        match (self.length, self.chunked, version) {
            (Some(_), true, _) | (None, true, Version::Http10) => Err(Refusal::Malformed),
            (None, true, Version::Http11) => Ok(Body::Chunked),
            (None | Some(0), false, _) => Ok(Body::None),
            (Some(length), false, _) => Ok(Body::Sized(length)),
        }
    }
}

/// `method SP target SP version`. The preface of HTTP/2 ends here as well.
fn request_line(line: &[u8]) -> Result<Version, Refusal> {
    let mut parts = line.split(|&byte| byte == b' ');
    let (method, target, version) = (parts.next(), parts.next(), parts.next());
    require(
        method.is_some_and(is_token)
            && target.is_some_and(|it| !it.is_empty() && it.iter().all(u8::is_ascii_graphic))
            && parts.next().is_none(),
    )?;
    match version.and_then(|version| version.strip_prefix(b"HTTP/")) {
        Some(b"1.1") => Ok(Version::Http11),
        Some(b"1.0") => Ok(Version::Http10),
        Some([b'0'..=b'9', b'.', b'0'..=b'9']) => Err(Refusal::Version),
        _ => Err(Refusal::Malformed),
    }
}

/// `name ":" OWS value OWS`. A folded line and a space before the colon fail as names.
fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    let colon = line.iter().position(|&byte| byte == b':');
    let (name, value) = colon.and_then(|at| line.split_at_checked(at)).ok_or(Refusal::Malformed)?;
    let value = value.get(1..).unwrap_or_default();
    // Without a way out in the middle, the loop over a long value is vectorized.
    let control = value.iter().fold(false, |found, &byte| found | is_control(byte));
    require(is_token(name) && !control)?;
    // `trim_ascii` knows more than SP and HTAB, but that was refused as control characters.
    Ok((name, value.trim_ascii()))
}

/// `1*16HEXDIG [";" …]`.
fn chunk_size(line: &[u8]) -> Result<u64, Refusal> {
    within(line.len(), MAX_CHUNK_LINE)?;
    let digits = line.split(|&byte| byte == b';').next().unwrap_or_default();
    require(digits.len() <= 16 && !line.iter().any(|&byte| is_control(byte)))?;
    number(digits, 16).ok_or(Refusal::Malformed)
}

/// Digits only: `from_str_radix` alone would take a sign.
fn number(digits: &[u8], radix: u32) -> Option<u64> {
    let digits = std::str::from_utf8(digits).ok()?;
    let plain = digits.chars().all(|digit| digit.is_digit(radix));
    plain.then(|| u64::from_str_radix(digits, radix).ok())?
}

/// A token of RFC 9110 §5.6.2.
fn is_token(bytes: &[u8]) -> bool {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !bytes.is_empty() && bytes.iter().all(allowed)
}

fn is_control(byte: u8) -> bool {
    byte.is_ascii_control() && byte != b'\t'
}

fn require(good: bool) -> Result<(), Refusal> {
    good.then_some(()).ok_or(Refusal::Malformed)
}

fn within(size: usize, limit: usize) -> Result<(), Refusal> {
    (size <= limit).then_some(()).ok_or(Refusal::TooLarge)
}

impl<IO: AsyncRead + Unpin> AsyncRead for Guard<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.passed > 0 {
                this.hand_over(out);
                return Poll::Ready(Ok(()));
            }
            match this.stage {
                // Not an end: hyper would take it for a peer that left, and drop the answer. One that does not
                // send any more (HTTP/1.0 clients like to say so at once) may well read.
                Stage::Over if this.ended || this.withheld() > 0 => return Poll::Pending,
                Stage::Refused => return Poll::Ready(Ok(())),
                Stage::Broken => return Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
                _ if this.ended => return Poll::Ready(Ok(())),
                _ => {}
            }
            if ready!(this.poll_fill(cx))? == 0 {
                this.ended = true;
            }
            this.judge();
        }
    }
}

impl<IO: AsyncRead + Unpin> Guard<IO> {
    /// Reads once from the socket to the end of the buffer.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.buf.reserve(READ_STEP);
        poll_read_buf(Pin::new(&mut self.io), cx, &mut self.buf)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guard<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    /// Ends the answer, then reads and drops what the peer still sends of a request that was
    /// answered early: closing with unread bytes resets the connection, and the peer may lose the
    /// answer. Whoever owns the clock bounds this wait.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.io).poll_shutdown(cx))?;
        while !this.ended && !matches!(this.stage, Stage::Head(_)) {
            this.buf.clear();
            this.pass(0);
            this.ended = !matches!(ready!(this.poll_fill(cx)), Ok(1..));
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        future::pending,
        sync::{Mutex, PoisonError},
        time::Duration,
    };

    use bytes::Bytes;
    use http_body_util::{BodyExt, Empty};
    use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
    use hyper_util::rt::TokioIo;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        task::yield_now,
        time::timeout,
    };

    use super::{super::server::closing_old, *};

    /// What a conversation came to: `[target+bytes …] status … open|closed`.
    async fn talk(pieces: &[&[u8]]) -> String {
        let (mut client, socket) = duplex(256 * 1024);
        let seen = Mutex::new(Vec::new());
        let service = service_fn(|request: Request<Incoming>| async {
            let (target, version) = (request.uri().to_string(), request.version());
            let (came, status) = match request.into_body().collect().await {
                Ok(body) => (body.to_bytes().len().to_string(), 200),
                Err(_) => ("broken".to_owned(), 422),
            };
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.push(format!("{target}+{came}"));
            let answer = Response::builder().status(status).body(Empty::<Bytes>::new()).unwrap();
            Ok::<_, Infallible>(closing_old(version, answer))
        });
        let connection = http1::Builder::new()
            .header_read_timeout(None)
            .max_buf_size(MAX_HEAD)
            .max_headers(64)
            .serve_connection(TokioIo::new(Guard::new(socket)), service);
        let mut received = Vec::new();
        let conversation = async {
            for piece in pieces {
                if client.write_all(piece).await.is_err() {
                    break;
                }
                yield_now().await;
            }
            let closed = timeout(Duration::from_secs(1), client.read_to_end(&mut received)).await;
            if closed.is_ok() { "closed" } else { "open" }
        };
        let end = tokio::select! {
            end = conversation => end,
            () = async { connection.await.ok(); pending().await } => unreachable!(),
        };
        let received = String::from_utf8(received).unwrap();
        let seen = seen.lock().unwrap().join(" ");
        let statuses: String = received
            .split("HTTP/1.")
            .filter_map(|answer| answer.get(2..6))
            .filter(|status| *status != "100 ")
            .collect();
        if statuses.ends_with("400 ") || statuses.ends_with("431 ") {
            assert!(received.contains("connection: close"), "{received}");
        }
        format!("[{seen}] {statuses}{end}")
    }

    /// Requests that pass. Every one is sent whole, in two pieces, and byte by byte.
    #[rustfmt::skip]
    const GOOD: &[(&[u8], &str)] = &[
        (b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+0] 200 open"),
        (b"GET /a HTTP/1.1\r\nhOST:h\r\n\r\n", "[/a+0] 200 open"),
        (b"GET /a HTTP/1.1\r\nHost:\r\n\r\n", "[/a+0] 200 open"),
        (b"GET /a HTTP/1.1\r\nHost:\t h \t\r\n\r\n", "[/a+0] 200 open"),
        (b"\r\nGET /a HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+0] 200 open"),
        (b"GET http://h/a HTTP/1.1\r\nHost: h\r\n\r\n", "[http://h/a+0] 200 open"),
        (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", "[*+0] 200 open"),
        (b"M-SEARCH /a HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+0] 200 open"),
        (b"GET /a?b=%20#c HTTP/1.1\r\nHost: h\r\n\r\n", "[/a?b=%20+0] 200 open"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: \xc3\xa9\tb: c\r\n\r\n", "[/a+0] 200 open"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX:\r\nX:\r\n\r\n", "[/a+0] 200 open"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", "[/a+0] 200 open"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", "[/a+0] 200 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", "[/a+3] 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 003\r\n\r\nabc", "[/a+3] 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n", "[/a+0] 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n\r\n\r\n", "[/a+4] 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc", "[/a+3] 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "[/a+3] 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: CHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "[/a+3] 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "[/a+0] 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0000000000000003\r\nabc\r\n0000\r\n\r\n", "[/a+3] 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x=\"y\"\r\nabc\r\nA\r\n0123456789\r\n0\r\nT: u\r\n\r\n", "[/a+13] 200 open"),
        // HTTP/1.0: no Host needed, and the connection's last request, whatever it says.
        (b"GET /a HTTP/1.0\r\nHost: h\r\n\r\n", "[/a+0] 200 closed"),
        (b"GET /a HTTP/1.0\r\n\r\n", "[/a+0] 200 closed"),
        (b"OPTIONS / HTTP/1.0\r\n\r\n", "[/+0] 200 closed"),
        (b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\nKeep-Alive: 5\r\n\r\n", "[/a+0] 200 closed"),
        (b"POST /a HTTP/1.0\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", "[/a+3] 200 closed"),
        (b"POST /a HTTP/1.0\r\nContent-Length: 0\r\n\r\n", "[/a+0] 200 closed"),
        (b"POST /a HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc", "[/a+3] 200 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\n\r\nGET /b HTTP/1.0\r\n\r\n", "[/a+0 /b+0] 200 200 closed"),
        // What follows it is nothing: neither a request, nor the body of one that announces none.
        (b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+0] 200 closed"),
        (b"POST /a HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nbGET /x HTTP/1.0\r\n\r\n", "[/a+1] 200 closed"),
        (b"POST /a HTTP/1.0\r\n\r\nabc", "[/a+0] 200 closed"),
        (b"GET /a HTTP/1.0\r\n\r\n\0\0", "[/a+0] 200 closed"),
        (b"POST /a HTTP/1.0\r\nContent-Length: 3\r\n\r\nab", "[] open"),
        (b"GET /a HTTP/1.0\r\n", "[] open"),
        // Pipelined.
        (b"GET /a HTTP/1.1\r\nHost: h\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+0 /b+0] 200 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcGET /b HTTP/1.1\r\nHost: h\r\n\r\nGET /c HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+3 /b+0 /c+0] 200 200 200 open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nT: u\r\n\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+1 /b+0] 200 200 open"),
        // A request in a body stays a body.
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 28\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+28] 200 open"),
        // Not complete: waits.
        (b"GET /a HTTP/1.1\r\nHost: h\r\n", "[] open"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\n\r", "[] open"),
        (b"\r\n", "[] open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nab", "[] open"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", "[] open"),
    ];

    /// Requests that are refused, and what came before them served.
    #[rustfmt::skip]
    const BAD: &[(&[u8], &str)] = &[
        // Lines.
        (b"GET /a HTTP/1.1\nHost: h\n\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\n\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: a\rb\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\rHost: h\r\n\r\n", "[] 400 closed"),
        (b"\r\n\r\nGET /a HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"\nGET /a HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        // Request line.
        (b"GET /a\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.0\n\n", "[] 400 closed"),
        (b"GET /a HTTP/0.9\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.00\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/01.0\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.2\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/2.0\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a http/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "[] 400 closed"),
        (b"GET  /a HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a  HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1 \r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b" GET /a HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET\t/a\tHTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"G(T /a HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a\x00 HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", "[] 400 closed"),
        // Passes here, hyper refuses the target.
        (b"GET a:b:c HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        // Host.
        (b"GET /a HTTP/1.1\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: y\r\nhost: i\r\n\r\n", "[] 400 closed"),
        // Header lines.
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: a\r\n\tb: c\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\n Host: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost : h\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX\t: y\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\n: y\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX@: y\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX\xa0: y\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: a\x00b\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: a\x7fb\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: \x0b\r\n\r\n", "[] 400 closed"),
        // Content-Length.
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nContent-Length: 3\r\n\r\nabc", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3, 3\r\n\r\nabc", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: +3\r\n\r\nabc", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: -3\r\n\r\nabc", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 0x3\r\n\r\nabc", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3 0\r\n\r\nabc", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3.0\r\n\r\nabc", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length:\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: \xd9\xa3\r\n\r\nabc", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 18446744073709551616\r\n\r\n", "[] 400 closed"),
        // Passes here, hyper has its own idea of too large.
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 18446744073709551615\r\n\r\n", "[] 431 closed"),
        // Transfer-Encoding.
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked,\r\n\r\n0\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding:\r\n\r\n", "[] 400 closed"),
        // Smuggling: CL.TE, TE.CL, TE.TE and their hidden spellings. /x must never be seen.
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 33\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n1c\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n\r\n0\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-encoding: x\r\nContent-Length: 4\r\n\r\n1c\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n\r\n0\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 33\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 33\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 33\r\nX: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 33\r\nX: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: y\r\n\rGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: y\n\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.1\r\nHost: h\r\n\x00\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"\x00\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        // A bad head after good requests.
        (b"GET /a HTTP/1.1\r\nHost: h\r\n\r\nGET /b HTTP/1.1\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+0] 200 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nab GET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+1] 200 400 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+0] 200 400 closed"),
        // HTTP/1.0 knows no codings, and is no laxer in anything else.
        (b"POST /a HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: identity\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.0\r\nContent-Length: 33\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.0\r\nHost: h\r\nHost: i\r\n\r\n", "[] 400 closed"),
        (b"POST /a HTTP/1.0\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", "[] 400 closed"),
        (b"POST /a HTTP/1.0\r\nContent-Length: +3\r\n\r\nabc", "[] 400 closed"),
        (b"GET /a HTTP/1.0\r\nX: y\r\n z\r\n\r\n", "[] 400 closed"),
        (b"GET /a HTTP/1.0\r\nX : y\r\n\r\n", "[] 400 closed"),
        // Chunks: the body breaks, and with it the connection.
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n 3\r\nabc\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3 ;x\r\nabc\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x\x00\r\nabc\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x\nabc\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n;x\r\nabc\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n00000000000000003\r\nabc\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n0\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX y\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n z\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+broken] 422 closed"),
        (b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n", "[/a+broken] 422 closed"),
    ];

    fn table() -> impl Iterator<Item = &'static (&'static [u8], &'static str)> {
        GOOD.iter().chain(BAD)
    }

    #[tokio::test(start_paused = true)]
    async fn every_request_of_the_table_comes_to_what_it_should() {
        assert!(table().count() >= 120, "{} requests", table().count());
        for (raw, expected) in table() {
            let came = talk(&[raw]).await;
            assert_eq!(&came, expected, "{}", raw.escape_ascii());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn where_the_stream_is_split_changes_nothing() {
        for (raw, expected) in table() {
            for at in 1..raw.len() {
                let (first, second) = raw.split_at(at);
                let came = talk(&[first, second]).await;
                assert_eq!(&came, expected, "{} at {at}", raw.escape_ascii());
            }
            let bytes: Vec<&[u8]> = raw.chunks(1).collect();
            assert_eq!(&talk(&bytes).await, expected, "{}", raw.escape_ascii());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_of_exactly_the_limit_passes_and_one_byte_more_is_431() {
        let head = |size: usize| {
            let start = "GET /a HTTP/1.1\r\nHost: h\r\nX: ";
            format!("{start}{}\r\n\r\n", "x".repeat(size - start.len() - 4)).into_bytes()
        };
        for piece in [1, 1000, MAX_HEAD + 1] {
            let (fits, not) = (head(MAX_HEAD), head(MAX_HEAD + 1));
            let pieces: Vec<&[u8]> = fits.chunks(piece).collect();
            assert_eq!(talk(&pieces).await, "[/a+0] 200 open", "in pieces of {piece}");
            let pieces: Vec<&[u8]> = not.chunks(piece).collect();
            assert_eq!(talk(&pieces).await, "[] 431 closed", "in pieces of {piece}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_too_large_is_431_whatever_it_is_made_of() {
        let fields = |count| format!("GET /a HTTP/1.1\r\nHost: h\r\n{}\r\n", "X: y\r\n".repeat(count));
        for (raw, expected) in [
            (fields(63), "[/a+0] 200 open"),
            (fields(64), "[] 431 closed"),
            (fields(20_000), "[] 431 closed"),
            (format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", "a".repeat(40_000)), "[] 431 closed"),
            ("G".repeat(40_000), "[] 431 closed"),
            ("GET /a HTTP/1.1\r\nHost: ".to_owned() + &"h".repeat(200_000), "[] 431 closed"),
        ] {
            assert_eq!(talk(&[raw.as_bytes()]).await, expected, "{} bytes", raw.len());
        }
        let good = "GET /a HTTP/1.1\r\nHost: h\r\n\r\n".to_owned();
        let both = good + &fields(20_000);
        assert_eq!(talk(&[both.as_bytes()]).await, "[/a+0] 200 431 closed");
    }

    #[tokio::test(start_paused = true)]
    async fn chunk_lines_and_trailers_have_their_limits() {
        let start = "POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
        let chunk = |line: usize| format!("{start}3;{}\r\nabc\r\n0\r\n\r\n", "x".repeat(line - 2));
        let trailer = |size: usize| format!("{start}0\r\nT: {}\r\n\r\n", "x".repeat(size - 5));
        for (raw, expected) in [
            (chunk(MAX_CHUNK_LINE), "[/a+3] 200 open"),
            (chunk(MAX_CHUNK_LINE + 1), "[/a+broken] 422 closed"),
            (trailer(MAX_TRAILERS), "[/a+0] 200 open"),
            (trailer(MAX_TRAILERS + 1), "[/a+broken] 422 closed"),
            (format!("{start}0\r\n{}", "T: u\r\n".repeat(2_000)), "[/a+broken] 422 closed"),
            (format!("{start}{}", "1".repeat(2_000)), "[/a+broken] 422 closed"),
        ] {
            let raw = raw.as_bytes();
            for piece in [1, 7, raw.len()] {
                let pieces: Vec<&[u8]> = raw.chunks(piece).collect();
                assert_eq!(talk(&pieces).await, expected, "{} bytes by {piece}", raw.len());
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_larger_than_every_buffer_passes_and_the_next_request_is_found() {
        let body = "b".repeat(3_000_000);
        let next = "GET /b HTTP/1.1\r\nHost: h\r\n\r\n";
        let sized = format!("POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3000000\r\n\r\n{body}{next}");
        let expected = "[/a+3000000 /b+0] 200 200 open";
        assert_eq!(talk(&[sized.as_bytes()]).await, expected);
        let chunked = format!(
            "POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2DC6C0\r\n{body}\r\n0\r\n\r\n{next}"
        );
        assert_eq!(talk(&[chunked.as_bytes()]).await, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn forty_pipelined_requests_get_forty_answers() {
        let many = "GET /a HTTP/1.1\r\nHost: h\r\n\r\n".repeat(40);
        let came = talk(&[many.as_bytes()]).await;
        assert_eq!((came.matches("/a+0").count(), came.matches("200 ").count()), (40, 40), "{came}");
    }

    #[tokio::test]
    async fn a_partial_head_is_told_apart_from_the_one_before_it() {
        let (mut client, socket) = duplex(1024);
        let mut guard = Guard::new(socket);
        let progress = guard.progress();
        let mut out = vec![0; 1024];
        assert_eq!(progress.partial_head(), None);
        for (sent, partial) in [
            ("GET /a HTTP/1.1\r\nHost: h\r\n\r\nG", Some(1)),
            ("ET /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n", None),
            ("abc", None),
            ("GET /a HTTP/1.1\r\nHost: h\r\n\r\n", None),
            ("GET / HTTP/2.0\r\n", None),
        ] {
            client.write_all(sent.as_bytes()).await.unwrap();
            assert!(guard.read(&mut out).await.unwrap() > 0);
            assert_eq!(progress.partial_head(), partial, "{sent}");
        }
        assert_eq!(guard.read(&mut out).await.unwrap(), 0, "nothing after a refusal");
    }

    #[tokio::test(start_paused = true)]
    async fn why_a_head_was_refused_can_be_told() {
        for (sent, why) in [
            (&b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"[..], None),
            (b"GET /a\r\n\r\n", Some(Refusal::Malformed)),
            (b"GET /a HTTP/1.1\r\n\r\n", Some(Refusal::Malformed)),
            (b"GET /a HTTP/1.9\r\n", Some(Refusal::Version)),
            (b"PRI * HTTP/2.0\r\n", Some(Refusal::Version)),
            // hyper would refuse these as well; the guard must not rely on that.
            (b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", Some(Refusal::Malformed)),
            (b"GET /a HTTP/1.0\r\n\r\nPRI * HTTP/2.0\r\n", None),
            (&[b'a'; MAX_HEAD + 1], Some(Refusal::TooLarge)),
            // The first bytes of a ClientHello; no line has to end for that.
            (b"\x16\x03\x01\x02", Some(Refusal::Tls)),
            (b"\r\n\x16", Some(Refusal::Tls)),
            (b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n\x16\x03\x01", Some(Refusal::Tls)),
            (b"GET /a HTTP/1.1\r\n\x16", None),
        ] {
            let (mut client, socket) = duplex(64 * 1024);
            let mut guard = Guard::new(socket);
            let progress = guard.progress();
            client.write_all(sent).await.unwrap();
            drop(client);
            // After the last request of a connection there is no end to read, so that its answer is not dropped.
            let reading = async { while guard.read(&mut [0; 4096]).await.unwrap() > 0 {} };
            let _ = tokio::time::timeout(std::time::Duration::from_secs(1), reading).await;
            assert_eq!(progress.refusal(), why, "{}", sent.escape_ascii());
        }
    }
}
