#!/usr/bin/env python3
"""What check.sh does once everything runs: opens the status page in a headless Chromium and looks at it.

The browser is spoken to over two pipes (--remote-debugging-pipe), so that neither a port nor a library is needed.
"""

import argparse
import base64
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

# The page asks this often, in seconds (page.js).
PERIOD = 2
# As WCAG 2 has it for text of usual size.
CONTRAST = 4.5
DESKTOP = {"width": 1280, "height": 860, "deviceScaleFactor": 1, "mobile": False}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}

FIGURES = """
    Object.fromEntries([...document.querySelectorAll("[id]:not(svg)")].map((element) => [element.id, element.innerText.trim()]))
"""
POINTS = """
    Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) =>
        [chart.id, chart.querySelector("polyline").points.numberOfItems]))
"""
# Every element with text of its own, against the nearest ground below it that is not transparent.
FAINT = """
    (() => {
        const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
            .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
        const ground = (element) => {
            for (let at = element; at; at = at.parentElement) {
                const colour = parts(getComputedStyle(at).backgroundColor);
                if (colour.length < 4 || colour[3] > 0) return colour;
            }
            return [255, 255, 255];
        };
        const texts = [...document.body.querySelectorAll("*")].filter((element) =>
            [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
        return texts.map((element) => {
            const [a, b] = [light(parts(getComputedStyle(element).color)), light(ground(element))];
            return [element.innerText, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
        });
    })()
"""
OVER = """
    [...document.querySelectorAll("body *:not(svg *)")].filter((one) => {
        const card = one.parentElement.closest("article");
        const edge = card ? card.getBoundingClientRect().right - parseFloat(getComputedStyle(card).paddingRight) : innerWidth;
        return one.getBoundingClientRect().right > edge + 0.5;
    }).map((one) => one.tagName + " " + one.id + " " + one.innerText)
"""
LOUD = """
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective + " " + event.blockedURI));
"""


class Failure(Exception):
    pass


