#!/usr/bin/env python3
"""Writes dashboards/*.json. `--check` only says whether they are current.

It owns what the boards show and how. Boards are written here rather than clicked together, because then a panel is a few
lines to review and every board keeps the same rules; check.py proves the rules on what was written.
"""

import json
import sys

from relay_metrics import ROOT

FOLDER = ROOT / "dashboards"

# Which series: every query carries these two, so that the variables of the board always hold.
OF = 'job=~"$job",instance=~"$instance"'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

# Colours that mean the same on every board.
GREEN, YELLOW, ORANGE, RED, BLUE, PURPLE, GREY = (
    "green",
    "yellow",
    "orange",
    "red",
    "blue",
    "purple",
    "#8e8e8e",
)


def select(name, matchers=""):
    return f"{name}{{{OF}{',' if matchers else ''}{matchers}}}"


def rate(name, matchers=""):
    return f"rate({select(name, matchers)}[$__rate_interval])"


def total(name, matchers="", by=""):
    return f"sum{f' by ({by})' if by else ''} ({rate(name, matchers)})"


def quantile(share, name, matchers="", by=""):
    labels = ", ".join(filter(None, ["le", by]))
    return f"histogram_quantile({share}, {total(name + '_bucket', matchers, labels)})"


def share(part, whole):
    """A share that is absent, not NaN, while there is nothing to have a share of."""
    return f"{part} / ({whole} > 0)"


def target(expr, legend="", **more):
    return {"expr": expr, "legend": legend, **more}


def steps(*pairs):
    return [{"color": colour, "value": value} for value, colour in pairs]


# A share of something that should be small, or large.
PLAIN = steps((None, GREEN))


def colour_of(name, colour):
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
    }


