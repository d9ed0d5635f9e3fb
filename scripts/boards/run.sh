#!/bin/sh
# Proves boards, rules and alerts without a relay and without a Grafana: the boards against Grafana's own types, the rules for
# boards, every expression, every alert. With relays that really run: scripts/boards/live.sh.
set -eu
cd "$(dirname "$0")/../.."

scripts/need.sh promtool prometheus
tools="$(scripts/need-python.sh boards scripts/boards/schema/requirements.txt)"

"$tools/bin/python" -B scripts/boards/schema/check.py
python3 -B scripts/boards/check.py
promtool check config deploy/prometheus/prometheus.yml
promtool check rules deploy/prometheus/rules.yml deploy/prometheus/alerts.yml
promtool test rules deploy/prometheus/tests/*.yml
