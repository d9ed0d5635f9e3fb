#!/usr/bin/env python3
"""Holds dashboards/*.json to Grafana's own types: every key, every type, every option of every panel.

The types are those of grafana/*.json, which generate.mjs writes; what Grafana leaves open there is closed here: a panel is
what its `type` says, its options and overrides are those of that type, its queries are those of Prometheus. Spoilt boards
come first, because a check that lets one of them through proves nothing. Needs the package jsonschema (requirements.txt).
"""

import copy
import json
import re
import sys
from pathlib import Path

import jsonschema

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
DASHBOARDS = sorted((ROOT / "dashboards").glob("*.json"))

TEXT, YES_OR_NO = {"type": "string"}, {"type": "boolean"}
# What Grafana's data source for Prometheus reads of a query and of an annotation. Written by hand: those types are not in @grafana/schema.
QUERY = {
    "type": "object",
    "properties": {
        "refId": TEXT,
        "datasource": {"$ref": "#/definitions/DataSourceRef"},
        "hide": YES_OR_NO,
        "editorMode": {"enum": ["code", "builder"]},
        "expr": TEXT,
        "legendFormat": TEXT,
        "format": {"enum": ["time_series", "table", "heatmap"]},
        "range": YES_OR_NO,
        "instant": YES_OR_NO,
        "exemplar": YES_OR_NO,
        "interval": TEXT,
    },
    "required": ["refId", "expr"],
    "additionalProperties": False,
}
ANNOTATION = {"titleFormat": TEXT, "textFormat": TEXT, "tagKeys": TEXT, "useValueForTime": YES_OR_NO}


def ref(name):
    return {"$ref": f"#/definitions/{name}"}


def when(key, value, then, otherwise):
    return {"if": {"required": [key], "properties": {key: {"const": value}}}, "then": then, "else": otherwise}


def read_schemas():
    """(the board's, {kind of panel: its own}, the version of Grafana that all of them are of)."""
    found, versions = {}, set()
    for path in sorted((HERE / "grafana").glob("*.json")):
        found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        versions |= set(re.findall(r"@grafana/schema ([\d.]+\d)", found[path.stem]["$comment"]))
    (version,) = versions
    return found.pop("dashboard"), found, version


def own_names(kind, schema):
    """The definitions of `schema`, called KIND.NAME: those of several kinds have the same names."""
    text = json.dumps(schema["definitions"]).replace('"#/definitions/', f'"#/definitions/{kind}.')
    return {f"{kind}.{name}": definition for name, definition in json.loads(text).items()}


def panel_of(kind, definitions):
    """A panel of that kind, all of whose options, fields and overrides are known."""
    parts = definitions[f"{kind}.Kind"]["properties"]
    fields = copy.deepcopy(definitions["FieldConfig"])
    custom = fields["properties"].pop("custom")
    values = dict(fields["properties"])
    if "custom" in parts:
        custom = parts["custom"]
        fields["properties"]["custom"] = custom
        of = definitions[custom["$ref"].removeprefix("#/definitions/")]
        values |= {f"custom.{name}": value for name, value in of["properties"].items()}
    source = copy.deepcopy(definitions["FieldConfigSource"])
    source["properties"]["defaults"] = fields
    override = source["properties"]["overrides"]["items"]["properties"]["properties"]["items"]
    override["properties"]["id"] = {"enum": sorted(values)}
    override["allOf"] = [when("id", name, {"properties": {"value": value}}, True) for name, value in values.items()]
    panel = copy.deepcopy(definitions["Panel"])
    panel["properties"] |= {
        "type": {"const": kind},
        "options": parts["options"],
        "fieldConfig": source,
        "targets": {"type": "array", "items": ref("Query")},
    }
    panel["required"] += ["options"]
    return panel


def whole_schema(board, kinds):
    definitions = dict(board["definitions"])
    definitions["Query"] = QUERY
    annotation = definitions["AnnotationQuery"]
    annotation["properties"] |= {**ANNOTATION, "target": ref("Query")}
    for kind, schema in kinds.items():
        definitions |= own_names(kind, schema)
    # Grafana says "a panel or a row"; which of them is said by `type`.
    choice = {"required": ["type"], "properties": {"type": {"enum": ["row", *kinds]}}}
    for kind in kinds:
        definitions[f"{kind}.Panel"] = panel_of(kind, definitions)
        choice = when("type", kind, ref(f"{kind}.Panel"), choice)
    definitions["Any"] = when("type", "row", ref("RowPanel"), choice)
    for holder in ("Board", "RowPanel"):
        definitions[holder]["properties"]["panels"]["items"] = ref("Any")
    return {**board, "definitions": definitions}