class Board:
    """A board under construction; panels are placed from left to right and from top to bottom."""

    def __init__(self, uid, title, description, tags):
        self.uid, self.title, self.description, self.tags = uid, title, description, tags
        self.panels = []
        self.x = self.y = self.height = 0

    def place(self, width, height):
        if self.x + width > 24:
            self.x, self.y = 0, self.y + self.height
            self.height = 0
        at = {"x": self.x, "y": self.y, "w": width, "h": height}
        self.x += width
        self.height = max(self.height, height)
        return at

    def row(self, title):
        self.x, self.y, self.height = 0, self.y + self.height, 0
        at = {"x": 0, "y": self.y, "w": 24, "h": 1}
        self.y += 1
        self.panels.append(
            {"id": len(self.panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": at, "panels": []}
        )

    def add(self, kind, title, description, unit, targets, options, defaults, overrides, width, height, **more):
        queries = []
        for index, one in enumerate(targets):
            query = {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "editorMode": "code",
                "expr": one["expr"],
                "legendFormat": one["legend"] or "__auto",
                "range": not one.get("instant", False),
                "instant": one.get("instant", False),
            }
            if one.get("instant"):
                query["format"] = "table"
            queries.append(query)
        self.panels.append(
            {
                "id": len(self.panels) + 1,
                "type": kind,
                "title": title,
                "description": description,
                "datasource": DATASOURCE,
                "gridPos": self.place(width, height),
                "targets": queries,
                "fieldConfig": {"defaults": {"unit": unit, **defaults}, "overrides": overrides},
                "options": options,
                **more,
            }
        )

    def stat(self, title, description, unit, expr, thresholds, *, mappings=(), decimals=None, low=None, high=None,
             none="no traffic", graph="area", width=3):
        defaults = {
            "color": {"mode": "thresholds"},
            "thresholds": {"mode": "absolute", "steps": thresholds},
            "mappings": list(mappings),
            "noValue": none,
        }
        for name, value in (("decimals", decimals), ("min", low), ("max", high)):
            if value is not None:
                defaults[name] = value
        options = {
            "colorMode": "background",
            "graphMode": graph,
            "justifyMode": "center",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "value",
            "wideLayout": True,
            "showPercentChange": False,
            "percentChangeColorMode": "standard",
        }
        self.add("stat", title, description, unit, [target(expr, title)], options, defaults, [], width, 4)

    def series(self, title, description, unit, targets, *, stack=False, thresholds=None, colours=None, low=0, high=None,
               width=8, height=8, lines="dashed", soft_high=None, decimals=None):
        custom = {
            "drawStyle": "line",
            "lineInterpolation": "linear",
            # Stacked, the line of something that never happens would run along the top of the others, in the colour of alarm.
            "lineWidth": 0 if stack else 1,
            "fillOpacity": 60 if stack else 8,
            "gradientMode": "none",
            "showPoints": "never",
            "spanNulls": False,
            "axisPlacement": "auto",
            "axisLabel": "",
            "axisColorMode": "text",
            "stacking": {"group": "A", "mode": "normal" if stack else "none"},
            "scaleDistribution": {"type": "linear"},
            "thresholdsStyle": {"mode": lines if thresholds else "off"},
        }
        if soft_high is None and unit in ("cps", "reqps", "ops"):
            # Nothing at all is a line at the bottom, not one through an axis up to a hundred.
            soft_high = 0.1
        if soft_high is not None:
            custom["axisSoftMax"] = soft_high
        defaults = {
            "color": {"mode": "palette-classic"},
            "custom": custom,
            "thresholds": {"mode": "absolute", "steps": thresholds or PLAIN},
            "mappings": [],
        }
        for name, value in (("min", low), ("max", high), ("decimals", decimals)):
            if value is not None:
                defaults[name] = value
        options = {
            "legend": {
                # Names only: the figures are a hover away, and a table would take half of the panel.
                "displayMode": "list",
                "placement": "bottom",
                "showLegend": True,
                "calcs": [],
            },
            "tooltip": {"mode": "multi", "sort": "desc", "hideZeros": False},
        }
        overrides = [colour_of(name, colour) for name, colour in (colours or {}).items()]
        self.add("timeseries", title, description, unit, targets, options, defaults, overrides, width, height)

    def document(self):
        def variable(name, label, query, description):
            return {
                "name": name,
                "label": label,
                "description": description,
                "type": "query",
                "datasource": DATASOURCE,
                "query": {"qryType": 1, "query": query, "refId": f"Variable-{name}"},
                "refresh": 2,
                "sort": 1,
                "multi": True,
                "includeAll": True,
                "allValue": ".+",
                "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
                "options": [],
                "regex": "",
                "hide": 0,
                "skipUrlSync": False,
            }

        def annotation(name, colour, expr, title, text):
            return {
                "name": name,
                "enable": True,
                "hide": False,
                "iconColor": colour,
                "datasource": DATASOURCE,
                "target": {"refId": "Anno", "expr": expr, "interval": "60s"},
                "titleFormat": title,
                "textFormat": text,
                "useValueForTime": False,
            }

        build = "count by (version, revision) (" + select("relay_build_info")
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["cyberscan-relay", *self.tags],
            "schemaVersion": 42,
            "version": 1,
            "editable": False,
            "graphTooltip": 1,
            "fiscalYearStartMonth": 0,
            "weekStart": "",
            "timezone": "browser",
            "time": {"from": "now-6h", "to": "now"},
            "timepicker": {},
            "refresh": "30s",
            "links": [
                {
                    "type": "dashboards",
                    "title": "Relay boards",
                    "tooltip": "The other boards, with the same choice and time",
                    "tags": ["cyberscan-relay"],
                    "asDropdown": False,
                    "icon": "external link",
                    "includeVars": True,
                    "keepTime": True,
                    "targetBlank": False,
                    "url": "",
                }
            ],
            "templating": {
                "list": [
                    {
                        "name": "datasource",
                        "label": "Data source",
                        "description": "The Prometheus that scrapes the relay",
                        "type": "datasource",
                        "query": "prometheus",
                        "refresh": 1,
                        "multi": False,
                        "includeAll": False,
                        "options": [],
                        "regex": "",
                        "hide": 0,
                        "skipUrlSync": False,
                    },
                    variable("job", "Job", "label_values(relay_build_info, job)", "Scrape jobs with a relay"),
                    variable(
                        "instance",
                        "Instance",
                        'label_values(relay_build_info{job=~"$job"}, instance)',
                        "Replicas of the relay",
                    ),
                ]
            },
            "annotations": {
                "list": [
                    annotation(
                        "Deploys",
                        BLUE,
                        # A build that was not there five minutes ago.
                        f"{build}) unless {build} offset 5m)",
                        "Deploy {{version}}",
                        "{{revision}}",
                    ),
                    annotation(
                        "Restarts",
                        GREY,
                        f"time() - {select('process_start_time_seconds')} < 90",
                        "Start of {{instance}}",
                        "",
                    ),
                ]
            },
            "panels": self.panels,
        }


RELAY_ROUTES = 'endpoint=~"observe|refer|health"'
# Faults of the relay, CyberScan or a quota; deploy/prometheus/rules.yml says why these.
FAULTS = 'code=~"service unavailable|request timeout|unexpected response|too many requests|internal error"'
# What CyberScan says when it is in trouble or not there.
TROUBLE = 'outcome=~"throttled|unavailable|unexpected|unreachable|untrusted|timeout"'
HIT = 'outcome=~"fresh|stale|negative"'
LOOKUPS = "relay_cache_lookups_total"
UPSTREAM = "relay_upstream_requests_total"
OPEN = 'state="open"'
OUTCOMES = {"ok": GREEN, "partial": YELLOW, "error": RED}
QUANTILES = {"p50": GREEN, "p95": YELLOW, "p99": RED}


def hit_ratio(tier):
    found = total(LOOKUPS, f'tier="{tier}",{HIT}')
    return share(found, total(LOOKUPS, f'tier="{tier}"'))


# What CyberScan was really asked: not what the limiter or the breaker held back.
ASKED = total("relay_upstream_requests_total", 'call!="token"')

# Of what was asked for, the share that cost no call. Renewals count as calls, so that it cannot look better than the bill.
SAVED = "clamp_min(1 - " + share(ASKED, total(LOOKUPS, 'tier="memory"')) + ", 0)"

# What CyberScan answered, whoever wanted it.
FETCHED = total(LOOKUPS, 'tier="upstream",outcome=~"fresh|negative"')


def quantiles(name, matchers=""):
    return [target(quantile(q, name, matchers), legend) for q, legend in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))]


