#!/usr/bin/env python3
"""Asks a live Prometheus everything the boards ask, and fails on what comes back empty.

    live.py http://127.0.0.1:9090 --minutes 5 --interval 5

The Prometheus has to scrape a relay that is being used: caches that hit and miss, and answers fetched ahead. Every series of the
relay exists from the start, so no fault is needed for a line to be there. --save FILE keeps the answers, for pictures.
"""

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

from relay_metrics import ROOT

# "board: panel: legend" of queries that may be empty, each with its reason.
MAY_BE_EMPTY: dict[str, str] = {}

# Alerts that may be raised during a run, each with its reason.
SANDBOX = "the sandbox fails one address on purpose, about 3 % of the requests; that is below the threshold of the fast burn"
MAY_BE_RAISED: dict[str, str] = {
    "RelayErrorBudgetBurn": SANDBOX,
    "RelayErrorBudgetBurnSlow": SANDBOX,
    "RelayErrorBudgetBurnCreeping": SANDBOX,
}

class Prometheus:
    def __init__(self, url):
        self.url = url.rstrip("/")

    def get(self, path, **parameters):
        address = f"{self.url}{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                body = json.load(answer)
        except urllib.error.HTTPError as error:
            # Prometheus says in the body what is wrong with a query.
            body = json.load(error)
        if body.get("status") != "success":
            raise ValueError(body.get("error", "no success"))
        return body["data"]


def seconds(length):
    return f"{max(1, round(length))}s"


class Grafana:
    """What Grafana would send: its variables replaced, with everything chosen."""

    def __init__(self, prometheus, job, instance, minutes, interval):
        self.prometheus = prometheus
        self.end = time.time()
        self.start = self.end - 60 * minutes
        self.step = max(interval, 60 * minutes / 300)
        self.values = {
            "__rate_interval": seconds(max(self.step + interval, 4 * interval)),
            "__interval": seconds(self.step),
            "__range": seconds(60 * minutes),
            "job": job,
            "instance": instance,
        }

    def fill(self, expr):
        def value(match):
            name = match[1] or match[2]
            if name not in self.values:
                raise ValueError(f"${name} is no variable")
            return self.values[name]

        return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, expr)

    def query(self, expr):
        return self.prometheus.get(
            "/api/v1/query_range", query=self.fill(expr), start=self.start, end=self.end, step=self.step
        )["result"]

    def label_values(self, query):
        match = re.fullmatch(r"label_values\((.+),\s*(\w+)\)", query)
        if not match:
            raise ValueError(f"{query} is no label_values")
        series, label = match.groups()
        return self.prometheus.get(
            f"/api/v1/label/{label}/values", **{"match[]": self.fill(series), "start": self.start, "end": self.end}
        )


def numbers(result):
    return [float(value) for series in result for _, value in series["values"] if math.isfinite(float(value))]


def check_board(board, grafana, saved):
    name = board["title"].rsplit("/", 1)[-1].strip().lower()
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            try:
                values = grafana.label_values(variable["query"]["query"])
            except ValueError as reason:
                values = []
                yield f"{name}: variable {variable['name']}: {reason}"
            if not values:
                yield f"{name}: variable {variable['name']}: has no values"
    for annotation in board["annotations"]["list"]:
        try:
            grafana.query(annotation["target"]["expr"])
        except ValueError as reason:
            yield f"{name}: annotation {annotation['name']}: {reason}"
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            where = f"{name}: {panel['title']}: {target['legendFormat']}"
            try:
                result = grafana.query(target["expr"])
            except ValueError as reason:
                yield f"{where}: {reason}"
                continue
            saved.setdefault(board["uid"], {}).setdefault(str(panel["id"]), {})[target["refId"]] = result
            found = numbers(result)
            if not found and where not in MAY_BE_EMPTY:
                yield f"{where}: " + ("only NaN" if result else "empty") + f"\n    {grafana.fill(target['expr'])}"


def check_rules(prometheus):
    """Rules that cannot be evaluated, and alerts; one whose `for` is not over counts too, because runs are shorter than that."""
    known = set()
    for group in prometheus.get("/api/v1/rules")["groups"]:
        for rule in group["rules"]:
            known.add(rule["name"])
            if rule["health"] == "err":
                yield f"rule {rule['name']}: {rule['lastError']}"
    if not known:
        yield "Prometheus has no rules"
    for alert in prometheus.get("/api/v1/alerts")["alerts"]:
        name = alert["labels"]["alertname"]
        if name not in MAY_BE_RAISED:
            yield f"alert {name} is {alert['state']}: {alert['annotations'].get('summary', '')} {alert['labels']}"


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("prometheus", help="its URL")
    arguments.add_argument("--minutes", type=float, default=5, help="how far to look back (5)")
    arguments.add_argument("--interval", type=float, default=15, help="the scrape interval in seconds (15)")
    arguments.add_argument("--job", default=".+", help="what $job is (.+)")
    arguments.add_argument("--instance", default=".+", help="what $instance is (.+)")
    arguments.add_argument("--save", metavar="FILE", help="keep the answers as JSON")
    arguments.add_argument("--alerts", action="store_true", help="fail on alerts and on rules that cannot be evaluated, too")
    given = arguments.parse_args()
    grafana = Grafana(Prometheus(given.prometheus), given.job, given.instance, given.minutes, given.interval)
    failures, saved = [], {}
    try:
        for path in sorted((ROOT / "dashboards").glob("*.json")):
            failures += check_board(json.loads(path.read_text(encoding="utf-8")), grafana, saved)
        if given.alerts:
            failures += check_rules(grafana.prometheus)
    except urllib.error.URLError as reason:
        print(f"{given.prometheus}: {reason.reason}", file=sys.stderr)
        return 2
    if given.save:
        with open(given.save, "w", encoding="utf-8") as file:
            json.dump({"start": grafana.start, "end": grafana.end, "step": grafana.step, "panels": saved}, file)
    for failure in failures:
        print(failure, file=sys.stderr)
    asked = sum(len(targets) for panels in saved.values() for targets in panels.values())
    print(f"{asked} queries of {len(saved)} boards asked, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
