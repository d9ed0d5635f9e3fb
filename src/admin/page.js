// Asks /status every two seconds and shows what changed in between.
"use strict";

const POINTS = 90;
const PERIOD = 2000;
const history = { hit: [], rate: [], p95: [], calls: [] };
let first = null;
let last = null;

const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
const put = (id, text) => { document.getElementById(id).textContent = text; };
const percent = (share) => share === null ? "–" : (100 * share).toFixed(share > 0.995 && share < 1 ? 2 : 1) + " %";
const whole = (number) => Math.round(number).toLocaleString("en");
const brief = (number) => number >= 100 ? whole(number) : number.toFixed(number >= 10 ? 1 : 2);

function seconds(value) {
  if (value === null) return "–";
  if (value < 0.001) return "< 1 ms";
  return value < 1 ? (1000 * value).toFixed(value < 0.01 ? 1 : 0) + " ms" : value.toFixed(1) + " s";
}

function bytes(count) {
  return count < 1 << 20 ? Math.round(count / 1024) + " KiB" : (count / (1 << 20)).toFixed(1) + " MiB";
}

// Look-ups: memory sees all of them; what it does not have goes to Redis, then to CyberScan.
function lookups(status) {
  const { memory, redis, upstream } = status.cache.lookups;
  const served = (tier) => tier.fresh + tier.stale + tier.negative;
  return { all: sum(memory), memory: served(memory), redis: served(redis), upstream: sum(upstream) };
}

function buckets(status) {
  const all = new Map();
  for (const endpoint of ["observe", "refer"]) {
    for (const [bound, count] of status.latency[endpoint].buckets) all.set(bound, (all.get(bound) || 0) + count);
  }
  return [...all];
}

// The bound below which `share` of the answers between two states came, interpolated within its bucket.
function quantile(before, after, share) {
  const counts = after.map(([bound, count], at) => [bound, count - (before ? before[at][1] : 0)]);
  const total = counts.length ? counts[counts.length - 1][1] : 0;
  if (!total) return null;
  let [low, below] = [0, 0];
  for (const [bound, count] of counts) {
    if (count >= share * total) {
      if (bound === null) return low;
      return low + (bound - low) * (share * total - below) / Math.max(count - below, 1);
    }
    [low, below] = [bound, count];
  }
  return low;
}

function list(id, rows) {
  const target = document.getElementById(id);
  target.replaceChildren(...rows.flatMap(([name, value, mood]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = name;
    dd.textContent = value;
    if (mood) dd.className = mood;
    return [dt, dd];
  }));
}

function draw(id, values, top) {
  const chart = document.getElementById(id);
  const known = values.map((value) => value === null ? 0 : value);
  const most = top || Math.max(...known, 1e-9);
  const points = known.map((value, at) => {
    const x = 100 * (POINTS - known.length + at) / (POINTS - 1);
    return x.toFixed(2) + "," + (30 - 28 * Math.min(value / most, 1)).toFixed(2);
  });
  chart.setAttribute("viewBox", "0 0 100 30");
  chart.setAttribute("preserveAspectRatio", "none");
  const shape = (name, list) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    element.setAttribute("points", list.join(" "));
    return element;
  };
  const start = points.length ? points[0].split(",")[0] : 0;
  chart.replaceChildren(shape("polygon", [start + ",30", ...points, "100,30"]), shape("polyline", points));
}

function note(name, value) {
  history[name].push(value);
  if (history[name].length > POINTS) history[name].shift();
}

function verdict(status) {
  const troubles = [];
  if (!status.ready) troubles.push(["bad", "draining: no new requests"]);
  if (status.breakers.open + status.breakers.half_open > 0) troubles.push(["bad", "a CyberScan host is left alone"]);
  if (status.redis.configured && !status.redis.up) troubles.push(["warn", "Redis does not answer: memory only"]);
  if (status.jwks.age > 1800) troubles.push(["warn", "keys of a token issuer cannot be renewed"]);
  const fullest = Math.max(...Object.values(status.limiter.used).flatMap(Object.values));
  if (fullest >= 0.9) troubles.push(["warn", "a quota is nearly used up"]);
  const element = document.getElementById("verdict");
  element.className = troubles.length ? troubles.some(([mood]) => mood === "bad") ? "bad" : "warn" : "good";
  element.textContent = troubles.length ? troubles.map(([, text]) => text).join("; ") : "all parts work";
}

