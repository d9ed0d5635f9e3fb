"""Asks a live relay for the examples of the documents and for what no generator asks: other paths, other methods, no token.

live.py PUBLIC ADMIN TOKEN_FILE ADMIN_TOKEN  |  live.py draining ADMIN"""

import http.client
import json
import re
import sys

from checks import Checks
from document import load, resolved, validator

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS"]
TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")
# Bodies that no example of a request may show, because they are none.
BAD = {"invalid": [{"type": "ip", "value": ""}], "no_list": {}}


def ask(address, method, path, body=None, length=True, **headers):
    """Status, headers and body of an answer. A body without `length` is sent in chunks."""
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is None:
            connection.request(method, path, headers=headers)
        elif length:
            connection.request(method, path, body=body, headers=headers)
        else:
            connection.request(method, path, body=iter([body]), headers=headers, encode_chunked=True)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def meets(document, schema, text):
    faults = [fault.message[:300] for fault in validator(document, schema).iter_errors(json.loads(text))]
    return "; ".join(faults)


def timeless(value):
    return TIME.sub("<time>", json.dumps(value, sort_keys=True))


def bodies(document, operation):
    """The request examples of an operation by name, as bytes."""
    request = resolved(document, operation.get("requestBody", {}))
    for kind, media in request.get("content", {}).items():
        for name, example in media.get("examples", {}).items():
            value = example["value"]
            yield name, (value if kind == "text/plain" else json.dumps(value)).encode()


def examples(document, operation, status):
    content = resolved(document, operation["responses"][status]).get("content", {})
    for media in content.values():
        return media["schema"], {name: resolved(document, example)["value"] for name, example in media.get("examples", {}).items()}
    return None, {}


def public(checks, address, token):
    document = load("docs/openapi.yaml")
    schemas = document["components"]["schemas"]
    authorized = {"Authorization": f"Bearer {token}"}

    def shown(path, name, expected, **request):
        status, headers, text = ask(address, path=path, **request)
        checks.that(f"{path}: example {name}: 200 and JSON", status == 200 and headers["content-type"] == "application/json", f"{status} {headers['content-type']}")
        checks.that(f"{path}: example {name}: the answer is the one shown", timeless(json.loads(text)) == timeless(expected), text.decode()[:600])

    for path, item in document["paths"].items():
        for method in ("post", "get"):
            operation = item.get(method)
            if operation is None:
                continue
            schema, answers = examples(document, operation, "200")
            secured = "security" in operation
            if secured:
                shown(path, "unauthorized", answers["unauthorized"], method="POST")
                for bad in ("Basic x", "Bearer", "Bearer x", f"Bearer {token}x", f"Bearer {token} x"):
                    status, _, text = ask(address, "POST", path, Authorization=bad)
                    faults = meets(document, {"$ref": "#/components/schemas/AuthorizationError"}, json.dumps(json.loads(text)["errors"][0]))
                    checks.that(f"{path}: {bad.split()[0]} …: an authorization error alone", status == 200 and len(json.loads(text)) == 1 and not faults, text.decode())
                    checks.that(f"{path}: {bad.split()[0]} …", not meets(document, schema, text))
            asked = dict(bodies(document, operation))
            if asked:
                asked |= {name: json.dumps(body).encode() for name, body in BAD.items()}
            for name, body in asked.items():
                if name in answers:
                    shown(path, name, answers[name], method="POST", body=body, **authorized)
                    shown(f"{path}/", name, answers[name], method="POST", body=body, length=False, **authorized)
                else:
                    status, _, text = ask(address, "POST", path, body, **authorized)
                    faults = meets(document, schema, text)
                    checks.that(f"{path}: {name}", status == 200 and not faults, faults)
            if path == "/watchdog":
                shown(path, "good", answers["good"], method="GET", Health_Check="test")
                shown(path, "missing", answers["missing"], method="GET")
            elif path in ("/", "/version"):
                shown(path, "good", answers["good"], method=method.upper())
            elif path == "/health":
                status, _, text = ask(address, "POST", path, **authorized)
                faults = meets(document, schema, text)
                checks.that(f"{path}: good", status == 200 and not faults, faults or text.decode())
                checks.that(f"{path}: quotas are shown where they are set", "quotas" in json.loads(text).get("data", {}), text.decode())
        other_methods(checks, document, address, path, item, {"$ref": "#/components/schemas/MethodNotAllowed"})
    for path, sent in (("/version?x=1", {}), ("/health/?x", {"Authorization": f"bEaReR {token}"})):
        status, _, text = ask(address, "POST", path, **sent)
        checks.that(f"{path}: queries, a trailing slash and the case of the scheme are ignored", status == 200 and b"errors" not in text, text.decode())
    for coding, refused in (("gzip", True), ("identity", False)):
        _, _, text = ask(address, "POST", "/refer/observables", b"[]", Content_Encoding=coding, **authorized)
        checks.that(f"Content-Encoding: {coding}", (b"A Content-Encoding of the request body" in text) == refused, text.decode())
    many = json.dumps([{"type": "sha256", "value": "x"}] * 1001).encode()
    _, _, text = ask(address, "POST", "/observe/observables", many, **authorized)
    checks.that("1001 observables are too many", b"Longer than maximum length 1000." in text and not meets(document, schemas["ObserveAnswer"], text), text.decode())
    _, _, text = ask(address, "POST", "/observe/observables", b"x" * (1 << 20) + b"x", **authorized)
    checks.that("more than 1 MiB is too much", b"larger than 1048576 bytes" in text and not meets(document, schemas["ObserveAnswer"], text), text.decode())
    for path in ("/nope", "/observe", "/health//", "/observe/observables/x", "//", "/HEALTH", "/%2e%2e/health", "/health%2f"):
        status, headers, text = ask(address, "POST", path, **authorized)
        faults = meets(document, schemas["NotFound"], text)
        checks.that(f"{path}: 404", status == 404 and headers["content-type"] == "application/json" and not faults, f"{status} {text[:200]}")


