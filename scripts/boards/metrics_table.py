#!/usr/bin/env python3
"""Writes docs/metrics.md from src/metrics.rs. `--check` only says whether it is current."""

import sys

from relay_metrics import PROCESS, ROOT, families

DOCUMENT = ROOT / "docs" / "metrics.md"

HEAD = """\
# Metrics

<!-- Written by scripts/boards/metrics_table.py from src/metrics.rs; do not edit. -->

Served at `/metrics` on the admin listener, in the text format of Prometheus. Every series exists from the start, and every label is
a closed set, so their number is the same whatever clients send. No tenant, host or observable is ever a label. The boards that show
them are in `dashboards/`, the rules and alerts in `deploy/prometheus/`, and what to do about each alert in
[runbook.md](runbook.md).

"""


def labels(metric):
    if not metric.labels:
        return "-"
    lines = []
    for label, values in metric.labels.items():
        lines.append(f"`{label}`: " + (", ".join(f"`{value}`" for value in values) if values else "any"))
    return "<br>".join(lines)


def rows(metrics):
    yield "| name | type | labels and their values | meaning |"
    yield "|---|---|---|---|"
    for metric in metrics:
        yield f"| `{metric.name}` | {metric.type} | {labels(metric)} | {metric.help} |"


def document():
    own = families()
    lines = ["## Of the relay", "", *rows(own), "", "## Of the process", ""]
    lines += ["Only on Linux.", "", *rows(PROCESS), "", "## Buckets", ""]
    lines += ["The upper bounds of the histograms, in seconds.", "", "| name | bounds |", "|---|---|"]
    lines += [f"| `{metric.name}` | {', '.join(metric.buckets)} |" for metric in own if metric.buckets]
    return HEAD + "\n".join(lines) + "\n"


def main():
    current = document()
    if "--check" in sys.argv[1:]:
        if not DOCUMENT.exists() or DOCUMENT.read_text(encoding="utf-8") != current:
            print("docs/metrics.md is not current: run scripts/boards/metrics_table.py", file=sys.stderr)
            return 1
        return 0
    DOCUMENT.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