function show(status, at) {
  const [now, since] = [lookups(status), lookups(first.status)];
  put("version", status.version + (status.revision === "unknown" ? "" : " · " + status.revision.slice(0, 12)));
  verdict(status);
  if (last) {
    const span = (at - last.at) / 1000;
    const before = lookups(last.status);
    const asked = now.all - before.all;
    const requests = (state) => sum(state.requests.observe) + sum(state.requests.refer) + sum(state.requests.health);
    const rate = (requests(status) - requests(last.status)) / span;
    const calls = (sum(status.upstream) - sum(last.status.upstream)) / span;
    note("hit", asked > 0 ? (now.memory + now.redis - before.memory - before.redis) / asked : null);
    note("rate", rate);
    note("calls", calls);
    note("p95", quantile(buckets(last.status), buckets(status), 0.95));
    put("rate", brief(rate));
    put("rate-note", status.in_flight + " under way, " + status.connections + " connections");
    put("calls", brief(calls));
  }
  const asked = now.all - since.all;
  const share = (part) => asked > 0 ? (now[part] - since[part]) / asked : null;
  put("hit", percent(asked > 0 ? share("memory") + share("redis") : null));
  put("hit-note", asked > 0 ? percent(share("memory")) + " memory, " + percent(share("redis")) + " Redis" : "no look-ups yet");
  const from = at === first.at ? null : buckets(first.status);
  put("p95", seconds(quantile(from, buckets(status), 0.95)));
  put("p95-note", "median " + seconds(quantile(from, buckets(status), 0.5)) + ", 99th " + seconds(quantile(from, buckets(status), 0.99)));
  put("calls-note", whole(Math.max(asked - (sum(status.upstream) - sum(first.status.upstream)), 0)) + " calls saved");
  draw("hit-chart", history.hit, 1);
  draw("rate-chart", history.rate);
  draw("p95-chart", history.p95);
  draw("calls-chart", history.calls);

  const { breakers, redis, jwks, cache } = status;
  const resting = breakers.open + breakers.half_open;
  list("parts", [
    ["Requests", status.ready ? "taken" : "draining", status.ready ? "good" : "bad"],
    ["CyberScan hosts", resting ? resting + " left alone" : breakers.closed ? breakers.closed + " asked" : "none yet", resting ? "bad" : "good"],
    ["Redis", redis.configured ? redis.up ? "answers" : "does not answer" : "not used", redis.configured && !redis.up ? "warn" : "good"],
    ["Issuers' keys", jwks.age ? "renewed " + seconds(jwks.age) + " ago" : "none in use", jwks.age > 1800 ? "warn" : "good"],
    ["Memory", bytes(cache.bytes) + " of " + bytes(cache.capacity) + ", " + whole(cache.entries) + " answers"],
  ]);
  const quotas = Object.entries(status.limiter.used).flatMap(([scope, windows]) =>
    Object.entries(windows).filter(([, used]) => used > 0).map(([window, used]) => [
      (scope === "fleet" ? "All tenants" : "Fullest tenant") + ", " + window, percent(used),
      used >= 0.9 ? "warn" : "",
    ]));
  list("quota", quotas.length ? quotas : [["Nothing used, or no quota set", ""]]);
  list("tiers", ["memory", "redis", "upstream"].flatMap((tier) => {
    const counts = cache.lookups[tier];
    const name = { memory: "Memory", redis: "Redis", upstream: "CyberScan" }[tier];
    return [[name, ["fresh", "stale", "negative", "miss", "error"].filter((outcome) => counts[outcome])
      .map((outcome) => whole(counts[outcome]) + " " + outcome).join(", ") || "–"]];
  }));
  const { useful, wasted, refreshed } = status.prefetch;
  list("prefetch", [
    ["Refreshed since start", whole(refreshed)], ["Served afterwards", whole(useful)],
    ["Ended unused", whole(wasted)],
    ["Worth it", useful + wasted ? percent(useful / (useful + wasted)) : "–"],
  ]);
  const errors = Object.entries(status.errors).filter(([, count]) => count);
  list("errors", errors.length ? errors.map(([code, count]) => [code, whole(count)]) : [["None since start", ""]]);
}

async function step() {
  try {
    const answer = await fetch("/status", { cache: "no-store" });
    const status = await answer.json();
    const at = Date.now();
    if (!first) first = { status, at };
    show(status, at);
    last = { status, at };
  } catch {
    const element = document.getElementById("verdict");
    element.className = "bad";
    element.textContent = "the relay does not answer";
  }
  setTimeout(step, PERIOD);
}

step();