def faults(board, validator):
    for error in sorted(validator.iter_errors(board), key=lambda error: error.json_path):
        yield f"{error.json_path.removeprefix('$').removeprefix('.') or 'the board'}: {error.message[:200]}"


# What may go wrong in a board: how it is spoilt, and what has to be said of it.
SPOILT = {
    "a misspelt key of the board": (lambda board, stat, series: board.update(panls=[]), "'panls' was unexpected"),
    "a version that is text": (lambda board, stat, series: board.update(schemaVersion="42"), "schemaVersion: '42'"),
    "a variable of no type": (lambda board, stat, series: board["templating"]["list"][1].update(type="qurey"), "'qurey'"),
    "a misspelt key of an annotation": (lambda board, stat, series: board["annotations"]["list"][0].update(iconColour="red"), "'iconColour'"),
    "a panel of no kind": (lambda board, stat, series: stat.update(type="statt"), "'statt' is not one of"),
    "a panel without a kind": (lambda board, stat, series: stat.pop("type"), "'type' is a required property"),
    "a misspelt key of a panel": (lambda board, stat, series: stat.update(descripton=""), "'descripton'"),
    "a height that is text": (lambda board, stat, series: stat["gridPos"].update(h="4"), "gridPos.h: '4'"),
    "a misspelt option": (lambda board, stat, series: stat["options"].update(colourMode="value"), "options: Additional"),
    "an option's value that is none": (lambda board, stat, series: stat["options"].update(colorMode="backround"), "options.colorMode"),
    "an option of another kind": (lambda board, stat, series: stat["options"].update(legend={}), "'legend'"),
    "a missing option": (lambda board, stat, series: series["options"].pop("tooltip"), "'tooltip' is a required property"),
    "a misspelt field": (lambda board, stat, series: series["fieldConfig"]["defaults"].update(decimal=1), "'decimal'"),
    "a misspelt field of a kind": (lambda board, stat, series: series["fieldConfig"]["defaults"]["custom"].update(lineWith=1), "'lineWith'"),
    "a field of another kind": (lambda board, stat, series: stat["fieldConfig"]["defaults"].update(custom={}), "'custom'"),
    "an override of nothing": (
        lambda board, stat, series: series["fieldConfig"]["overrides"].append(
            {"matcher": {"id": "byName", "options": "x"}, "properties": [{"id": "custom.lineWith", "value": 1}]}
        ),
        "'custom.lineWith' is not one of",
    ),
    "an override of the wrong type": (
        lambda board, stat, series: series["fieldConfig"]["overrides"].append(
            {"matcher": {"id": "byName", "options": "x"}, "properties": [{"id": "custom.lineWidth", "value": "1"}]}
        ),
        "value: '1' is not of type 'number'",
    ),
    "a misspelt key of a query": (lambda board, stat, series: series["targets"][0].update(legend="x"), "'legend'"),
    "a misspelt key of a row": (
        lambda board, stat, series: board["panels"].append(
            {"id": 999, "type": "row", "title": "x", "colapsed": False, "collapsed": False, "panels": []}
        ),
        "'colapsed'",
    ),
    "a fault in a panel of a row": (
        lambda board, stat, series: board["panels"].append(
            {"id": 999, "type": "row", "title": "x", "collapsed": True, "panels": [{**stat, "id": "998"}]}
        ),
        "panels[0].id: '998'",
    ),
}


def test_itself(board, validator):
    """What each spoilt copy of a good board must be found out for, and was not."""
    for what, (spoil, said) in SPOILT.items():
        spoilt = copy.deepcopy(board)
        first = {panel["type"]: panel for panel in reversed(spoilt["panels"])}
        spoil(spoilt, first["stat"], first["timeseries"])
        found = list(faults(spoilt, validator))
        if len(found) != 1 or said not in found[0]:
            yield f"{what}: to be found out with {said!r}, and was said: {found}"


def main():
    board, kinds, version = read_schemas()
    schema = whole_schema(board, kinds)
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    boards = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in DASHBOARDS}
    problems = [f"{name}: {fault}" for name, one in boards.items() for fault in faults(one, validator)]
    run = re.search(r"image: grafana/grafana:(\S+)", (ROOT / "docker-compose.yml").read_text(encoding="utf-8"))[1]
    if run != version:
        problems.append(f"docker-compose.yml runs Grafana {run}, the schemas are those of {version}: see generate.mjs")
    if not boards:
        problems.append("dashboards: there are none")
    elif not problems:
        problems += [f"check.py itself: {problem}" for problem in test_itself(boards["overview.json"], validator)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems", file=sys.stderr)
        return 1
    count = sum(len(one["panels"]) for one in boards.values())
    print(f"{len(boards)} boards, {count} panels and rows: as the types of Grafana {version} have them; {len(SPOILT)} spoilt boards found out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
