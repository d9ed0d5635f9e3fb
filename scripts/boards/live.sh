#!/usr/bin/env bash
# Proves that every panel and variable of the boards gets data from relays that really run, and that no alert is raised for nothing:
# two relays on one Redis, a fake CyberScan, traffic, and a Prometheus with the rules and alerts. Two minutes; ends all it started.
#
#   scripts/boards/live.sh [--seconds 75] [--rate 12] [--fresh 20s] [--budget 0.5] [--interval 1] [--save FILE] [RELAY-PROGRAM]
#
# --seconds: how long there is traffic before the boards are asked; --rate: requests per second to each relay; --fresh, --budget: how
# long answers are fresh, and the worker's budget; --interval: seconds between scrapes, several of which are needed before there is a
# rate. --save keeps the answers for pictures (render/render.mjs). Those in docs/ are from
# `--seconds 360 --rate 20 --fresh 60s --budget 0.15 --interval 5`.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/playground.bash

seconds=75 rate=12 fresh=20s budget=0.5 interval=1 save=() program=
while [ $# -gt 0 ]; do
    case $1 in
    --seconds) seconds=$2 && shift 2 ;;
    --rate) rate=$2 && shift 2 ;;
    --fresh) fresh=$2 && shift 2 ;;
    --budget) budget=$2 && shift 2 ;;
    --interval) interval=$2 && shift 2 ;;
    --save) save=(--save "$(realpath "$2")") && shift 2 ;;
    -*) fail "unknown option $1" ;;
    *) program=$1 && shift ;;
    esac
done

scripts/need.sh prometheus prometheus
playground "$program" 6
redis=${ports[0]} prometheus=http://127.0.0.1:${ports[5]}
audience=http://127.0.0.1:${ports[1]}
start_redis "$redis"
start_sandbox "$audience"

# Lives so short that within the time given answers end, are served old, are renewed and are fetched ahead. Quotas that are used but
# not used up: a window that is new grows from a hundredth, and until it has outgrown the reserve nothing is fetched ahead. So none of
# an hour or a day, and a small reserve.
settings=(
    RELAY_REDIS_URL="redis://127.0.0.1:$redis/0"
    RELAY_REDIS_ENCRYPTION_KEY="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
    RELAY_CACHE_FRESH="$fresh"
    RELAY_CACHE_STALE_WHILE_REVALIDATE="$fresh"
    RELAY_CACHE_STALE_IF_ERROR=5m
    RELAY_CACHE_NEGATIVE=10s
    "RELAY_LIMITER_TENANT=120/s,6000/m"
    RELAY_LIMITER_FLEET=200/s
    RELAY_LIMITER_RESERVE=0.2
    RELAY_WORKER_BUDGET="$budget"
)
start_relay relay-1 "${ports[1]}" "${ports[3]}" "$audience" "${settings[@]}"
start_relay relay-2 "${ports[2]}" "${ports[4]}" "$audience" "${settings[@]}"

mkdir "$work/prometheus"
cp deploy/prometheus/rules.yml deploy/prometheus/alerts.yml "$work/prometheus"
cat >"$work/prometheus/prometheus.yml" <<YAML
global: {scrape_interval: ${interval}s, scrape_timeout: ${interval}s, evaluation_interval: ${interval}s}
rule_files: [rules.yml, alerts.yml]
scrape_configs:
  - job_name: cyberscan-relay
    static_configs:
      - targets: ["127.0.0.1:${ports[3]}"]
        labels: {instance: relay-1}
      - targets: ["127.0.0.1:${ports[4]}"]
        labels: {instance: relay-2}
YAML
launch prometheus prometheus --config.file="$work/prometheus/prometheus.yml" --storage.tsdb.path="$work/prometheus/data" \
    --web.listen-address="${prometheus#http://}"
# What happens once, such as the fetch of the access token, only counts if it was seen at nothing before.
scraped_twice() {
    curl -fsS --get "$prometheus/api/v1/query" --data-urlencode 'query=min(count_over_time(relay_ready[1m])) > 1' | grep -q '"value"'
}
wait_for 30 "a scrape" scraped_twice

start_traffic traffic-1 "${ports[1]}" "$rate"
start_traffic traffic-2 "${ports[2]}" "$rate"
token=$(cat "$work/token")
until=$((SECONDS + seconds))
while [ "$SECONDS" -lt "$until" ]; do
    for name in "${!pid[@]}"; do
        kill -0 "${pid[$name]}" 2>/dev/null || fail "$name has ended"
    done
    # Analysts' platforms ask these beside; traffic does not.
    curl -sS -o "$work/health.json" -X POST "$audience/health" -H "Authorization: Bearer $token"
    curl -sS -o /dev/null -X POST "$audience/version"
    sleep 1
done
grep -q '"status":"ok"' "$work/health.json" || fail "/health says $(cat "$work/health.json")"

python3 -B scripts/boards/live.py "$prometheus" --interval "$interval" --minutes "$(python3 -c "print($seconds / 60)")" \
    --alerts "${save[@]}"