def overview():
    board = Board(
        "cyberscan-relay-overview",
        "CyberScan Relay / Overview",
        "Is it fine? The top row says so at a glance; below, what callers get, what the cache saves, how CyberScan does.",
        ["overview"],
    )
    board.row("Is it fine?")
    board.stat(
        "Serving",
        "Replicas that are ready, among those Prometheus knows. Below 100 % one is down, or draining.",
        "percentunit",
        f"(sum({select('relay_ready')}) or vector(0)) / count({select('up')})",
        steps((None, RED), (0.5, ORANGE), (1, GREEN)),
        low=0, high=1, decimals=0, graph="none", none="no replica",
    )
    board.stat(
        "Without a fault",
        "Requests that met no fault of the relay, of CyberScan or of a quota. The objective is 99.5 % over 30 days. Refused "
        "tokens and malformed requests are the caller's and do not count against it.",
        "percentunit",
        "clamp_min(1 - " + share(total("relay_errors_total", FAULTS), total("relay_requests_total", RELAY_ROUTES)) + ", 0)",
        steps((None, RED), (0.98, ORANGE), (0.995, GREEN)),
        high=1, decimals=2,
    )
    board.stat(
        "Answer p95",
        "95 of 100 observe and refer requests are answered within this time. The relay gives up at request.deadline (20 s).",
        "s",
        quantile(0.95, "relay_request_duration_seconds", 'endpoint=~"observe|refer"'),
        steps((None, GREEN), (2.5, ORANGE), (10, RED)),
        low=0,
    )
    board.stat(
        "Calls saved",
        "Share of the look-ups asked for that cost no call to CyberScan: answered by memory or Redis, or by a call that was "
        "under way already. Low for some minutes after a start with an empty cache.",
        "percentunit",
        SAVED,
        steps((None, RED), (0.2, ORANGE), (0.5, GREEN)),
        low=0, high=1, decimals=0,
    )
    board.stat(
        "Calls failing",
        "Share of the calls to CyberScan that brought no answer: 429, 5xx, no connection, a certificate that is not accepted, none in "
        "time, or something else than expected. “Not known” and a refused key are answers.",
        "percentunit",
        share(total(UPSTREAM, TROUBLE), total(UPSTREAM)),
        steps((None, GREEN), (0.02, ORANGE), (0.2, RED)),
        low=0, high=1, decimals=1, none="no calls",
    )
    board.stat(
        "Breakers open",
        "CyberScan hosts whose circuit breaker is open on some replica: they failed again and again, and are only probed, at most once "
        "a minute. Known answers go on being served.",
        "none",
        f"max({select('relay_breaker_state', OPEN)})",
        steps((None, GREEN), (1, RED)),
        low=0, none="no data",
    )
    board.stat(
        "Quota used",
        "The fullest quota window: of the fleet, or of the tenant nearest its limit. At 100 % questions wait or are refused. 0 where no "
        "quota is set.",
        "percentunit",
        f"max({select('relay_limiter_used_ratio')})",
        steps((None, GREEN), (0.7, ORANGE), (0.9, RED)),
        low=0, high=1, decimals=0, none="no data",
    )
    board.stat(
        "Redis",
        "Whether Redis answers every replica. Without it each replica goes on with its own memory and its share of the quotas. "
        "Always up where none is configured.",
        "none",
        f"min({select('relay_redis_up')})",
        steps((None, RED), (1, GREEN)),
        mappings=[
            {
                "type": "value",
                "options": {"0": {"text": "Down", "color": RED, "index": 0}, "1": {"text": "Up", "color": GREEN, "index": 1}},
            }
        ],
        graph="none", none="no data",
    )

    board.row("What callers get")
    board.series(
        "Requests by what they came to",
        "Requests to all routes. ok: an answer without an error; partial: an answer with errors beside it; error: errors only.",
        "reqps",
        [target(total("relay_requests_total", by="outcome"), "{{outcome}}")],
        stack=True, colours=OUTCOMES,
    )
    board.series(
        "Errors and warnings by code",
        "Items in the errors of answers, as callers see them. “stale data” and “too-many-messages-warning” are warnings beside a "
        "whole answer; “authorization error” and “invalid argument” are the caller's. A panic is a bug.",
        "cps",
        [
            target(total("relay_errors_total", by="code"), "{{code}}"),
            target(total("relay_panics_total"), "panic"),
        ],
        colours={"panic": RED, "internal error": "dark-red", "stale data": BLUE},
    )
    board.series(
        "Time to answer, observe and refer",
        "Quantiles of the time from a request's head to the whole answer.",
        "s",
        quantiles("relay_request_duration_seconds", 'endpoint=~"observe|refer"'),
        colours=QUANTILES, thresholds=steps((None, "transparent"), (10, RED)),
    )
    board.series(
        "Requests by route",
        "other: version, watchdog, the front page, and whatever is not a route.",
        "reqps",
        [target(total("relay_requests_total", by="endpoint"), "{{endpoint}}")],
        stack=True,
    )
    board.series(
        "Observables asked about",
        "Observables in requests, by route. Many in one request are one request above.",
        "cps",
        [target(total("relay_observables_total", 'endpoint=~"observe|refer"', by="endpoint"), "{{endpoint}}")],
    )
    board.series(
        "Time to answer, p95 by route",
        "Health asks CyberScan when the key's last acceptance is too long ago (auth.revalidate), so it may be the slowest.",
        "s",
        [target(quantile(0.95, "relay_request_duration_seconds", by="endpoint"), "{{endpoint}}")],
    )

    board.row("What the cache saves")
    board.series(
        "Hit ratio by tier",
        "memory: look-ups answered by this process. redis: of those that went on to Redis, renewals included. calls saved: of all asked "
        "for, those that cost no call to CyberScan.",
        "percentunit",
        [
            target(hit_ratio("memory"), "memory"),
            target(hit_ratio("redis"), "redis"),
            target(SAVED, "calls saved"),
        ],
        high=1, colours={"memory": GREEN, "redis": BLUE, "calls saved": PURPLE},
    )
    board.series(
        "Where answers came from",
        "Look-ups by the tier that had the answer. CyberScan's include renewals in the background and answers fetched "
        "ahead. nowhere: CyberScan failed, or a quota or the circuit breaker held the call back; an old answer may have been served.",
        "cps",
        [
            target(total(LOOKUPS, f'tier="memory",{HIT}'), "memory"),
            target(total(LOOKUPS, f'tier="redis",{HIT}'), "redis"),
            target(FETCHED, "CyberScan"),
            target(total(LOOKUPS, 'tier="upstream",outcome="error"'), "nowhere"),
        ],
        stack=True,
        colours={"memory": GREEN, "redis": BLUE, "CyberScan": ORANGE, "nowhere": RED},
    )
    board.series(
        "Asked of the relay, asked of CyberScan",
        "The distance between the lines is what was saved, or held back by a quota. Calls for access tokens are not counted here.",
        "cps",
        [
            target(total(LOOKUPS, 'tier="memory"'), "look-ups asked for"),
            target(ASKED, "calls to CyberScan"),
        ],
        colours={"look-ups asked for": GREEN, "calls to CyberScan": ORANGE},
    )
    board.series(
        "Old answers served",
        "while it is renewed: past its freshness, at once, and renewed in the background; nothing is wrong. with a warning: "
        "CyberScan could not be asked, and the caller was told the age.",
        "cps",
        [
            target(total(LOOKUPS, 'tier=~"memory|redis",outcome="stale"'), "past its freshness"),
            target(total("relay_errors_total", 'code="stale data"'), "answers with a warning"),
        ],
        colours={"past its freshness": BLUE, "answers with a warning": ORANGE},
    )
    board.series(
        "Hit ratio in memory by resource",
        "A resource that is asked for again before cache.fresh is over should be high.",
        "percentunit",
        [
            target(
                total(LOOKUPS, f'tier="memory",{HIT}', by="resource")
                + " / ("
                + total(LOOKUPS, 'tier="memory"', by="resource")
                + " > 0)",
                "{{resource}}",
            )
        ],
        high=1,
    )
    board.series(
        "“Not known to CyberScan”",
        "Share of the answers from each tier that say that nothing is known. A sudden rise in CyberScan's own is a sign that it lost data.",
        "percentunit",
        [
            target(
                total(LOOKUPS, 'outcome="negative"', by="tier") + " / (" + total(LOOKUPS, HIT, by="tier") + " > 0)",
                "{{tier}}",
            )
        ],
        high=1,
    )

    board.row("How CyberScan does")
    board.series(
        "Calls by outcome",
        "Every HTTP request to CyberScan, access tokens and repetitions included. This is what quotas and bills count.",
        "reqps",
        [target(total(UPSTREAM, by="outcome"), "{{outcome}}")],
        stack=True,
        colours={
            "ok": GREEN, "not_found": BLUE, "unauthorized": PURPLE, "throttled": YELLOW, "unavailable": RED,
            "timeout": ORANGE, "unreachable": "dark-red", "untrusted": "dark-purple", "unexpected": "dark-orange",
        },
    )
    board.series(
        "Duration of calls, p95 by call",
        "cyberscan.timeout is 10 s by default; lines near it mean that calls are being given up.",
        "s",
        [target(quantile(0.95, "relay_upstream_request_duration_seconds", by="call"), "{{call}}")],
        thresholds=steps((None, "transparent"), (10, RED)),
    )
    board.series(
        "Calls by kind",
        "retries are repetitions of calls that failed on their way (cyberscan.retries), at most one in ten; they are in the others too.",
        "reqps",
        [
            target(total(UPSTREAM, by="call"), "{{call}}"),
            target(total("relay_upstream_retries_total"), "retries"),
        ],
    )
    board.series(
        "Hosts by circuit breaker",
        "CyberScan hosts that replicas have spoken to, added up over replicas. open: left alone; half_open: the next call is let through, and if nobody "
        "asks it stays so.",
        "none",
        [target(f"sum by (state) ({select('relay_breaker_state')})", "{{state}}")],
        stack=True, colours={"closed": GREEN, "open": RED, "half_open": YELLOW}, decimals=0,
    )
    board.series(
        "Quotas used",
        "Share of each quota's window that is used: of the fleet, and of the tenant nearest its limit. Windows that are not configured stay at 0. "
        "A window is as long as it says and ends now: nothing begins anew at midnight.",
        "percentunit",
        [target(f"max by (scope, window) ({select('relay_limiter_used_ratio')})", "{{scope}}, per {{window}}")],
        soft_high=1, thresholds=steps((None, "transparent"), (0.9, RED)),
    )
    board.series(
        "Calls refused by quotas",
        "Calls that found no room in time. Those somebody waits for become “too many requests”; prefetching just leaves it. With limiter.dry_run "
        "none is refused: shown is what would have been.",
        "cps",
        [
            target(
                total("relay_limiter_decisions_total", 'outcome="refused"', by="scope, priority"),
                "{{priority}}, {{scope}} quota",
            ),
            target(
                total("relay_limiter_dry_run_total", by="scope, priority, outcome"),
                "dry run: {{priority}}, {{scope}} quota, {{outcome}}",
            ),
        ],
    )

    board.row("Who asks, and with which keys")
    board.series(
        "Tokens refused by reason",
        "wrong_issuer, wrong_audience and unknown_key in numbers usually mean a misconfigured module or relay; a mixture, somebody trying.",
        "cps",
        [target(total("relay_auth_total", 'outcome!="ok"', by="outcome"), "{{outcome}}")],
        stack=True,
    )
    board.series(
        "Age of the oldest key set",
        "Of issuers whose keys were asked for in the last 5 minutes; 0 where there are none. Sets are renewed at 5 minutes, and kept to "
        "60 minutes while their issuer does not answer.",
        "s",
        [target(f"max by (instance) ({select('relay_jwks_age_seconds')})", "{{instance}}")],
        thresholds=steps((None, "transparent"), (1200, ORANGE), (3600, RED)),
    )
    board.series(
        "Fetches of key sets",
        "One per issuer and replica in 5 minutes while there are requests, and a few more when keys rotate.",
        "cps",
        [target(total("relay_jwks_refresh_total", by="outcome"), "{{outcome}}")],
        colours={"ok": GREEN, "error": RED},
    )
    return board