class Browser:
    def __init__(self, program, profile):
        command, self.to = os.pipe()
        self.back, answer = os.pipe()
        # The browser reads from descriptor 3 and writes to descriptor 4.
        self.process = subprocess.Popen(
            [
                "bash", "-c", f'exec "$@" 3<&{command} 4>&{answer}', "bash", program, "--headless=new", "--no-sandbox",
                "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run", "--disable-background-networking",
                "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
            ],
            pass_fds=(command, answer), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            # A group of its own: its helpers end with it.
            start_new_session=True,
        )
        os.close(command)
        os.close(answer)
        self.number, self.rest, self.session = 0, b"", None
        self.said, self.asked, self.statuses = [], set(), []

    def end(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def message(self, seconds):
        """The next one, or None."""
        until = time.monotonic() + seconds
        while b"\0" not in self.rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.back], [], [], left)[0]:
                return None
            part = os.read(self.back, 1 << 16)
            if not part:
                raise Failure("the browser has ended")
            self.rest += part
        one, self.rest = self.rest.split(b"\0", 1)
        return json.loads(one)

    def heard(self, message):
        name, what = message.get("method"), message.get("params", {})
        if name == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.said.append(" ".join(str(one.get("value", one.get("description"))) for one in what["args"]))
        elif name == "Runtime.exceptionThrown":
            details = what["exceptionDetails"]
            self.said.append(details.get("exception", {}).get("description", details["text"]))
        elif name == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.said.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
        elif name == "Audits.issueAdded":
            self.said.append(json.dumps(what["issue"]))
        elif name == "Network.responseReceived" and what["response"]["url"].endswith("/status"):
            self.asked.add(what["requestId"])
        elif name == "Network.loadingFinished" and what["requestId"] in self.asked:
            self.statuses.append((what["requestId"], what["timestamp"]))

    def call(self, method, **params):
        self.number += 1
        number, message = self.number, {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 30
        while time.monotonic() < until:
            answer = self.message(1)
            if answer and answer.get("id") == number:
                if "error" in answer:
                    raise Failure(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if answer:
                self.heard(answer)
        raise Failure(f"{method}: no answer")

    def listen(self, seconds):
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            message = self.message(left)
            if message:
                self.heard(message)

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise Failure(f"{expression}: {result['exceptionDetails']['text']}")
        return result["result"].get("value")

    def open(self, address):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", **DESKTOP)
        self.call("Page.addScriptToEvaluateOnNewDocument", source=LOUD)
        self.call("Page.navigate", url=address)

    def body(self, request):
        return json.loads(self.call("Network.getResponseBody", requestId=request)["body"])

    def scheme(self, name):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, file):
        self.listen(0.3)
        height = self.value("document.documentElement.scrollHeight")
        width = self.value("window.innerWidth")
        shot = self.call(
            "Page.captureScreenshot", captureBeyondViewport=True,
            clip={"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
        )
        file.write_bytes(base64.b64decode(shot["data"]))


def expect(true, what):
    if not true:
        raise Failure(what)


def until(browser, seconds, what, true):
    end = time.monotonic() + seconds
    while not true():
        expect(time.monotonic() < end, f"not within {seconds} s: {what}; the verdict is {browser.value(FIGURES).get('verdict')!r}")
        browser.listen(0.25)


def number(text):
    return float(re.search(r"[\d.,]+", text)[0].replace(",", ""))


def near(shown, real, share=0.02, least=0.06):
    return abs(shown - real) <= max(least, share * abs(real))


def check_figures(browser):
    """The page's figures against the very answers of /status that it got."""
    seen = len(browser.statuses)
    until(browser, 10, "another answer of /status", lambda: len(browser.statuses) > seen)
    browser.listen(0.3)
    shown = browser.value(FIGURES)
    (_, before_at), (_, after_at) = browser.statuses[-2:]
    first, before, after = (browser.body(browser.statuses[at][0]) for at in (0, -2, -1))

    def lookups(status):
        tiers = status["cache"]["lookups"]
        served = sum(tiers[tier][outcome] for tier in ("memory", "redis") for outcome in ("fresh", "stale", "negative"))
        return served, sum(tiers["memory"].values())

    def requests(status):
        return sum(sum(status["requests"][endpoint].values()) for endpoint in ("observe", "refer", "health"))

    def calls(status):
        return sum(status["upstream"].values())

    (served, asked), (served_first, asked_first) = lookups(after), lookups(first)
    ratio = 100 * (served - served_first) / (asked - asked_first)
    expect(near(number(shown["hit"]), ratio), f"hit ratio: shows {shown['hit']}, is {ratio:.1f} %")
    for figure, count in (("rate", requests), ("calls", calls)):
        real = (count(after) - count(before)) / (after_at - before_at)
        expect(real > 0, f"{figure}: there is none")
        expect(near(number(shown[figure]), real, share=0.1), f"{figure}: shows {shown[figure]}, is {real:.2f}")
    expect(re.fullmatch(r"(< )?[\d.]+ m?s", shown["p95"]), f"p95: shows {shown['p95']}")
    expect(after["redis"] == {**after["redis"], "configured": True, "up": True}, "Redis is up, /status does not say so")
    expect(re.search(r"Redis\s+answers", shown["parts"]), f"parts: {shown['parts']!r}")
    expect(after["version"] in shown["version"], f"version: shows {shown['version']}")
    expect(shown["verdict"] == "all parts work", f"verdict: {shown['verdict']}")
    refreshed = number(re.search(r"Refreshed[^\d]*([\d.,]+)", shown["prefetch"])[1])
    expect(refreshed == after["prefetch"]["refreshed"], f"refreshed: shows {refreshed}, is {after['prefetch']['refreshed']}")


def check_schemes(browser):
    grounds = {}
    for name in ("light", "dark"):
        browser.scheme(name)
        browser.listen(0.2)
        red, green, blue = map(int, re.findall(r"\d+", browser.value("getComputedStyle(document.body).backgroundColor"))[:3])
        grounds[name] = (red + green + blue) / 3
        for text, contrast in browser.value(FAINT):
            expect(contrast >= CONTRAST, f"{name}: {text!r} has a contrast of {contrast:.2f}")
    expect(grounds["light"] > 200 and grounds["dark"] < 60, f"grounds of the colour schemes: {grounds}")


def check_phone(browser):
    browser.call("Emulation.setDeviceMetricsOverride", **PHONE)
    browser.listen(0.3)
    width = browser.value("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
    inner = browser.value("window.innerWidth")
    expect(inner == PHONE["width"] and width <= inner, f"on a phone the page is {width} wide of {inner}")
    over = browser.value(OVER)
    expect(not over, f"on a phone these reach beyond their card or the page: {over}")
    browser.call("Emulation.setDeviceMetricsOverride", **DESKTOP)


def check_quiet(browser):
    violations = browser.value("window.violations")
    expect(not violations, f"violations of the content security policy: {violations}")
    expect(not browser.said, f"on the console: {browser.said}")


def pictures(browser, folder):
    # Full enough charts to see what they are.
    browser.listen(130)
    for name in ("light", "dark"):
        browser.scheme(name)
        browser.picture(folder / f"status-{name}.png")
    browser.scheme("light")
    browser.call("Emulation.setDeviceMetricsOverride", **PHONE)
    browser.picture(folder / "status-phone.png")
    browser.call("Emulation.setDeviceMetricsOverride", **DESKTOP)
    for name in ("light", "dark", "phone"):
        size = (folder / f"status-{name}.png").stat().st_size
        expect(size < 200_000, f"status-{name}.png has {size} bytes")


def check(browser, given):
    with urllib.request.urlopen(given.page, timeout=5) as answer:
        policy = answer.headers["content-security-policy"] or ""
    expect("default-src 'none'" in policy and "unsafe" not in policy, f"the content security policy is {policy!r}")
    browser.open(given.page)

    def verdict():
        return browser.value("document.getElementById('verdict')?.innerText.trim()")

    until(browser, 15, "a first verdict", lambda: verdict() == "all parts work")
    until(browser, 20, "charts of four points", lambda: min(browser.value(POINTS).values(), default=0) >= 4)
    check_figures(browser)
    check_schemes(browser)
    check_phone(browser)
    check_quiet(browser)
    if given.pictures:
        pictures(browser, Path(given.pictures))
        check_quiet(browser)
    os.kill(given.redis_pid, signal.SIGTERM)
    until(browser, 15, "that Redis is gone", lambda: "Redis does not answer" in verdict())
    expect(re.search(r"Redis\s+does not answer", browser.value(FIGURES)["parts"]), "the parts do not say that Redis is gone")
    check_schemes(browser)
    check_quiet(browser)
    # One that accepts connections and says nothing.
    os.kill(given.relay_pid, signal.SIGSTOP)
    until(browser, 15, "that the relay hangs", lambda: "the relay does not answer" in verdict())
    os.kill(given.relay_pid, signal.SIGCONT)
    until(browser, 15, "that the relay is back", lambda: "Redis does not answer" in verdict())
    check_quiet(browser)
    os.kill(given.relay_pid, signal.SIGTERM)
    until(browser, 30, "that the relay is gone", lambda: "the relay does not answer" in verdict())
    check_schemes(browser)
    # A failed request stands on the console from here on, which is the browser's doing.
    expect(not browser.value("window.violations"), "violations of the content security policy")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("page", help="the URL of the status page")
    arguments.add_argument("--browser", required=True)
    arguments.add_argument("--work", required=True, type=Path, help="a directory for the browser")
    arguments.add_argument("--redis-pid", required=True, type=int, help="the Redis that is ended on the way")
    arguments.add_argument("--relay-pid", required=True, type=int, help="the relay that is ended on the way")
    arguments.add_argument("--pictures", metavar="FOLDER", help="where to put pictures")
    given = arguments.parse_args()
    browser = Browser(given.browser, given.work / "browser")
    try:
        check(browser, given)
    except Failure as failure:
        print(f"status page: {failure}", file=sys.stderr)
        return 1
    finally:
        browser.end()
    print("the status page does what it should")
    return 0


if __name__ == "__main__":
    # So that the browser ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
