// Asks /status every two seconds and shows what changed in between.
"use strict";

const POINTS = 90;
const PERIOD = 2000;
// A relay that accepts and does not answer is one that does not answer.
const PATIENCE = 5000;
let history;
// What /status has said during the last three minutes, with the time.
let states;

function forget() {
  history = { hit: [], rate: [], p95: [], calls: [] };
  states = [];
}

const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
const put = (id, text) => { document.getElementById(id).textContent = text; };
const percent = (share) => share === null ? "–" : (100 * share).toFixed(share > 0.995 && share < 1 ? 2 : 1) + " %";
const whole = (number) => Math.round(number).toLocaleString("en");
const count = (number) => number < 10000 ? whole(number)
  : number.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 });
const brief = (number) => number >= 100 ? whole(number) : number.toFixed(number >= 10 ? 1 : 2);

function seconds(value) {
  if (value === null) return "–";
  if (value < 0.001) return "< 1 ms";
  if (value < 1) return (1000 * value).toFixed(value < 0.01 ? 1 : 0) + " ms";
  return value < 60 ? value.toFixed(1) + " s" : Math.round(value / 60) + " min";
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

// A chart of the last three minutes, with what its height stands for.
function draw(name, say, top) {
  const chart = document.getElementById(name + "-chart");
  const values = history[name];
  const known = values.map((value) => value === null ? 0 : value);
  const highest = Math.max(...known, 0);
  const most = top || Math.max(highest, 1e-9);
  put(name + "-span", values.length ? "last " + Math.max(Math.round(values.length * PERIOD / 60000), 1) + " min" : "");
  put(name + "-top", values.length ? "highest " + say(highest) : "");
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
  const ground = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [name, value] of [["x1", 0], ["x2", 100], ["y1", 30], ["y2", 30]]) ground.setAttribute(name, value);
  chart.replaceChildren(ground, shape("polygon", [start + ",30", ...points, "100,30"]), shape("polyline", points));
}

function tiers(lookups) {
  const names = { memory: "Memory", redis: "Redis", upstream: "CyberScan" };
  document.getElementById("tiers").replaceChildren(...Object.entries(names).map(([tier, name]) => {
    const row = document.createElement("tr");
    const cells = ["fresh", "stale", "negative", "miss", "error"].map((outcome) => {
      const cell = document.createElement("td");
      // CyberScan's own answers are never old, and never only missing.
      cell.textContent = tier === "upstream" && (outcome === "stale" || outcome === "miss") ? "" : count(lookups[tier][outcome]);
      return cell;
    });
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head, ...cells);
    return row;
  }));
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
  const mood = troubles.length ? troubles.some(([mood]) => mood === "bad") ? "bad" : "warn" : "good";
  say(mood, troubles.length ? troubles.map(([, text]) => text).join("; ") : "all parts work");
}

function say(mood, text) {
  const element = document.getElementById("verdict");
  // Said anew only when it changes: a screen reader reads it out each time.
  if (element.textContent !== text) element.textContent = text;
  element.className = mood;
  document.title = (mood === "good" ? "" : "(!) ") + "cyberscan-relay";
}

function show(status, at) {
  const [first, last] = [states[0] || { status, at }, states[states.length - 1]];
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
  const from = buckets(first.status);
  put("p95", seconds(quantile(from, buckets(status), 0.95)));
  put("p95-note", "median " + seconds(quantile(from, buckets(status), 0.5)) + ", 99th " + seconds(quantile(from, buckets(status), 0.99)));
  put("calls-note", whole(Math.max(asked - (sum(status.upstream) - sum(first.status.upstream)), 0)) + " calls saved");
  draw("hit", percent, 1);
  draw("rate", brief);
  draw("p95", seconds);
  draw("calls", brief);

  const { breakers, redis, jwks, cache } = status;
  const resting = breakers.open + breakers.half_open;
  list("parts", [
    ["Requests", status.ready ? "taken" : "draining", status.ready ? "good" : "bad"],
    ["CyberScan hosts", resting ? resting + " left alone" : breakers.closed ? breakers.closed + " in use" : "none yet", resting ? "bad" : "good"],
    ["Redis", redis.configured ? redis.up ? "answers" : "does not answer" : "not used", redis.configured && !redis.up ? "warn" : "good"],
    ["Issuers' keys", jwks.age ? "renewed " + seconds(jwks.age) + " ago" : "none in use", jwks.age > 1800 ? "warn" : "good"],
    ["Answers in memory", whole(cache.entries)], ["They take", bytes(cache.bytes) + " of " + bytes(cache.capacity)],
  ]);
  const quotas = Object.entries(status.limiter.used).flatMap(([scope, windows]) =>
    Object.entries(windows).filter(([, used]) => used > 0).map(([window, used]) => [
      (scope === "fleet" ? "All tenants" : "Fullest tenant") + ", per " + window, percent(used),
      used >= 0.9 ? "warn" : "",
    ]));
  list("quota", quotas.length ? quotas : [["Nothing used, or no quota set", ""]]);
  tiers(cache.lookups);
  const { useful, wasted, refreshed } = status.prefetch;
  list("prefetch", [
    ["Refreshed", whole(refreshed)], ["Served afterwards", whole(useful)],
    ["Ended unused", whole(wasted)],
    ["Share served", useful + wasted ? percent(useful / (useful + wasted)) : "–"],
  ]);
  const errors = Object.entries(status.errors).filter(([, count]) => count);
  list("errors", errors.length ? errors.map(([code, count]) => [code, whole(count)]) : [["None", ""]]);
}

// Counters only rise: one that fell is that of another process.
function restarted(before, after) {
  return lookups(after).all < lookups(before).all || sum(after.upstream) < sum(before.upstream)
    || sum(after.requests.observe) < sum(before.requests.observe);
}

async function step() {
  try {
    const answer = await fetch("/status", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    const status = await answer.json();
    const at = Date.now();
    if (states.length && restarted(states[states.length - 1].status, status)) forget();
    show(status, at);
    states.push({ status, at });
    if (states.length > POINTS) states.shift();
  } catch {
    const last = states[states.length - 1];
    const of = last ? "; what is shown is of " + new Date(last.at).toLocaleTimeString("en", { hour12: false }) : "";
    say("bad", "the relay does not answer" + of);
  }
  setTimeout(step, PERIOD);
}

forget();
step();
