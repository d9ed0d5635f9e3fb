"""What schemathesis has to see in the relay's answers beyond their schemas: an error for every bad token and body, and for no good one;
sightings and references of nothing but what was asked about. RELAY_TOKEN is a good token, ADMIN_TOKEN one of the admin listener; into RELAY_SEEN goes what was met."""

import json
import os

import schemathesis
from schemathesis.core.parameters import ParameterLocation

TOKEN = f"Bearer {os.environ['RELAY_TOKEN']}"
ADMIN_TOKEN = f"Bearer {os.environ['ADMIN_TOKEN']}"
SEEN = os.environ["RELAY_SEEN"]
# What the sandbox knows, and one address whose look-up fails.
WORTH_ASKING = [
    *({"type": "domain", "value": value} for value in ("mail.example", "SHOP.example.", "clean.example", "n5.load.example", "unknown.example")),
    *({"type": "ip", "value": value} for value in ("203.0.113.10", "203.0.113.25", "198.18.0.9", "2001:db8::1", "203.0.113.99", "10.0.0.1")),
    {"type": "sha256", "value": "ba7816bf"},
]


def acceptable(body):
    """What the contract says of a body: the observables in it, or None if it has to be refused."""

    def constant(text):
        raise ValueError(text)

    try:
        entries = json.loads((body or b"").decode("utf-8-sig"), parse_constant=constant)
        json.dumps(entries, ensure_ascii=False).encode()  # Half a surrogate pair is no text.
    except ValueError:
        return None
    text = lambda value: isinstance(value, str) and value != ""
    valid = lambda entry: isinstance(entry, dict) and entry.keys() == {"type", "value"} and all(map(text, entry.values()))
    return entries if isinstance(entries, list) and len(entries) <= 1000 and all(map(valid, entries)) else None


@schemathesis.hook
def map_body(context, body):
    """Every second entry of a good body becomes one that has an answer: random texts have none."""
    operation = getattr(context, "operation", None)
    if operation is None or not operation.path.endswith("/observables") or not isinstance(body, list):
        return body
    if acceptable(json.dumps(body).encode()) is None:
        return body
    pick = lambda entry: WORTH_ASKING[sum(json.dumps(entry).encode()) % len(WORTH_ASKING)]
    return [pick(entry) if place % 2 == 0 else entry for place, entry in enumerate(body)]


def seen(kind):
    with open(SEEN, "a", encoding="ascii") as file:
        file.write(kind + "\n")


@schemathesis.check
def answer_fits_the_question(ctx, response, case):
    request = response.request
    if request.method != case.operation.method.upper():
        return
    if case.operation.path in ("/health", "/observe/observables", "/refer/observables") and request.method == "POST":
        relay_route(case.operation.path, request, response.json())
    elif case.operation.path == "/purge":
        admin(response, case)


def relay_route(path, request, answer):
    codes = [error["code"] for error in answer.get("errors", [])]
    assert "internal error" not in codes, "a bug of the relay"
    # Blanks around a header's value are no part of it.
    token = request.headers.get("Authorization")
    token = token.decode("latin-1") if isinstance(token, bytes) else token
    if token is None or token.strip() != TOKEN:
        seen("unauthorized")
        assert codes == ["authorization error"] and "data" not in answer, f"not authorized, but {answer}"
        if token is None:
            assert answer["errors"][0]["message"] == "Authorization failed: Authorization header is missing"
        return
    assert "authorization error" not in codes, f"authorized, but {codes}"
    if path == "/health":
        seen("health" if "data" in answer else "failed")
        return
    body = request.body.encode() if isinstance(request.body, str) else request.body
    asked = acceptable(body)
    if asked is None:
        seen("invalid")
        assert codes == ["invalid argument"] and "data" not in answer, f"a bad body, but {answer}"
        return
    assert "invalid argument" not in codes, f"a good body, but {answer}"
    asked = {(entry["type"], entry["value"]) for entry in asked if entry["type"] in ("ip", "domain")}
    data = answer.get("data")
    if path == "/refer/observables":
        found = [reference["id"] for reference in data or []]
        ids = {f"ref-cyberscan-search-{kind}-{value}" for kind, value in asked}
        assert set(found) <= ids and len(set(found)) == len(found), f"references nobody asked for: {set(found) - ids}"
    else:
        sightings = (data or {}).get("sightings", {"count": 0, "docs": []})
        found = sightings["docs"]
        assert sightings["count"] == len(found), "the count is not that of the docs"
        assert len({sighting["id"] for sighting in found}) == len(found), "two sightings have the same id"
        about = {(tag["type"], tag["value"]) for sighting in found for tag in sighting["observables"]}
        assert about <= asked, f"sightings nobody asked for: {about - asked}"
        for sighting in found:
            assert len(sighting["data"]["columns"]) == len(sighting["data"]["rows"][0]), "the table's row is not as wide as its head"
    failed = any(error["type"] == "fatal" for error in answer.get("errors", []))
    seen(("partial" if failed else "found") if found else ("failed" if failed else "nothing"))


def admin(response, case):
    token = response.request.headers.get("Authorization")
    token = token.decode("latin-1") if isinstance(token, bytes) else token
    if token is None or token.strip() != ADMIN_TOKEN:
        seen("unauthorized")
        assert response.status_code in (401, 413), f"not authorized, but {response.status_code}"
        return
    seen("purged" if response.status_code == 200 else "refused")
    bad = case.meta is not None and case.meta.is_negative_at(ParameterLocation.BODY)
    assert not (bad and response.status_code == 200), "a bad purge was taken"
