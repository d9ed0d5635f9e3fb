#!/bin/sh
# Proves boards, rules and alerts without a relay: the rules for boards, every expression, every alert.
# With a Prometheus that scrapes a live one: scripts/boards/live.py URL.
set -eu
cd "$(dirname "$0")/../.."

if ! command -v promtool >/dev/null; then
    # Only promtool is wanted. On a machine with a service manager the package would also start a server.
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        if [ ! -e /usr/sbin/policy-rc.d ]; then
            printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
            chmod +x /usr/sbin/policy-rc.d
            trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        fi
        apt-get update -q >/dev/null
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends prometheus >/dev/null
    else
        echo "promtool is missing: apt-get install prometheus, or take it from a Prometheus release" >&2
        exit 1
    fi
fi

python3 -B scripts/boards/check.py
promtool check config deploy/prometheus/prometheus.yml
promtool check rules deploy/prometheus/rules.yml deploy/prometheus/alerts.yml
promtool test rules deploy/prometheus/tests/*.yml
