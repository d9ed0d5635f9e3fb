//! The form of a log line: one JSON object. It owns how fields become JSON; it must not know where lines go.
//!
//! tracing-subscriber has such a form, too. An access line takes it 1.2 µs, a sixteenth of what an answer from
//! memory costs in all; this one writes into the line's buffer directly and takes half of that.

use std::fmt::{self, Debug, Write};

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{
        FmtContext,
        format::{FormatEvent, FormatFields, Writer},
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

use crate::trace;

/// `{"timestamp", "level", "target"}` and the event's own fields beside them.
pub(super) struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        line.write_str("{\"timestamp\":\"")?;
        SystemTime.format_time(&mut line)?;
        let metadata = event.metadata();
        write!(line, "\",\"level\":\"{}\",\"target\":", metadata.level())?;
        quote(&mut line, metadata.target())?;
        let mut fields = Fields { line: &mut line, written: Ok(()) };
        event.record(&mut fields);
        fields.written?;
        if let Some(id) = trace::id() {
            write!(line, ",\"trace_id\":\"{id}\"")?;
        }
        line.write_str("}\n")
    }
}

struct Fields<'a, W> {
    line: &'a mut W,
    written: fmt::Result,
}

impl<W: Write> Fields<'_, W> {
    fn write(&mut self, field: &Field, value: impl FnOnce(&mut W) -> fmt::Result) {
        if self.written.is_ok() {
            // Names of fields are Rust's, or quoted by the author: nothing in them needs an escape.
            self.written = write!(self.line, ",\"{}\":", field.name()).and_then(|()| value(self.line));
        }
    }
}

impl<W: Write> Visit for Fields<'_, W> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.write(field, |line| quote(line, value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write(field, |line| write!(line, "{value}"));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.write(field, |line| write!(line, "{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.write(field, |line| write!(line, "{value}"));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.write(
            field,
            |line| if value.is_finite() { write!(line, "{value}") } else { line.write_str("null") },
        );
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.write(field, |line| {
            line.write_char('"')?;
            write!(Escaped(line), "{value:?}")?;
            line.write_char('"')
        });
    }
}

fn quote(line: &mut impl Write, text: &str) -> fmt::Result {
    line.write_char('"')?;
    Escaped(line).write_str(text)?;
    line.write_char('"')
}

/// What is written to it, as the inside of a JSON string (RFC 8259 §7); other controls than ASCII's, too, are
/// escaped: some terminals obey them.
struct Escaped<'a, W>(&'a mut W);

impl<W: Write> Write for Escaped<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(|c: char| c.is_control() || c == '"' || c == '\\') {
            let (plain, escaped) = rest.split_at(at);
            self.0.write_str(plain)?;
            let mut chars = escaped.chars();
            match chars.next() {
                Some(c @ ('"' | '\\')) => write!(self.0, "\\{c}")?,
                Some(c) => write!(self.0, "\\u{:04x}", u32::from(c))?,
                None => {}
            }
            rest = chars.as_str();
        }
        self.0.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use proptest::prelude::*;
    use serde_json::{Value, json};
    use tracing::{error, info};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(line);
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The lines that `logging` leaves.
    fn logged(logging: impl FnOnce()) -> Vec<Value> {
        let lines = Lines::default();
        let writer = {
            let lines = lines.clone();
            move || lines.clone()
        };
        let layer = tracing_subscriber::fmt::layer().event_format(Json).with_writer(writer);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), logging);
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect()
    }

    #[test]
    fn a_line_has_its_time_level_and_target_and_each_field_by_its_type() {
        let mut lines = logged(|| {
            info!(target: "access", id = "a-1", ms = 0.25, count = 3, less = -3, whole = true, "done");
            error!(odd = f64::NAN, missing = None::<u32>, error = ?Some("x\ny"), "a \"quote\"");
        });
        assert_eq!(lines.len(), 2);
        for line in &mut lines {
            let at = line.as_object_mut().unwrap().remove("timestamp").unwrap();
            assert!(at.as_str().unwrap().parse::<jiff::Timestamp>().is_ok(), "{at}");
        }
        assert_eq!(
            lines,
            [
                json!({
                    "level": "INFO", "target": "access", "message": "done",
                    "id": "a-1", "ms": 0.25, "count": 3, "less": -3, "whole": true
                }),
                json!({
                    "level": "ERROR", "target": module_path!(), "message": "a \"quote\"",
                    "odd": null, "error": "Some(\"x\\ny\")"
                }),
            ]
        );
    }

    proptest! {
        #[test]
        fn no_text_ends_a_line_or_leaves_its_field(text in "\\PC{0,20}|[\\x00-\\x7f\\u{80}-\\u{9f}\\u{2028}\"\\\\]{0,20}") {
            let lines = logged(|| info!(text, shown = %text, "{text}"));
            prop_assert_eq!(lines.len(), 1);
            for name in ["text", "shown", "message"] {
                prop_assert_eq!(lines[0][name].as_str().unwrap(), &text);
            }
        }
    }
}
