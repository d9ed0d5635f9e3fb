"""Just enough of PromQL to say which series an expression uses and how.

It owns the reading of expressions; it must not know any metric. Whether an expression is valid is promtool's word.
"""

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""
    (?P<space>\s+|\#[^\n]*)
  | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)
  | (?P<variable>\$\{?\w+\}?)
  | (?P<duration>(?:\d+(?:ms|[smhdwy]))+(?!\w))
  | (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
  | (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
  | (?P<operator>=~|!~|!=|==|<=|>=|[-+*/%^<>=(){}\[\],@:])
    """,
    re.VERBOSE,
)
AGGREGATIONS = {
    "sum", "min", "max", "avg", "count", "group", "stddev", "stdvar", "topk", "bottomk", "count_values", "quantile",
}
LISTS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
WORDS = LISTS | {"and", "or", "unless", "bool", "offset", "atan2", "inf", "nan"}


@dataclass
class Selector:
    name: str
    # (label, operator, value)
    matchers: list[tuple[str, str, str]] = field(default_factory=list)
    # What stands between the brackets, if anything does.
    range: str | None = None
    # The functions and aggregations around it, the innermost first.
    inside: list[str] = field(default_factory=list)


@dataclass
class Expression:
    selectors: list[Selector] = field(default_factory=list)
    # Labels in by, on, group_left and the like.
    labels: set[str] = field(default_factory=set)
    # Every range in brackets, those of sub-queries too.
    ranges: list[str] = field(default_factory=list)


class Unreadable(Exception):
    """It is not PromQL as it is written here."""


def tokens(text):
    found, at = [], 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if not match:
            raise Unreadable(f"{text[at:at + 20]!r}")
        at = match.end()
        if match.lastgroup != "space":
            found.append((match.lastgroup, match.group()))
    return found


def read(text: str) -> Expression:
    """What `text` uses."""
    found, row, at = Expression(), tokens(text), 0
    stack: list[str] = []
    # The aggregation whose list of labels comes before its argument: sum by (x) (...).
    pending = ""

    def peek(ahead=0):
        return row[at + ahead] if at + ahead < len(row) else ("", "")

    def label_list():
        nonlocal at
        if peek()[1] != "(":
            return
        at += 1
        while peek()[1] != ")":
            if not peek()[0]:
                raise Unreadable("a list of labels does not end")
            if peek()[0] == "name":
                found.labels.add(peek()[1])
            at += 1
        at += 1

    while at < len(row):
        kind, word = peek()
        at += 1
        if kind == "name" and word.lower() in LISTS:
            label_list()
        elif kind == "name" and word.lower() in WORDS:
            continue
        elif kind == "name" and word in AGGREGATIONS and peek()[1] in {"(", *LISTS}:
            pending = word
        elif kind == "name" and peek()[1] == "(":
            pending = word
        elif word == "(":
            stack.append(pending)
            pending = ""
        elif word == ")":
            if not stack:
                raise Unreadable("a bracket too many")
            stack.pop()
        elif kind == "name":
            selector = Selector(word, inside=[name for name in reversed(stack) if name])
            if peek()[1] == "{":
                at += 1
                while peek()[1] != "}":
                    (_, label), (_, operator), (kind, value) = peek(), peek(1), peek(2)
                    if kind != "string":
                        raise Unreadable(f"{word}: a matcher that is none")
                    selector.matchers.append((label, operator, value[1:-1]))
                    at += 3
                    if peek()[1] == ",":
                        at += 1
                at += 1
            if peek()[1] == "[":
                at += 1
                parts = []
                while peek()[1] != "]":
                    if not peek()[0]:
                        raise Unreadable("a range does not end")
                    parts.append(peek()[1])
                    at += 1
                at += 1
                selector.range = "".join(parts)
            found.selectors.append(selector)
        elif word == "{":
            raise Unreadable("a selector without a name")
        elif word == "[":
            parts = []
            while peek()[1] != "]":
                if not peek()[0]:
                    raise Unreadable("a range does not end")
                parts.append(peek()[1])
                at += 1
            at += 1
            found.ranges.append("".join(parts))
    if stack:
        raise Unreadable("a bracket is not closed")
    found.ranges += [selector.range for selector in found.selectors if selector.range]
    return found
