#!/bin/sh
# The rules and alerts of deploy/prometheus as a PrometheusRule, for the Prometheus operator. With --check, says whether
# the file is what would be written.
set -eu
cd "$(dirname "$0")/../.."
target=deploy/kubernetes/components/prometheus-operator/prometheusrule.yaml

generate() {
    cat <<'HEAD'
# Generated from deploy/prometheus by scripts/deploy/prometheus-rule.sh: change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: cyberscan-relay
  labels:
    app.kubernetes.io/name: cyberscan-relay
spec:
  groups:
HEAD
    for file in rules alerts; do
        # What stands below `groups:`, two columns further in.
        sed -e '1,/^groups:/d' -e 's/^./  &/' "deploy/prometheus/$file.yml"
    done
}

if [ "${1:-}" = --check ]; then
    generate | cmp -s - "$target" || {
        echo "prometheus-rule: $target is not what deploy/prometheus says; run scripts/deploy/prometheus-rule.sh" >&2
        exit 1
    }
else
    generate >"$target"
fi
