//! Spans, and which one is the current one. It owns their names and parentage; it must not know where they go.

use std::{
    borrow::Cow,
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
};

use http::{HeaderMap, Request};
use opentelemetry::{
    Context, ContextGuard, KeyValue, Value,
    trace::{
        SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer,
        TracerProvider,
    },
};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracer, SdkTracerProvider, SpanLimits},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Config, FAILED, Fact, Facts, Stage, export, known};
use crate::{
    chance::chance,
    egress::{self, Collector},
    metrics::Label,
};

/// What records requests, if anything does; a cheap clone.
#[derive(Clone, Debug, Default)]
pub struct Traces(Option<Arc<Recorder>>);

#[derive(Debug)]
struct Recorder {
    tracer: SdkTracer,
    sampling: f64,
}

/// What sends spans to the collector, before it is started.
pub struct Exporting(Option<export::Export>);

impl Exporting {
    /// Sends them until `shutdown` is cancelled.
    pub(crate) fn start(self, tasks: &TaskTracker, shutdown: CancellationToken) {
        if let Some(export) = self.0 {
            tasks.spawn(export.run(shutdown));
        }
    }
}

impl Traces {
    /// Records the share of requests that `config` says; what sends them has to be started.
    ///
    /// # Errors
    /// When the collector's client cannot be set up.
    pub(crate) fn new(config: Option<&Config>, egress: &egress::Config) -> anyhow::Result<(Self, Exporting)> {
        let Some(Config { endpoint, sampling }) = config else { return Ok((Self(None), Exporting(None))) };
        let (name, version) = (env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        let version = KeyValue::new("service.version", version);
        let resource = Resource::builder_empty().with_service_name(name).with_attribute(version).build();
        let (queue, export) = export::queue(Collector::new(&endpoint.0, egress)?, &resource);
        // What is not said here the SDK takes from the environment.
        let provider = SdkTracerProvider::builder()
            .with_sampler(Sampler::AlwaysOn)
            .with_span_limits(SpanLimits::default())
            .with_resource(resource)
            .with_span_processor(queue)
            .build();
        let recorder = Recorder { tracer: provider.tracer(name), sampling: *sampling };
        Ok((Self(Some(Arc::new(recorder))), Exporting(Some(export))))
    }

    /// The span of a request, if chance wants it recorded; `route` finds the template of a path.
    pub(crate) fn request<B>(
        &self,
        request: &Request<B>,
        route: impl Fn(&str) -> Option<&'static str>,
    ) -> Span {
        let Some(recorder) = self.0.as_ref().filter(|recorder| chance() < recorder.sampling) else {
            return Span(None);
        };
        let (method, route) = (known(request.method()), route(request.uri().path()));
        let name = match route {
            Some(route) => format!("{method} {route}").into(),
            None => Cow::Borrowed(method),
        };
        let caller = caller(request.headers());
        let above =
            caller.map_or_else(Context::new, |caller| Context::new().with_remote_span_context(caller));
        let span = Span::start(&recorder.tracer, &above, name, SpanKind::Server);
        span.tell(|facts| {
            facts.method(request.method());
            if let Some(route) = route {
                facts.text("http.route", route);
            }
        });
        span
    }
}

/// Something that is recorded, or not; it ends when it is dropped.
#[derive(Debug)]
pub struct Span(Option<Context>);

impl Span {
    fn start(tracer: &SdkTracer, above: &Context, name: Cow<'static, str>, kind: SpanKind) -> Self {
        let span = tracer.span_builder(name).with_kind(kind).start_with_context(tracer, above);
        // The tracer goes along: whatever is below this span is recorded, too.
        Self(Some(above.with_span(span).with_value(tracer.clone())))
    }

    /// The span of `stage`, below the current one; nothing where there is none.
    fn of(stage: Stage) -> Self {
        let Some(above) = current() else { return Self(None) };
        let Some(tracer) = above.get::<SdkTracer>() else { return Self(None) };
        let (name, kind) = stage.describe();
        Self::start(tracer, &above, name, kind)
    }

    /// `future`, with this span as the current one.
    pub(crate) fn around<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F> {
        under(self.0.clone(), future)
    }

