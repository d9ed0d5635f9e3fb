"""The relay's metrics, read from src/metrics.rs, and what every process exports beside them.

It owns the reading of the two tables `labels!` and `families!`; it must not know who uses the metrics.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "metrics.rs"

TYPES = {
    "Counters": "counter",
    "Gauges": "gauge",
    "Ratios": "gauge",
    "Histograms": "histogram",
}


@dataclass
class Metric:
    name: str
    type: str
    help: str
    # Label -> its values in the order of the code; None where the values are not a closed set.
    labels: dict[str, list[str] | None] = field(default_factory=dict)
    buckets: list[str] = field(default_factory=list)
    # The metric as the code has it, for the samples of a histogram.
    family: str = ""

    @property
    def is_count(self) -> bool:
        """Whether it only ever rises, so that only its rate means anything."""
        return self.type == "counter"


# What the Prometheus client library exports for the process on Linux.
PROCESS = [
    Metric("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds."),
    Metric("process_open_fds", "gauge", "Number of open file descriptors."),
    Metric("process_max_fds", "gauge", "Maximum number of open file descriptors."),
    Metric("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes."),
    Metric("process_resident_memory_bytes", "gauge", "Resident memory size in bytes."),
    Metric("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds."),
    Metric("process_threads", "gauge", "Number of OS threads in the process."),
]

# What Prometheus itself adds to every target.
SCRAPE = [Metric("up", "gauge", "1 if the last scrape of the target worked.")]


class Unreadable(Exception):
    """src/metrics.rs is not written as this reader expects it."""


def block(text: str, start: str) -> str:
    """What stands between the braces that open after `start`."""
    at = text.find(start)
    if at < 0:
        raise Unreadable(f"{SOURCE.name} has no `{start}`")
    at += len(start)
    depth = 1
    for end in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[at:end]
    raise Unreadable(f"`{start}` of {SOURCE.name} does not end")


def enums(text: str) -> dict[str, list[str]]:
    table = re.sub(r"///.*", "", block(text, "\nlabels! {"))
    found = {}
    for name, body in re.findall(r"(\w+)\s*\{([^}]*)\}", table):
        found[name] = re.findall(r'\w+\s*=>\s*"([^"]*)"', body)
    return found


def families(source: Path = SOURCE) -> list[Metric]:
    """Every family of the relay's own, in the order of the code."""
    text = source.read_text(encoding="utf-8")
    values = enums(text)
    buckets = {
        name: [item.strip() for item in items.split(",") if item.strip()]
        for name, items in re.findall(r"const (\w+): &\[f64\] =\s*&\[([^\]]*)\]", text)
    }
    entry = re.compile(
        r"(?P<doc>(?:[ \t]*///[^\n]*\n)+)\s*(?P<field>\w+):\s*(?P<kind>\w+)<\((?P<types>[^)]*)\)>\s*="
        r"\s*\w+\(\s*\"(?P<name>[^\"]+)\",\s*\[(?P<labels>[^\]]*)\]\s*(?:,\s*(?P<buckets>\w+)\s*)?,?\s*\);"
    )
    table = block(text, "\nfamilies! {")
    found = []
    for match in entry.finditer(table):
        labels = re.findall(r'"([^"]+)"', match["labels"])
        types = [name.strip() for name in match["types"].split(",") if name.strip()]
        if len(labels) != len(types) or match["kind"] not in TYPES:
            raise Unreadable(f"{match['name']}: its labels do not fit its type")
        help_text = " ".join(line.strip().removeprefix("///").strip() for line in match["doc"].splitlines())
        found.append(
            Metric(
                match["name"],
                TYPES[match["kind"]],
                help_text.strip(),
                {label: values[name] for label, name in zip(labels, types)},
                buckets[match["buckets"]] if match["buckets"] else [],
            )
        )
    # A line that the expression above does not fit would otherwise be overlooked.
    names = re.findall(r'"(relay_\w+)"', table)
    if [metric.name for metric in found] != names:
        raise Unreadable(f"read {len(found)} of {len(names)} families")
    build = re.search(r'Opts::new\("(relay_build_info)",\s*"([^"]*)"\)', text)
    if not build:
        raise Unreadable("there is no relay_build_info")
    found.append(Metric(build[1], "gauge", build[2], {"version": None, "revision": None}))
    return found


def samples(metrics: list[Metric]) -> dict[str, Metric]:
    """Every name that can stand in a query -> what it is. A histogram has three."""
    found = {}
    for metric in metrics:
        if metric.type != "histogram":
            found[metric.name] = metric
            continue
        for suffix in ("_bucket", "_sum", "_count"):
            labels = dict(metric.labels)
            if suffix == "_bucket":
                labels["le"] = None
            found[metric.name + suffix] = Metric(
                metric.name + suffix, "counter", metric.help, labels, family=metric.name
            )
    return found