def capacity():
    board = Board(
        "cyberscan-relay-capacity",
        "CyberScan Relay / Capacity",
        "How full each replica is, how long its callers wait for a turn, and how Redis does.",
        ["capacity"],
    )
    board.row("Is there room?")
    board.stat(
        "CPU",
        "Processor cores in use by the busiest replica.",
        "none",
        f"max({rate('process_cpu_seconds_total')})",
        steps((None, GREEN), (1, ORANGE), (2, RED)),
        low=0, decimals=2, none="no data",
    )
    board.stat(
        "Memory",
        "Resident memory of the largest replica. Expect some tens of MiB more than cache.memory.",
        "bytes",
        f"max({select('process_resident_memory_bytes')})",
        steps((None, GREEN), (402653184, ORANGE), (483183820, RED)),
        low=0, none="no data",
    )
    board.stat(
        "Descriptors",
        "The fullest replica's share of its limit. Each connection is one.",
        "percentunit",
        f"max({select('process_open_fds')} / {select('process_max_fds')})",
        steps((None, GREEN), (0.7, ORANGE), (0.9, RED)),
        low=0, high=1, decimals=0, none="no data",
    )
    board.stat(
        "Cache filled",
        "The fullest replica's share of its capacity, which is three quarters of cache.memory. Full is normal; full with a low hit ratio means that it is too small.",
        "percentunit",
        f"max({select('relay_cache_bytes')} / ({select('relay_cache_capacity_bytes')} > 0))",
        steps((None, GREEN)),
        low=0, high=1, decimals=0, none="no cache",
    )
    board.stat(
        "Connections",
        "Open client connections of all replicas. At server.max_connections (4096 each) the one that has idled longest goes.",
        "none",
        f"sum({select('relay_connections')})",
        steps((None, BLUE)),
        low=0, none="no data",
    )
    board.stat(
        "In flight",
        "Requests under way in the busiest replica. At server.max_in_flight (1024) more are refused at once.",
        "none",
        f"max({select('relay_requests_in_flight')})",
        steps((None, GREEN), (512, ORANGE), (900, RED)),
        low=0, none="no data",
    )
    board.stat(
        "Limiter wait",
        "95 of 100 calls that somebody waits for get their turn within this time: they wait for a quota, or behind other calls of the same tenant.",
        "s",
        quantile(0.95, "relay_limiter_wait_seconds"),
        steps((None, GREEN), (0.5, ORANGE), (2.5, RED)),
        low=0, none="no calls",
    )
    board.stat(
        "Redis failing",
        "Share of the Redis operations without success, those not tried included.",
        "percentunit",
        share(total("relay_redis_operations_total", 'outcome!="ok"'), total("relay_redis_operations_total")),
        steps((None, GREEN), (0.01, ORANGE), (0.2, RED)),
        low=0, high=1, decimals=1, none="no Redis",
    )

    board.row("Process")
    board.series(
        "Processor",
        "Processor cores in use.",
        "none",
        [target(f"sum by (instance) ({rate('process_cpu_seconds_total')})", "{{instance}}")],
        decimals=2,
    )
    board.series(
        "Resident memory",
        "Resident memory of the process, and what the cache may take of it.",
        "bytes",
        [
            target(f"max by (instance) ({select('process_resident_memory_bytes')})", "{{instance}}"),
            target(f"max({select('relay_cache_capacity_bytes')})", "cache capacity"),
        ],
        colours={"cache capacity": GREY},
    )
    board.series(
        "File descriptors",
        "Open file descriptors: connections of callers, to CyberScan and to Redis. How near the limit they are is at the top.",
        "none",
        [
            target(f"max by (instance) ({select('process_open_fds')})", "{{instance}}"),
        ],
    )
    board.series(
        "Time since start",
        "A saw-tooth is a replica that keeps being restarted.",
        "s",
        [target(f"time() - max by (instance) ({select('process_start_time_seconds')})", "{{instance}}")],
    )
    board.series(
        "Threads and tasks",
        "Two threads per core or so; more means blocking work. Tasks come and go with connections and calls.",
        "none",
        [
            target(f"max by (instance) ({select('process_threads')})", "{{instance}} threads"),
            target(f"max by (instance) ({select('relay_tasks')})", "{{instance}} tasks"),
        ],
        decimals=0,
    )
    board.series(
        "Builds running",
        "Replicas by version and revision. Two lines for long are a deploy that got stuck.",
        "none",
        [target(f"count by (version, revision) ({select('relay_build_info')})", "{{version}} ({{revision}})")],
        stack=True, decimals=0,
    )

    board.row("Load")
    board.series(
        "Requests by replica",
        "Uneven lines: the load balancer prefers somebody, or keeps few connections.",
        "reqps",
        [target(total("relay_requests_total", by="instance"), "{{instance}}")],
    )
    board.series(
        "Connections and requests in flight",
        "Open client connections and requests under way, of all replicas.",
        "none",
        [
            target(f"sum({select('relay_connections')})", "connections"),
            target(f"sum({select('relay_requests_in_flight')})", "in flight"),
        ],
        colours={"connections": BLUE, "in flight": ORANGE},
    )
    board.series(
        "Ready",
        "1 while a replica serves, 0 once it drains.",
        "none",
        [target(f"min by (instance) ({select('relay_ready')})", "{{instance}}")],
        high=1, decimals=0,
    )

    board.row("Cache in memory, and fills")
    board.series(
        "Bytes in memory",
        "What answers in memory take, against the capacity: three quarters of cache.memory. The last quarter holds rendered sightings.",
        "bytes",
        [
            target(f"sum by (instance) ({select('relay_cache_bytes')})", "{{instance}}"),
            target(f"min({select('relay_cache_capacity_bytes')})", "capacity"),
        ],
        colours={"capacity": GREY},
    )
    board.series(
        "Answers in memory",
        "Records of domains and addresses and lists of vulnerabilities, “not known” included.",
        "none",
        [target(f"sum by (instance) ({select('relay_cache_entries')})", "{{instance}}")],
        decimals=0,
    )
    board.series(
        "Fills by role",
        "How a missing or old answer was come by. leader: CyberScan was asked; adopted: another replica's answer was there already; "
        "follower: another replica's question was waited for.",
        "cps",
        [target(total("relay_cache_fills_total", by="role"), "{{role}}")],
        stack=True, colours={"leader": ORANGE, "adopted": GREEN, "follower": BLUE},
    )

    board.row("Limiter")
    board.series(
        "Decisions on calls",
        "Every call to CyberScan takes a permit first. interactive: somebody waits for it; prefetch: nobody does.",
        "cps",
        [
            target(
                total("relay_limiter_decisions_total", by="priority, outcome"),
                "{{priority}}, {{outcome}}",
            )
        ],
        stack=True,
        colours={
            "interactive, granted": GREEN, "interactive, refused": RED,
            "prefetch, granted": BLUE, "prefetch, refused": GREY,
        },
    )
    board.series(
        "Wait for a turn",
        "Of calls somebody waits for and that were granted.",
        "s",
        quantiles("relay_limiter_wait_seconds"),
        colours=QUANTILES,
    )
    board.series(
        "Quotas used",
        "Share of each quota's window that is used. Near 100 % for long: ask CyberScan for more, or keep answers longer (cache.fresh).",
        "percentunit",
        [target(f"max by (scope, window) ({select('relay_limiter_used_ratio')})", "{{scope}}, per {{window}}")],
        soft_high=1, thresholds=steps((None, "transparent"), (0.9, RED)),
    )

    board.row("Redis")
    board.series(
        "Redis up",
        "1 while Redis answers this replica, or where none is configured.",
        "none",
        [target(f"min by (instance) ({select('relay_redis_up')})", "{{instance}}")],
        high=1, decimals=0,
    )
    board.series(
        "Operations by outcome",
        "skipped: not tried, because Redis has been failing. refused: Redis said no, for instance out of memory or read-only.",
        "ops",
        [target(total("relay_redis_operations_total", by="outcome"), "{{outcome}}")],
        stack=True,
        colours={"ok": GREEN, "timeout": ORANGE, "refused": YELLOW, "unreachable": RED, "skipped": GREY},
    )
    board.series(
        "Operations by purpose",
        "read: values; claim and release: locks of fills; quota: calls taken from quotas; schedule: prefetching; events: changes told to replicas.",
        "ops",
        [target(total("relay_redis_operations_total", by="operation"), "{{operation}}")],
        stack=True,
    )
    board.series(
        "Duration of operations",
        "Quantiles over all operations. redis.timeout is 50 ms by default; three in a row beyond it and the relay goes on alone.",
        "s",
        quantiles("relay_redis_operation_duration_seconds"),
        colours=QUANTILES, thresholds=steps((None, "transparent"), (0.05, RED)),
    )
    board.series(
        "Duration of operations, p95 by purpose",
        "claim and quota run scripts and take longest.",
        "s",
        [target(quantile(0.95, "relay_redis_operation_duration_seconds", by="operation"), "{{operation}}")],
    )
    board.series(
        "Values not believed",
        "Values from Redis that were dropped. key: sealed with a key this replica does not have; sealed or corrupt: altered or damaged; "
        "format: of another version. Anything but format during an upgrade deserves a look.",
        "cps",
        [target(total("relay_cache_rejected_total", by="reason"), "{{reason}}")],
        stack=True,
    )
    return board


