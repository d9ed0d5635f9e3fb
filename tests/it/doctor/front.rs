//! What stands in front of a relay, or between it and the world, and does something wrong: a TLS-terminating reverse
//! proxy and a forward proxy. It must not know what doctor makes of that.

use std::{io, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use cyberscan_relay::probe;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
};

use crate::faults::untrusted::{Authority, acceptor};

/// What a reverse proxy does with a call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    /// It passes the call on.
    Pass,
    /// Without this header.
    Without(&'static str),
    /// With this `Authorization` in place of the caller's.
    Authorized(&'static str),
    /// And calls the answer HTML.
    AsHtml,
    /// And changes the version in the answer.
    OfVersion(&'static str),
    /// It answers itself.
    Answer(u16, &'static str),
    /// It answers calls with a bearer token itself.
    AnswerBearers(u16, &'static str),
    /// It redirects.
    Redirect(&'static str),
    /// It refuses bodies that are longer.
    MostBody(usize),
    /// It refuses heads with a header that is longer.
    MostHeader(usize),
    /// It never answers.
    Silent,
}

/// Serves TLS as `name`; the port. `relay` is where calls are passed on to.
pub(super) async fn reverse(authority: &Authority, name: &str, relay: SocketAddr, way: Way) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = acceptor(name, (2020, 4000), Some(authority));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let service = service_fn(|request| answer(request, relay, way));
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    port
}

fn own(status: u16, body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body.to_owned()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

async fn answer(
    request: Request<Incoming>,
    relay: SocketAddr,
    way: Way,
) -> io::Result<Response<Full<Bytes>>> {
    const PAGE: &str = "<html><body>413</body></html>";
    let (mut head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    match way {
        Way::Answer(status, body) => return Ok(own(status, body)),
        Way::AnswerBearers(status, body) if head.headers.contains_key(header::AUTHORIZATION) => {
            return Ok(own(status, body));
        }
        Way::Redirect(to) => {
            let mut response = own(302, "");
            response.headers_mut().insert(header::LOCATION, HeaderValue::from_static(to));
            return Ok(response);
        }
        Way::MostBody(most) if body.len() > most => return Ok(own(413, PAGE)),
        Way::MostHeader(most) if head.headers.values().any(|value| value.len() > most) => {
            return Ok(own(400, PAGE));
        }
        Way::Silent => std::future::pending().await,
        Way::Without(name) => drop(head.headers.remove(name)),
        Way::Authorized(value) => {
            if let Some(authorization) = head.headers.get_mut(header::AUTHORIZATION) {
                *authorization = HeaderValue::from_static(value);
            }
        }
        _ => {}
    }
    let passed = Request::from_parts(head, Full::from(body));
    let mut answer = probe::call(relay, passed).await.map_err(io::Error::other)?;
    match way {
        Way::AsHtml => {
            answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html"));
        }
        Way::OfVersion(version) => {
            let text = String::from_utf8(answer.body().to_vec()).unwrap();
            *answer.body_mut() = Bytes::from(text.replace(env!("CARGO_PKG_VERSION"), version));
            answer.headers_mut().remove(header::CONTENT_LENGTH);
        }
        _ => {}
    }
    Ok(answer.map(Full::from))
}

/// What a forward proxy does with CONNECT.
#[derive(Clone, Debug)]
pub(super) enum Forward {
    /// It opens the way, for who brings this `Proxy-Authorization`.
    Open(Option<&'static str>),
    /// It answers this status.
    Refuse(u16),
    /// It is no proxy.
    Banner,
    /// It never answers.
    Silent,
}

/// A forward proxy; where it is.
pub(super) async fn forward(how: Forward) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let how = Arc::new(how);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(tunnel(client, Arc::clone(&how)));
        }
    });
    address
}

async fn tunnel(mut client: TcpStream, how: Arc<Forward>) {
    let (mut head, mut part) = (Vec::new(), [0; 1024]);
    while !head.ends_with(b"\r\n\r\n") {
        match client.read(&mut part).await {
            Ok(read @ 1..) => head.extend_from_slice(&part[..read]),
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let refuse = async |mut client: TcpStream, status: u16| {
        let _ =
            client.write_all(format!("HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n").as_bytes()).await;
    };
    match *how {
        Forward::Refuse(status) => refuse(client, status).await,
        Forward::Banner => drop(client.write_all(b"220 mail.example ESMTP\r\n").await),
        Forward::Silent => std::future::pending().await,
        Forward::Open(wanted) => {
            let brought = head.lines().find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case("proxy-authorization").then_some(value)
            });
            if wanted.is_some() && brought != wanted {
                return refuse(client, 407).await;
            }
            let target = head.split(' ').nth(1).unwrap();
            let mut server = TcpStream::connect(target).await.unwrap();
            client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            let _ = copy_bidirectional(&mut client, &mut server).await;
        }
    }
}
