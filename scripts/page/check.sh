#!/usr/bin/env bash
# Proves the status page in a real browser, against a relay with Redis and traffic: nothing on the console, figures that are those of
# /status, charts, both colour schemes, contrast, a phone, and what it says when Redis and then the relay are gone. Less than a minute.
#
#   scripts/page/check.sh [--pictures] [RELAY-PROGRAM]
#
# --pictures: writes docs/status-light.png, docs/status-dark.png and docs/status-phone.png; takes two minutes longer, for full charts.
# Needs Python 3 and a Chromium, which is installed by apt-get where there is none; or CHROMIUM=path.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/playground.bash

pictures=() program=
while [ $# -gt 0 ]; do
    case $1 in
    --pictures) pictures=(--pictures docs) && shift ;;
    -*) fail "unknown option $1" ;;
    *) program=$1 && shift ;;
    esac
done

browser=${CHROMIUM:-}
for name in chromium chromium-browser google-chrome; do
    [ -n "$browser" ] || browser=$(command -v "$name" || true)
done
if [ -z "$browser" ]; then
    scripts/need.sh chromium chromium
    browser=chromium
fi

playground "$program" 3
audience=http://127.0.0.1:${ports[1]}
start_redis "${ports[0]}"
start_sandbox "$audience"
# Lives so short that every state of the cache is seen soon.
start_relay relay "${ports[1]}" "${ports[2]}" "$audience" RELAY_REDIS_URL="redis://127.0.0.1:${ports[0]}/0" \
    RELAY_CACHE_FRESH=10s RELAY_CACHE_STALE_WHILE_REVALIDATE=20s RELAY_CACHE_NEGATIVE=10s RELAY_WORKER_BUDGET=0.5 \
    RELAY_LIMITER_TENANT=120/s,6000/m RELAY_LIMITER_RESERVE=0.2
start_traffic traffic "${ports[1]}" 20

python3 -B scripts/page/check.py "http://127.0.0.1:${ports[2]}" --browser "$browser" --work "$work" \
    --redis-pid "${pid[redis]}" --relay-pid "${pid[relay]}" "${pictures[@]}"
