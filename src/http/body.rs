//! Reading a request's body: how much of it and for how long. It must not know what is in it.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, header};
use tokio::time::timeout;

/// Why a body was not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BodyError {
    /// It is larger than allowed; no more than the limit was read.
    TooLarge { limit: usize },
    /// It did not arrive in time.
    TooLate { after: Duration },
    /// The client went away, or its chunks are garbled.
    Broken,
    /// It is compressed.
    Encoded,
}

/// Limits on a body.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) bytes: usize,
    pub(super) time: Duration,
}

/// The whole of `body`.
pub(super) async fn read<B: Buf, E>(
    headers: &HeaderMap,
    body: impl Stream<Item = Result<B, E>>,
    limits: Limits,
) -> Result<Bytes, BodyError> {
    let encoded = headers.get(header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity");
    if encoded {
        return Err(BodyError::Encoded);
    }
    let too_large = BodyError::TooLarge { limit: limits.bytes };
    let announced =
        headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limits.bytes) {
        return Err(too_large);
    }
    let reading = async {
        let mut body = std::pin::pin!(body);
        let mut whole = BytesMut::new();
        while let Some(part) = body.next().await {
            let mut part = part.map_err(|_| BodyError::Broken)?;
            if whole.len() + part.remaining() > limits.bytes {
                return Err(too_large);
            }
            whole.extend_from_slice(&part.copy_to_bytes(part.remaining()));
        }
        Ok(whole.freeze())
    };
    timeout(limits.time, reading).await.unwrap_or(Err(BodyError::TooLate { after: limits.time }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream;
    use http::HeaderValue;

    const LIMITS: Limits = Limits { bytes: 10, time: Duration::from_secs(10) };

    async fn read_parts(parts: &[Result<&'static str, ()>]) -> Result<Bytes, BodyError> {
        let parts = parts.iter().map(|part| part.map(str::as_bytes)).collect::<Vec<_>>();
        read(&HeaderMap::new(), stream::iter(parts), LIMITS).await
    }

    #[tokio::test]
    async fn a_body_is_read_up_to_the_limit() {
        assert_eq!(read_parts(&[Ok("01234"), Ok("56789")]).await, Ok("0123456789".into()));
        assert_eq!(
            read_parts(&[Ok("01234"), Ok("56789"), Ok("x")]).await,
            Err(BodyError::TooLarge { limit: 10 })
        );
        assert_eq!(read_parts(&[Ok("01234"), Err(())]).await, Err(BodyError::Broken));
        assert_eq!(read_parts(&[]).await, Ok(Bytes::new()));
    }

    #[tokio::test]
    async fn a_body_that_announces_too_much_is_not_read_at_all() {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("11"));
        let body = stream::pending::<Result<&[u8], ()>>();
        assert_eq!(read(&headers, body, LIMITS).await, Err(BodyError::TooLarge { limit: 10 }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_is_given_up() {
        let body = stream::pending::<Result<&[u8], ()>>();
        assert_eq!(
            read(&HeaderMap::new(), body, LIMITS).await,
            Err(BodyError::TooLate { after: LIMITS.time })
        );
    }
}
