//! Quotas as they are written down: how many calls in how long. It owns the notation; it must not know
//! whose calls they are, nor count them.

use std::{num::NonZeroU32, str::FromStr, time::Duration};

use crate::metrics::QuotaWindow;

/// At most `limit` calls in any span of `per`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    /// How many calls.
    pub limit: NonZeroU32,
    /// In how long.
    pub per: Duration,
}

/// The longest window.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);
/// The most calls of a window; beyond them nothing is limited.
const MOST: u32 = 1_000_000_000;

/// The text is no quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAQuota {
    /// It has no such form.
    #[error("calls, a slash, and in how long: s, m, h, d, w, or a duration such as 90s, 15m or 30d")]
    Form,
    /// No calls, or more than anybody sells.
    #[error("calls are a number from 1 to {MOST}")]
    Calls,
    /// A part of a second, or more than a year.
    #[error("the time is a whole number of seconds, from 1s to 366d")]
    Length,
}

impl FromStr for Window {
    type Err = NotAQuota;

    /// `10/s`, `600/m`, `1000/h`, `5000/d`, `20000/w`, `100000/30d`.
    fn from_str(text: &str) -> Result<Self, NotAQuota> {
        let (limit, per) = text.split_once('/').ok_or(NotAQuota::Form)?;
        let per = length(per.trim()).ok_or(NotAQuota::Form)?;
        if per.subsec_nanos() != 0 || per.is_zero() || per > LONGEST {
            return Err(NotAQuota::Length);
        }
        let limit = limit.trim();
        if limit.is_empty() || !limit.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(if limit.starts_with('-') { NotAQuota::Calls } else { NotAQuota::Form });
        }
        let limit = limit.parse().ok().filter(|limit: &NonZeroU32| limit.get() <= MOST);
        Ok(Self { limit: limit.ok_or(NotAQuota::Calls)?, per })
    }
}

/// A quota of a single tenant: `<name>=<quota>`, the name being that in logs; `<name>=none` for a tenant without any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfTenant {
    /// The tenant's name in logs.
    pub tenant: String,
    /// Its quota.
    pub window: Option<Window>,
}

/// The text is no quota of a tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotOfATenant {
    /// There is no name, or none that a tenant can have.
    #[error("a tenant's name as the access log has it, 32 digits from 0 to f, then = and a quota, or none")]
    Name,
    /// The quota is none.
    #[error(transparent)]
    Quota(#[from] NotAQuota),
}

impl FromStr for OfTenant {
    type Err = NotOfATenant;

    fn from_str(text: &str) -> Result<Self, NotOfATenant> {
        let (tenant, quota) = text.split_once('=').ok_or(NotOfATenant::Name)?;
        let tenant = tenant.trim().to_ascii_lowercase();
        if tenant.len() != 32 || !tenant.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(NotOfATenant::Name);
        }
        let window = match quota.trim() {
            "none" => None,
            quota => Some(quota.parse()?),
        };
        Ok(Self { tenant, window })
    }
}

/// `d`, `30d`: a unit, or a duration, of which a day has 24 hours.
fn length(text: &str) -> Option<Duration> {
    let one;
    let text = if text.starts_with(|c: char| c.is_ascii_alphabetic()) {
        one = format!("1{text}");
        &one
    } else {
        text
    };
    let span: jiff::Span = text.parse().ok()?;
    span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).ok()?.try_into().ok()
}

impl Window {
    /// The name of its length.
    #[must_use]
    pub fn name(&self) -> QuotaWindow {
        match self.per.as_secs() {
            ..=1 => QuotaWindow::Second,
            2..=60 => QuotaWindow::Minute,
            61..=3_600 => QuotaWindow::Hour,
            3_601..=86_400 => QuotaWindow::Day,
            86_401..=604_800 => QuotaWindow::Week,
            _ => QuotaWindow::Month,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(text: &str) -> Window {
        text.parse().unwrap()
    }

    #[test]
    fn windows_have_a_notation() {
        assert_eq!(
            window("10/s"),
            Window { limit: NonZeroU32::new(10).unwrap(), per: Duration::from_secs(1) }
        );
        assert_eq!(window(" 5000 / d ").per, Duration::from_secs(86_400));
        for (text, seconds, name) in [
            ("7/s", 1, QuotaWindow::Second),
            ("7/m", 60, QuotaWindow::Minute),
            ("7/h", 3_600, QuotaWindow::Hour),
            ("7/d", 86_400, QuotaWindow::Day),
            ("7/w", 604_800, QuotaWindow::Week),
            ("100000/30d", 2_592_000, QuotaWindow::Month),
            ("7/15m", 900, QuotaWindow::Hour),
            ("7 / 1 week", 604_800, QuotaWindow::Week),
        ] {
            let window = window(text);
            assert!(window.per == Duration::from_secs(seconds) && window.name() == name, "{text}");
        }
        for (text, why) in [
            ("", NotAQuota::Form),
            ("10", NotAQuota::Form),
            ("10/", NotAQuota::Form),
            ("/s", NotAQuota::Form),
            ("ten/s", NotAQuota::Form),
            ("+10/s", NotAQuota::Form),
            ("10/5", NotAQuota::Form),
            ("10/mo", NotAQuota::Form),
            ("10/fortnight", NotAQuota::Form),
            ("0/s", NotAQuota::Calls),
            ("-1/s", NotAQuota::Calls),
            ("4294967296/s", NotAQuota::Calls),
            ("10/0s", NotAQuota::Length),
            ("10/-1s", NotAQuota::Form),
            ("10/1500ms", NotAQuota::Length),
            ("10/400d", NotAQuota::Length),
        ] {
            assert_eq!(text.parse::<Window>(), Err(why), "{text}");
        }
    }
}
