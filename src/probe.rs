//! One HTTP call to a listener of our own on this machine, for `healthcheck` and the demo. It is
//! no client for anything else: no TLS, no redirects, no names.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// How long the whole call may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The most bytes of an answer.
const ANSWER: usize = 16 << 20;

/// Sends `request` to `listener` and reads the answer.
///
/// # Errors
/// When there is no complete answer.
pub async fn call(listener: SocketAddr, request: Request<Full<Bytes>>) -> anyhow::Result<Response<Bytes>> {
    let exchange = async {
        let stream = TcpStream::connect(reachable(listener)).await.context("cannot connect")?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let answer = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = Limited::new(body, ANSWER).collect().await.map_err(anyhow::Error::from_boxed)?;
            drop(sender);
            Ok(Response::from_parts(head, body.to_bytes()))
        };
        let (answer, _) = tokio::join!(answer, connection);
        answer
    };
    tokio::time::timeout(TIMEOUT, exchange).await.context("no answer in time")?
}

/// The address by which a listener is reached from this machine.
fn reachable(listener: SocketAddr) -> SocketAddr {
    match listener.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => (Ipv4Addr::LOCALHOST, listener.port()).into(),
        IpAddr::V6(ip) if ip.is_unspecified() => (Ipv6Addr::LOCALHOST, listener.port()).into(),
        _ => listener,
    }
}