def other_methods(checks, document, address, path, item, schema):
    has = {method.upper() for method in item if method.upper() in METHODS}
    allow = set()
    for method in METHODS:
        status, headers, text = ask(address, method, path, b"" if method in ("POST", "PUT", "PATCH") else None)
        if method == "OPTIONS" and method in has:
            allow = {name.strip() for name in headers["allow"].split(",")}
            checks.that(f"OPTIONS {path}: the methods are those documented", status == 200 and allow == has and text == b"", f"{status} {allow} {has}")
        elif method == "HEAD":
            checks.that(f"HEAD {path}: {'200' if method in has else '405'}, without a body", status == (200 if method in has else 405) and text == b"", str(status))
        elif method not in has:
            faults = meets(document, schema, text)
            checks.that(f"{method} {path}: 405", status == 405 and headers["content-type"] == "application/json" and not faults, f"{status} {text[:200]}")
            told = {name.strip() for name in headers.get("allow", "").split(",")}
            checks.that(f"{method} {path}: Allow", told == has, str(told))


def admin(checks, address, token):
    document = load("docs/openapi-admin.yaml")
    authorized = {"Authorization": f"Bearer {token}"}
    error = {"$ref": "#/components/schemas/Error"}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            method = method.upper()
            _, answers = examples(document, operation, "200")
            if method == "GET":
                status, headers, text = ask(address, "GET", path)
                kinds = operation["responses"]["200"]["content"]
                checks.that(f"{path}: 200 and its content type", status == 200 and headers["content-type"] in kinds, f"{status} {headers['content-type']}")
                for name, value in answers.items():
                    got = json.loads(text) if "application/json" in kinds else text.decode()
                    checks.that(f"{path}: example {name}", got == value, text.decode()[:300])
                status, _, text = ask(address, "HEAD", path)
                checks.that(f"HEAD {path}", status == 200 and text == b"", str(status))
                continue
            for name, body in bodies(document, operation):
                status, _, text = ask(address, method, path, body, **authorized)
                checks.that(f"{path}: example {name}", status == 200 and json.loads(text) == answers[name], f"{status} {text.decode()[:300]}")
                status, headers, text = ask(address, method, path, body)
                faults = meets(document, resolved(document, operation["responses"]["401"])["content"]["application/json"]["schema"], text)
                checks.that(f"{path}: 401 without the token", status == 401 and headers["www-authenticate"] == "Bearer" and not faults, f"{status} {faults}")
            status, _, text = ask(address, method, path, b"x" * 4097, **authorized)
            checks.that(f"{path}: 413", status == 413 and not meets(document, error, text), str(status))
        methods = {**item, "options": {}, **({"head": {}} if "get" in item else {})}
        other_methods(checks, document, address, path, methods, error)
    status, _, text = ask(address, "GET", "/nope")
    checks.that("/nope: 404", status == 404 and not meets(document, error, text), str(status))
    _, _, text = ask(address, "GET", "/metrics")
    helps = [line.split(" ", 3)[3] for line in text.decode().splitlines() if line.startswith("# HELP relay_")]
    checks.that("/metrics has help texts", len(helps) > 10, str(len(helps)))
    checks.that("/metrics: help texts are sentences", not any('"' in help for help in helps), str(helps[:3]))
    status, _, _ = ask(address, "POST", "/purge", b'{"all": true}', length=False, **authorized)
    checks.that("/purge without a length: 411", status == 411, str(status))
    status, _, _ = ask(address, "PUT", "/log-level", b"", **authorized)
    checks.that("/log-level without a level: 400", status == 400, str(status))
    ask(address, "PUT", "/log-level", b"info", **authorized)


def main():
    checks = Checks()
    if sys.argv[1] == "draining":
        document = load("docs/openapi-admin.yaml")
        status, _, text = ask(sys.argv[2], "GET", "/readyz")
        faults = meets(document, {"$ref": "#/components/schemas/Draining"}, text)
        checks.that("/readyz of a relay that drains: 503", status == 503 and not faults, f"{status} {text.decode()}")
        checks.end("a relay that drains")
    address, admin_address, token_file, admin_token = sys.argv[1:]
    with open(token_file, encoding="ascii") as file:
        token = file.read().strip()
    public(checks, address, token)
    admin(checks, admin_address, admin_token)
    checks.end("examples, paths and methods")


if __name__ == "__main__":
    main()