    /// Makes this span the current one for as long as what is returned is kept.
    pub(crate) fn enter(&self) -> Option<ContextGuard> {
        self.0.clone().map(Context::attach)
    }

    /// Has it say what `tell` knows.
    pub(crate) fn tell(&self, tell: impl FnOnce(&mut Facts)) {
        let Some(context) = &self.0 else { return };
        let (span, mut facts) = (context.span(), Facts::default());
        tell(&mut facts);
        for (name, fact) in facts.0 {
            if name == FAILED {
                span.set_status(Status::error(""));
            }
            span.set_attribute(KeyValue::new(name, fact));
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        // Tasks that go on may still hold its context.
        if let Some(context) = &self.0 {
            context.span().end();
        }
    }
}

impl From<Fact> for Value {
    fn from(fact: Fact) -> Self {
        match fact {
            Fact::Text(text) => text.into(),
            Fact::Number(number) => number.into(),
        }
    }
}

impl Stage {
    /// The span's name and kind.
    fn describe(self) -> (Cow<'static, str>, SpanKind) {
        match self {
            Self::Token => ("verify token".into(), SpanKind::Internal),
            Self::Body => ("read body".into(), SpanKind::Internal),
            Self::LookUp(of) => (format!("look up {}", of.as_str()).into(), SpanKind::Internal),
            Self::Turn => ("wait for limiter".into(), SpanKind::Internal),
            Self::CyberScan(call) => (format!("cyberscan {}", call.as_str()).into(), SpanKind::Client),
            Self::KeySet => ("fetch key set".into(), SpanKind::Client),
            Self::Redis(operation) => (format!("redis {}", operation.as_str()).into(), SpanKind::Client),
        }
    }
}

/// `future` as a span below the current one, which says what `tell` knows of the outcome.
pub async fn stage<F: Future>(
    stage: Stage,
    future: F,
    tell: impl FnOnce(&F::Output, &mut Facts),
) -> F::Output {
    let span = Span::of(stage);
    let outcome = span.around(future).await;
    span.tell(|facts| tell(&outcome, facts));
    outcome
}

/// `future`, which is going to be a task of its own, below the span that is the current one now.
pub fn inherit<F: Future>(future: F) -> impl Future<Output = F::Output> {
    under(current(), future)
}

/// The id of the trace that is being recorded.
#[must_use]
pub fn id() -> Option<TraceId> {
    current().map(|context| context.span().span_context().trace_id())
}

fn current() -> Option<Context> {
    Context::map_current(|context| context.has_active_span().then(|| context.clone()))
}

async fn under<F: Future>(context: Option<Context>, future: F) -> F::Output {
    let mut future = pin!(future);
    poll_fn(|task| {
        let _current = context.clone().map(Context::attach);
        future.as_mut().poll(task)
    })
    .await
}

/// The caller's own trace and span (W3C Trace Context, version 00), so that its trace goes on here. Whether it
/// records is not asked: callers are strangers.
fn caller(headers: &HeaderMap) -> Option<SpanContext> {
    let text = headers.get("traceparent")?.to_str().ok()?;
    let hex = |text: &str, digits| {
        text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let parts: Vec<&str> = text.split('-').collect();
    let ["00", trace, span, flags] = parts[..] else { return None };
    if !hex(trace, 32) || !hex(span, 16) || !hex(flags, 2) {
        return None;
    }
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let caller = SpanContext::new(trace, span, TraceFlags::default(), true, TraceState::default());
    caller.is_valid().then_some(caller)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_may_say_which_trace_it_is_but_not_more() {
        let read = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", value.parse().unwrap());
            headers.insert("tracestate", "key=canary".parse().unwrap());
            caller(&headers)
        };
        let good = read("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").unwrap();
        assert_eq!(good.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(good.span_id().to_string(), "00f067aa0ba902b7");
        assert!(!good.is_sampled() && good.trace_state().header().is_empty());
        for odd in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e47-00f067aa0ba902b7aa-01",
        ] {
            assert!(read(odd).is_none(), "{odd}");
        }
    }
}
