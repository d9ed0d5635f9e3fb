//! Where spans go. It owns the queue between requests and the collector: nobody waits for it, and what does not
//! fit into it or is not taken is lost.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use opentelemetry::Context;
use opentelemetry_proto::{
    tonic::collector::trace::v1::ExportTraceServiceRequest,
    transform::{
        common::tonic::ResourceAttributesWithSchema, trace::tonic::group_spans_by_resource_and_scope,
    },
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Span, SpanData, SpanProcessor},
};
use prost::Message;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::egress::Collector;

/// Spans that wait, at most: some megabytes.
const WAITING: usize = 4096;
/// Spans that are sent together, at most.
const BATCH: usize = 512;
/// How long spans wait for others.
const GATHER: Duration = Duration::from_secs(1);
/// How long the end of the process waits for its last spans.
const LAST_SPANS: Duration = Duration::from_secs(1);
/// How often at most lost spans are logged.
const COMPLAINT: Duration = Duration::from_secs(60);

/// Where spans are put when they end.
#[derive(Debug)]
pub(super) struct Queue {
    spans: mpsc::Sender<SpanData>,
    lost: Arc<AtomicU64>,
}

/// What sends them.
pub(super) struct Export {
    spans: mpsc::Receiver<SpanData>,
    collector: Collector,
    resource: ResourceAttributesWithSchema,
    /// Spans that were lost since that was last logged.
    lost: Arc<AtomicU64>,
    /// Why the last of them were, if not because the queue was full.
    refused: Option<String>,
    complained: Option<Instant>,
}

/// A queue of spans of `resource`, and what brings them to `collector`.
pub(super) fn queue(collector: Collector, resource: &Resource) -> (Queue, Export) {
    let (sender, spans) = mpsc::channel(WAITING);
    let lost = Arc::<AtomicU64>::default();
    let queue = Queue { spans: sender, lost: Arc::clone(&lost) };
    (queue, Export { spans, collector, resource: resource.into(), lost, refused: None, complained: None })
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.spans.try_send(span).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

impl Export {
    /// Sends what comes until `shutdown` is cancelled, then the rest, for a second.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        let last = async {
            shutdown.cancelled().await;
            sleep(LAST_SPANS).await;
        };
        let sending = async {
            while shutdown.run_until_cancelled(sleep(GATHER)).await.is_some() {
                self.send().await;
            }
            self.send().await;
        };
        tokio::select! {
            () = sending => {}
            () = last => {}
        }
    }

    /// Sends all that wait.
    async fn send(&mut self) {
        loop {
            let batch = std::iter::from_fn(|| self.spans.try_recv().ok()).take(BATCH);
            let batch: Vec<SpanData> = batch.collect();
            let count = batch.len();
            if count == 0 {
                break;
            }
            let resource_spans = group_spans_by_resource_and_scope(batch, &self.resource);
            let request = ExportTraceServiceRequest { resource_spans };
            self.refused = match self.collector.post(request.encode_to_vec()).await {
                Ok(status) if status.is_success() => continue,
                Ok(status) => Some(format!("status {}", status.as_u16())),
                Err(error) => Some(error.to_string()),
            };
            self.lost.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        if self.lost.load(Ordering::Relaxed) > 0 && self.complained.is_none_or(|at| at.elapsed() >= COMPLAINT)
        {
            self.complained = Some(Instant::now());
            let reason = self.refused.take();
            let reason = reason.as_deref().unwrap_or("more spans than the queue holds");
            warn!(spans = self.lost.swap(0, Ordering::Relaxed), reason, "traces are lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{Tracer, TracerProvider};
    use opentelemetry_sdk::trace::SdkTracerProvider;

    use super::*;
    use crate::egress;

    #[tokio::test]
    async fn what_does_not_fit_into_the_queue_is_lost_and_counted() {
        let egress = egress::Config {
            allow_cidrs: Vec::new(),
            proxy: None,
            extra_ca_file: None,
            connect_timeout: Duration::from_secs(1),
        };
        let collector = Collector::new(&"http://127.0.0.1:9".parse().unwrap(), &egress).unwrap();
        let (queue, mut export) = queue(collector, &Resource::builder_empty().build());
        let tracer = SdkTracerProvider::builder().with_span_processor(queue).build().tracer("test");
        for _ in 0..WAITING + 10 {
            drop(tracer.start("a span"));
        }
        assert_eq!(export.lost.load(Ordering::Relaxed), 10);
        assert!(export.spans.try_recv().is_ok());
    }
}
