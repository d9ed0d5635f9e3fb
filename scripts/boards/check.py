#!/usr/bin/env python3
"""Holds dashboards/*.json, deploy/prometheus/*.yml and docs/ to their rules, and to the metrics of src/metrics.rs.

The rules for boards are those of Grafana's dashboard-linter and of good mixins. PromQL is parsed by promtool; which series and
labels an expression uses is read by promql.py and compared with the code. Needs Python 3 and promtool only. Whether Grafana
knows the keys and kinds of panels is the word of schema/check.py.
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import build
import metrics_table
import promql
from relay_metrics import PROCESS, ROOT, SCRAPE, families, samples

DASHBOARDS = sorted((ROOT / "dashboards").glob("*.json"))
PROMETHEUS = ROOT / "deploy" / "prometheus"
RUNBOOK = ROOT / "docs" / "runbook.md"

# Metrics of the relay that need no panel, each with its reason.
NO_PANEL: dict[str, str] = {
    "relay_config_reloads_total": "rare; the log says what changed",
    "relay_config_last_reload_successful": "the alert RelayConfigurationRefused looks at it",
    "relay_config_last_reload_success_timestamp_seconds": "for whoever wants to know after a reload",
    "relay_redis_refusing": "the alert RelayRedisRefuses looks at it; relay_redis_up shows when",
    "relay_refused_before_routing_total": "the log names reason and peer; docs/deploying.md says what each reason is",
    "relay_tls_handshakes_total": "only with server.tls; docs/deploying.md says what to look for",
    "relay_tls_certificate_expiry_timestamp_seconds": "only with server.tls; docs/deploying.md has an alert for it",
}

# What the runbook quotes that is no panel's title.
SAID = {"Wrong jwks_host"}

UNITS = {"none", "short", "percent", "percentunit", "s", "ms", "bytes", "decbytes", "Bps", "reqps", "ops", "cps"}
OVER_TIME = {"rate", "increase", "irate"}
# Labels that every series has.
COMMON = {"job": None, "instance": None}
TOP_KEYS = {
    "uid", "title", "description", "tags", "schemaVersion", "version", "editable", "graphTooltip", "fiscalYearStartMonth",
    "weekStart", "timezone", "time", "timepicker", "refresh", "links", "templating", "annotations", "panels",
}

problems: list[str] = []
# (where, expression), for promtool.
expressions: list[tuple[str, str]] = []
shown: set[str] = set()
titles: set[str] = set()


def wrong(where, what):
    problems.append(f"{where}: {what}")


def concrete(expr):
    """`expr` as Prometheus would get it."""
    for name, value in (("__rate_interval", "5m"), ("__interval", "1m"), ("__range", "1h"), ("job", ".+"), ("instance", ".+")):
        expr = expr.replace("${" + name + "}", value).replace("$" + name, value)
    return expr


def check_series(where, expr, known, *, board):
    """Whether `expr` asks for what exists, and as it should be asked for."""
    try:
        read = promql.read(expr)
    except promql.Unreadable as reason:
        wrong(where, f"cannot be read: {reason}")
        return
    expressions.append((where, concrete(expr)))
    labels = set(COMMON)
    for selector in read.selectors:
        metric = known.get(selector.name)
        if metric is None:
            wrong(where, f"there is no metric {selector.name}")
            continue
        if board:
            shown.add(metric.family or metric.name)
        closed = {**COMMON, **metric.labels}
        labels |= set(closed)
        for label, operator, value in selector.matchers:
            if label not in closed:
                wrong(where, f"{selector.name} has no label {label}")
            elif closed[label] is not None:
                check_values(where, selector.name, label, operator, value, closed[label])
        if board:
            for name in ("job", "instance"):
                if (name, "=~", f"${name}") not in selector.matchers:
                    wrong(where, f'{selector.name} lacks {name}=~"${name}"')
        inner = selector.inside[0] if selector.inside else ""
        if metric.is_count and not (selector.range and inner in OVER_TIME):
            wrong(where, f"{selector.name} is a counter, which means nothing outside of rate() and increase()")
        if not metric.is_count and inner in OVER_TIME:
            wrong(where, f"{selector.name} is no counter, so that {inner}() means nothing")
    for label in read.labels - labels:
        wrong(where, f"no metric there has the label {label}")
    if board:
        for interval in read.ranges:
            if interval != "$__rate_interval":
                wrong(where, f"[{interval}] instead of [$__rate_interval]")
    return read


def check_values(where, name, label, operator, value, values):
    if operator in ("=", "!="):
        if value not in values:
            wrong(where, f'{name}: {label} is never "{value}"')
        return
    # Each alternative has to match something, or it is a value that has been renamed.
    for one in value.split("|"):
        if not any(re.fullmatch(one, known) for known in values):
            wrong(where, f'{name}: {label} never matches "{one}"')


def check_variables(where, board):
    variables = {one.get("name"): one for one in board["templating"]["list"]}
    source = variables.get("datasource", {})
    if [one for one in board["templating"]["list"] if one.get("type") == "datasource"] != [source]:
        wrong(where, "wants one variable of type datasource, named datasource")
    if source.get("label") != "Data source" or source.get("query") != "prometheus":
        wrong(where, 'the variable datasource is to be labelled "Data source" and to list Prometheus')
    for name in ("job", "instance"):
        one = variables.get(name)
        if one is None:
            wrong(where, f"has no variable {name}")
            continue
        wanted = {"type": "query", "multi": True, "includeAll": True, "allValue": ".+", "refresh": 2}
        for key, value in wanted.items():
            if one.get(key) != value:
                wrong(where, f"variable {name}: {key} is to be {value!r}")
        if one.get("datasource", {}).get("uid") != "${datasource}":
            wrong(where, f"variable {name} does not use $datasource")


def check_annotations(where, board, known):
    found = board["annotations"]["list"]
    if not any("relay_build_info" in one["target"]["expr"] for one in found):
        wrong(where, "has no annotation for deploys")
    for one in found:
        at = f"{where}: annotation {one.get('name')}"
        if one.get("datasource", {}).get("uid") != "${datasource}":
            wrong(at, "does not use $datasource")
        check_series(at, one["target"]["expr"], known, board=True)


def check_panel(where, panel, known):
    at = f"{where}: panel {panel.get('title')!r}"
    if not panel.get("title"):
        wrong(where, f"panel {panel.get('id')} has no title")
    if panel.get("type") == "row":
        return
    titles.add(panel.get("title"))
    if not panel.get("description"):
        wrong(at, "has no description")
    defaults = panel.get("fieldConfig", {}).get("defaults", {})
    if defaults.get("unit") not in UNITS:
        wrong(at, f"unit {defaults.get('unit')!r} is not known")
    if panel.get("datasource", {}).get("uid") != "${datasource}":
        wrong(at, "does not use $datasource")
    if not panel.get("targets"):
        wrong(at, "asks for nothing")
    references = [target.get("refId") for target in panel.get("targets", [])]
    if len(set(references)) != len(references):
        wrong(at, "has two targets of one name")
    legends = set()
    for target in panel.get("targets", []):
        here = f"{at}, target {target.get('refId')}"
        if target.get("datasource", {}).get("uid") != "${datasource}":
            wrong(here, "does not use $datasource")
        legend = target.get("legendFormat", "")
        legends.add(legend)
        if len(panel["targets"]) > 1 and legend in ("", "__auto"):
            wrong(here, "needs a legend beside others")
        read = check_series(here, target.get("expr", ""), known, board=True)
        for label in re.findall(r"\{\{\s*(\w+)\s*\}\}", legend):
            if read and label not in read.labels:
                wrong(here, f"the legend wants {label}, which the query does not keep")
    check_colours(at, panel, known)
    thresholds = defaults.get("thresholds", {}).get("steps", [])
    values = [step["value"] for step in thresholds[1:]]
    if thresholds and (thresholds[0]["value"] is not None or values != sorted(values)):
        wrong(at, "thresholds are to rise, from one without a value")


def check_colours(at, panel, known):
    """A colour for a line that cannot be there is one that has been renamed."""
    possible = set()
    for target in panel.get("targets", []):
        legend = target.get("legendFormat", "")
        names = re.findall(r"\{\{\s*(\w+)\s*\}\}", legend)
        values = []
        for name in names:
            found = set()
            for selector in promql.read(target["expr"]).selectors:
                found |= set((known[selector.name].labels.get(name) if selector.name in known else None) or [])
            values.append(sorted(found))
        for combination in itertools.product(*values):
            text = legend
            for name, value in zip(names, combination):
                text = re.sub(r"\{\{\s*" + name + r"\s*\}\}", value, text)
            possible.add(text)
    for override in panel.get("fieldConfig", {}).get("overrides", []):
        matcher = override["matcher"]
        if matcher["id"] == "byName" and matcher["options"] not in possible:
            wrong(at, f"has a colour for {matcher['options']!r}, which is never shown")


def check_layout(where, board):
    taken = {}
    for panel in board["panels"]:
        at = panel["gridPos"]
        if at["x"] + at["w"] > 24:
            wrong(where, f"panel {panel['title']!r} is wider than the board")
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            if cell in taken:
                wrong(where, f"panels {taken[cell]!r} and {panel['title']!r} lie over each other")
                break
            taken[cell] = panel["title"]
    numbers = [panel["id"] for panel in board["panels"]]
    if len(set(numbers)) != len(numbers):
        wrong(where, "two panels have one id")


def check_board(path, known, uids):
    where = path.name
    board = json.loads(path.read_text(encoding="utf-8"))
    for key in set(board) - TOP_KEYS:
        wrong(where, f"key {key!r} is not known")
    for key in TOP_KEYS - set(board):
        wrong(where, f"key {key!r} is missing")
    if set(board) != TOP_KEYS:
        return
    if board["editable"] is not False:
        wrong(where, "is to be editable: false")
    if board["schemaVersion"] != 42:
        wrong(where, "is to be schemaVersion 42")
    if not re.fullmatch(r"[a-z0-9-]{1,40}", board["uid"] or "") or board["uid"] in uids:
        wrong(where, "wants a uid of its own, of small letters, digits and hyphens")
    uids.add(board["uid"])
    if "cyberscan-relay" not in board["tags"]:
        wrong(where, "wants the tag cyberscan-relay")
    if not board["links"] or not all(link.get("includeVars") and link.get("keepTime") for link in board["links"]):
        wrong(where, "its links are to keep variables and time")
    check_variables(where, board)
    check_annotations(where, board, known)
    check_layout(where, board)
    for panel in board["panels"]:
        check_panel(where, panel, known)


def yaml_rules(path):
    """(kind, name, expression, text) of each rule. Only as much of YAML as rule files use: a mapping per item, `>-` for long text."""
    items = re.split(r"(?m)^ {6}- ", path.read_text(encoding="utf-8"))[1:]
    for item in items:
        # The item ends where something stands further to the left.
        item = re.split(r"(?m)^ {0,6}\S", " " * 8 + item)[0]
        kind, name = re.match(r" {8}(record|alert): (\S+)", item).groups()
        expr = re.search(r"(?m)^ {8}expr: (?:>-\n((?: {10}.*\n?)+)|(.*))", item)
        yield kind, name, " ".join((expr[1] or expr[2]).split()), item


def check_rules(known):
    recorded = {}
    for path in (PROMETHEUS / "rules.yml", PROMETHEUS / "alerts.yml"):
        for kind, name, _, _ in yaml_rules(path):
            if kind == "record":
                recorded[name] = type(SCRAPE[0])(name, "gauge", "", {"scope": None, "window": None, "le": None})
    names = []
    for path in (PROMETHEUS / "rules.yml", PROMETHEUS / "alerts.yml"):
        for kind, name, expr, text in yaml_rules(path):
            where = f"{path.name}: {name}"
            check_series(where, expr, {**known, **recorded}, board=False)
            if kind == "alert":
                names.append(name)
                check_alert(where, name, text)
    tested = "".join(path.read_text(encoding="utf-8") for path in sorted((PROMETHEUS / "tests").glob("*.yml")))
    runbook = RUNBOOK.read_text(encoding="utf-8") if RUNBOOK.exists() else ""
    entries = re.findall(r"(?m)^## (\S+)$", runbook)
    for name in names:
        # Cases of promtool, from one alertname to the next.
        cases = re.findall(rf"alertname: {name}\s*\n((?:(?!\s*- eval_time|\s*alertname:).*\n?)*)", tested)
        if not any("exp_labels" in case for case in cases):
            wrong(f"alerts.yml: {name}", "no test makes it fire")
        if not any("exp_labels" not in case for case in cases):
            wrong(f"alerts.yml: {name}", "no test keeps it from firing")
        if name not in entries:
            wrong(f"alerts.yml: {name}", "has no entry in docs/runbook.md")
    # Panels that it sends somebody to: quoted, and beginning as titles do.
    for quoted in set(re.findall(r'"([A-Z][^"]*)"', runbook)) - SAID:
        if " ".join(quoted.split()) not in titles:
            wrong("runbook.md", f"there is no panel {quoted!r}")
    for entry in set(entries) - set(names):
        wrong("runbook.md", f"{entry} is no alert")


def check_alert(where, name, text):
    if not re.search(r"severity: (page|ticket)\b", text):
        wrong(where, "severity is to be page or ticket")
    for annotation in ("summary", "description", "runbook_url"):
        if not re.search(rf"(?m)^ {{10}}{annotation}: \S", text):
            wrong(where, f"has no {annotation}")
    if f"runbook_url: docs/runbook.md#{name.lower()}\n" not in text + "\n":
        wrong(where, f"runbook_url is to be docs/runbook.md#{name.lower()}")


def check_promql():
    """promtool parses every expression, as the rule of a file of our own."""
    promtool = shutil.which("promtool")
    if promtool is None:
        wrong("promtool", "is not here, so PromQL was not parsed: apt-get install prometheus, or take it from a Prometheus release")
        return
    rules = ["groups:", "- name: boards", "  rules:"]
    for number, (_, expr) in enumerate(expressions):
        rules += [f"  - record: expression_{number}", f"    expr: {json.dumps(expr, ensure_ascii=False)}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.yml"
        path.write_text("\n".join(rules) + "\n", encoding="utf-8")
        run = subprocess.run([promtool, "check", "rules", "--lint=none", path], capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return
    output = run.stdout + run.stderr
    faults = re.findall(r'"expression_(\d+)":? (.*)', output)
    for number, reason in faults:
        wrong(expressions[int(number)][0], reason.strip())
    if not faults:
        wrong("promtool", output.strip())


def main():
    own = families()
    known = samples(own + PROCESS + SCRAPE)
    uids: set[str] = set()
    for path in DASHBOARDS:
        check_board(path, known, uids)
    if not DASHBOARDS:
        wrong("dashboards", "there are none")
    check_rules(known)
    for metric in own:
        if metric.name not in shown and metric.name not in NO_PANEL:
            wrong("dashboards", f"{metric.name} is on no board and not excused in NO_PANEL")
    for name in NO_PANEL:
        if name in shown or name not in {metric.name for metric in own}:
            wrong("NO_PANEL", f"{name} needs no excuse")
    check_promql()
    for path, text in build.documents():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            wrong(path.name, "is not what scripts/boards/build.py writes: run it")
    if not metrics_table.DOCUMENT.exists() or metrics_table.DOCUMENT.read_text(encoding="utf-8") != metrics_table.document():
        wrong("docs/metrics.md", "is not current: run scripts/boards/metrics_table.py")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems", file=sys.stderr)
        return 1
    print(f"{len(DASHBOARDS)} boards, {len(expressions)} expressions, {len(own)} metrics of the relay: as they should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
