"""Checks the documents without a relay: they are valid, their examples meet their schemas, and their error codes, version and
figures are those of the source."""

import re

import yaml
from checks import Checks
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

FORMATS = Draft202012Validator.FORMAT_CHECKER


def load(path):
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)


def validator(document, schema):
    """For `schema`, whose references are within `document`."""
    return Draft202012Validator({**schema, "components": document["components"]}, format_checker=FORMATS)


def resolved(document, node):
    while "$ref" in node:
        target = document
        for key in node["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        node = target
    return node


def media(document, node, place=""):
    """Every `content` entry below `node`: its place, schema and examples."""
    if isinstance(node, dict):
        for kind, entry in node.get("content", {}).items() if isinstance(node.get("content"), dict) else ():
            if isinstance(entry, dict) and "schema" in entry:
                examples = {name: resolved(document, example)["value"] for name, example in entry.get("examples", {}).items()}
                yield place, entry["schema"], examples
        for key, value in node.items():
            yield from media(document, value, f"{place} {key}".strip())
    elif isinstance(node, list):
        for value in node:
            yield from media(document, value, place)


def codes(node):
    """Every error item a schema describes, as (type, code)."""
    if isinstance(node, dict):
        properties = node.get("properties", {})
        if {"type", "code", "message"} <= properties.keys():
            yield properties["type"].get("const"), properties["code"].get("const")
        for value in node.values():
            yield from codes(value)
    elif isinstance(node, list):
        for value in node:
            yield from codes(value)


def source(path):
    with open(path, encoding="utf-8") as file:
        return file.read().split("#[cfg(test)]")[0]


def main():
    checks = Checks()
    public, admin = load("docs/openapi.yaml"), load("docs/openapi-admin.yaml")
    for name, document in (("openapi.yaml", public), ("openapi-admin.yaml", admin)):
        try:
            validate(document)
            checks.that(name, True)
        except Exception as fault:  # Whatever it is, it is to be shown.
            checks.fail(f"{name} is not valid: {fault}")
        for place, schema, examples in media(document, document):
            for example, value in examples.items():
                faults = [fault.message[:300] for fault in validator(document, schema).iter_errors(value)]
                checks.that(f"{name}: {place}: example {example}", not faults, "; ".join(faults))

    version = re.search(r'^version = "(.+)"$', source("Cargo.toml"), re.M).group(1)
    for document in (public, admin):
        told = document["info"]["version"]
        checks.that("the version is that of Cargo.toml", told == version, f"{told} is not {version}")

    replies = source("src/http/error_reply.rs")
    words = dict(map(reversed, re.findall(r'rename = "([^"]+)"\)\]\s+(\w+),', source("src/ctim/envelope.rs"))))
    written = {(kind, words.get(code, code)) for kind, code in re.findall(r"\b(fatal|warning)\(\s*ErrorCode::(\w+)", replies)}
    others = re.findall(r"(?<!fn )\b(?:fatal|warning)\((?!\s*ErrorCode::).*", replies)
    checks.that("every error item of error_reply.rs has its code beside it", not others, "; ".join(others))
    documented = set(codes(public["components"]["schemas"]))
    for kind, code in sorted(written - documented):
        checks.fail(f"error_reply.rs says {kind} {code!r}, openapi.yaml does not")
    for kind, code in sorted(documented - written, key=str):
        checks.fail(f"openapi.yaml says {kind} {code!r}, error_reply.rs does not")
    checks.that("error codes were found", len(written) > 8 and len(documented) > 8)

    listed = re.search(r"\bErrorCode \{(.*?)\n    \}", source("src/metrics.rs"), re.S).group(1)
    counted = set(re.findall(r'=> "([^"]+)"', listed))
    errors = {code for _, code in documented}
    uncounted = errors - counted
    for code in sorted(uncounted):
        checks.fail(f"openapi.yaml says {code!r}, ErrorCode of metrics.rs does not")
    for code in sorted(counted - errors):
        checks.fail(f"ErrorCode of metrics.rs says {code!r}, openapi.yaml does not")
    figures = set(admin["components"]["schemas"]["Status"]["properties"]["errors"]["properties"])
    checks.that("/status has every code of metrics.rs", figures == counted, str(figures ^ counted))

    messages = set(re.findall(r'"([^"]*)"', re.search(r"match error \{(.*?)\n        \}\)", replies, re.S).group(1).replace("\\\n", "")))
    messages = {"Authorization failed: " + re.sub(r"\s+", " ", message) for message in messages} | {"Authorization failed: wrong api_key"}
    told = set(public["components"]["schemas"]["AuthorizationError"]["properties"]["message"]["enum"])
    checks.that("authorization errors are worded as in error_reply.rs", messages == told, str(sorted(messages ^ told)))
    checks.end("documents and source")


if __name__ == "__main__":
    main()