def prefetch():
    ahead = "relay_prefetch_total"
    refusals = 'outcome=~"refused_.+"'
    board = Board(
        "cyberscan-relay-prefetch",
        "CyberScan Relay / Prefetch",
        "Answers fetched before they are asked for: what it costs, what it brings, what holds it back.",
        ["prefetch"],
    )
    board.row("Is it worth it?")
    board.stat(
        "Useful",
        "Of the answers fetched ahead whose end is known, those that were served.",
        "percentunit",
        share(total(ahead, 'outcome="useful"'), total(ahead, 'outcome=~"useful|wasted"')),
        steps((None, RED), (0.2, ORANGE), (0.5, GREEN)),
        low=0, high=1, decimals=0, none="none yet", width=4,
    )
    board.stat(
        "Made ahead",
        "Of all answers that CyberScan gave, those that nobody waited for.",
        "percentunit",
        "clamp_max(" + share(total(ahead, 'outcome="refreshed"'), FETCHED) + ", 1)",
        steps((None, BLUE)),
        low=0, high=1, decimals=0, none="no calls", width=4,
    )
    board.stat(
        "Fetched ahead",
        "Answers fetched before they were asked for, per second.",
        "cps",
        total(ahead, 'outcome="refreshed"'),
        steps((None, BLUE)),
        low=0, none="no data", width=4,
    )
    board.stat(
        "On the schedule",
        "Answers that are to be fetched ahead, of all replicas.",
        "none",
        f"sum({select('relay_prefetch_scheduled')})",
        steps((None, BLUE)),
        low=0, none="no data", width=4,
    )
    board.stat(
        "Late by, p95",
        "How long ago what is fetched now was due. Late enough and the answer is old before it is renewed.",
        "s",
        quantile(0.95, "relay_prefetch_lag_seconds"),
        steps((None, GREEN), (30, ORANGE), (300, RED)),
        low=0, none="none yet", width=4,
    )
    board.stat(
        "Held back",
        "Of what was due and taken on, the share that was refused: by a budget, the limiter, missing credentials or an open breaker.",
        "percentunit",
        "clamp_max(" + share(total(ahead, refusals), total(ahead, 'outcome="claimed"')) + ", 1)",
        steps((None, GREEN), (0.25, ORANGE), (0.75, RED)),
        low=0, high=1, decimals=0, none="none due", width=4,
    )

    board.row("What becomes of it")
    board.series(
        "From the schedule to the answer",
        "claimed: due, and taken on by one replica; refreshed: fetched; unneeded: somebody had fetched it already; failed: "
        "CyberScan did not answer.",
        "cps",
        [
            target(
                total(ahead, 'outcome=~"claimed|refreshed|unneeded|failed"', by="outcome"), "{{outcome}}"
            )
        ],
        colours={"claimed": BLUE, "refreshed": GREEN, "unneeded": YELLOW, "failed": RED},
        width=12,
    )
    board.series(
        "Useful and wasted",
        "useful: served after it had been fetched ahead. wasted: it ended without having been served.",
        "cps",
        [target(total(ahead, 'outcome=~"useful|wasted"', by="outcome"), "{{outcome}}")],
        stack=True, colours={"useful": GREEN, "wasted": ORANGE}, width=12,
    )

    board.row("What holds it back")
    board.series(
        "Refusals by reason",
        "budget: the tenant's share for prefetching is used up; limiter: the rest of the quota is kept for who waits; credentials: "
        "no key at hand, or a refused one; breaker: the host is left alone.",
        "cps",
        [target(total(ahead, refusals, by="outcome"), "{{outcome}}")],
        stack=True,
        colours={
            "refused_budget": BLUE, "refused_limiter": YELLOW, "refused_credentials": PURPLE, "refused_breaker": RED,
        },
    )
    board.series(
        "Late by",
        "How long ago what is fetched now was due. It grows when replicas cannot keep up, or after all of them were down.",
        "s",
        quantiles("relay_prefetch_lag_seconds"),
        colours=QUANTILES,
    )
    board.series(
        "On the schedule, by replica",
        "A replica that has none while others do does not see Redis.",
        "none",
        [target(f"sum by (instance) ({select('relay_prefetch_scheduled')})", "{{instance}}")],
        stack=True, decimals=0,
    )

    board.row("What it costs")
    board.series(
        "Answers of CyberScan: ahead, and on demand",
        "ahead: fetched before anybody asked. on demand: somebody waited, or had just been served an old answer.",
        "cps",
        [
            target(total(ahead, 'outcome="refreshed"'), "ahead"),
            target(
                "clamp_min("
                + FETCHED
                + " - "
                + total(ahead, 'outcome="refreshed"')
                + ", 0)",
                "on demand",
            ),
        ],
        stack=True, colours={"ahead": BLUE, "on demand": ORANGE},
    )
    board.series(
        "The limiter's word on prefetching",
        "Calls nobody waits for never queue: they go at once or not at all.",
        "cps",
        [
            target(
                total("relay_limiter_decisions_total", 'priority="prefetch"', by="outcome"),
                "{{outcome}}",
            )
        ],
        stack=True, colours={"granted": GREEN, "refused": GREY},
    )
    board.series(
        "What callers gain",
        "Share of look-ups in memory that found a fresh answer. Prefetching that works raises it.",
        "percentunit",
        [
            target(
                share(total(LOOKUPS, 'tier="memory",outcome="fresh"'), total(LOOKUPS, 'tier="memory"')), "fresh in memory"
            )
        ],
        high=1, colours={"fresh in memory": GREEN},
    )
    return board


def documents():
    for name, board in (("overview", overview()), ("capacity", capacity()), ("prefetch", prefetch())):
        yield FOLDER / f"{name}.json", json.dumps(board.document(), indent=2, ensure_ascii=False) + "\n"


def main():
    stale = []
    for path, text in documents():
        if "--check" not in sys.argv[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
    for name in stale:
        print(f"{name} is not current: run scripts/boards/build.py", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
