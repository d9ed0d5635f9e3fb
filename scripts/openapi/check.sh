#!/bin/sh
# Checks docs/openapi.yaml and docs/openapi-admin.yaml: against each other and the source, then against a live relay with a
# fake CyberScan and a fake key issuer. About half a minute; the tools are installed on first use, into target/tools/openapi.
#
#   scripts/openapi/check.sh [BINARY]      BINARY is target/debug/cyberscan-relay unless told
#   EXAMPLES=200 SEED=7 scripts/openapi/check.sh      more requests of each kind; others than those of every day
set -eu
cd "$(dirname "$0")/../.."
target="${CARGO_TARGET_DIR:-target}"
binary="${1:-$target/debug/cyberscan-relay}"
examples="${EXAMPLES:-40}"
seed="${SEED:-1}"
work="$(mktemp -d)"
sandbox=
relay=
# Ends what was started here and nothing else, however this script ends.
end() {
    for process in $relay $sandbox; do
        kill -TERM "$process" 2>/dev/null || continue
        for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
            kill -0 "$process" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
    relay=
    sandbox=
}
trap 'end; rm -rf "$work"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
die() {
    echo "openapi: $1" >&2
    exit 1
}

tools="$(scripts/need-python.sh openapi scripts/openapi/requirements.txt)"
export PYTHONDONTWRITEBYTECODE=1
python="$tools/bin/python"

failed=0
"$python" scripts/openapi/document.py || failed=1

[ -x "$binary" ] || die "$binary is not there; build it with: cargo build"
taken() { "$python" -c 'import socket, sys; sys.exit(socket.socket().connect_ex(("127.0.0.1", int(sys.argv[1]))) != 0)' "$1"; }
for port in 8443 8444; do
    if taken "$port"; then
        die "port $port of 127.0.0.1 is taken. The sandbox needs 8443 and 8444; perhaps a demo or another check runs"
    fi
done
# Two ports that are free now.
ports="$("$python" -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for each in sockets:
    each.bind(("127.0.0.1", 0))
print(*(each.getsockname()[1] for each in sockets))')"
listen="127.0.0.1:${ports% *}"
admin="127.0.0.1:${ports#* }"
admin_token=openapi-check

# The settings of this shell's environment are not those of the check.
env -i "PATH=$PATH" "$binary" sandbox --listen 127.0.0.1 --name localhost --directory "$work" --audience "http://$listen" >"$work/sandbox.log" 2>&1 &
sandbox=$!
# until_there NAME PROCESS LOG COMMAND...: for at most 20 seconds.
until_there() {
    name="$1" process="$2" log="$3" tries=200
    shift 3
    until "$@" 2>/dev/null; do
        tries=$((tries - 1))
        if [ $tries = 0 ] || ! kill -0 "$process" 2>/dev/null; then
            cat "$log" >&2
            die "$name did not start"
        fi
        sleep 0.1
    done
}
until_there "the sandbox" "$sandbox" "$work/sandbox.log" test -s "$work/token" -a -s "$work/ca.pem"
env -i "PATH=$PATH" RELAY_LISTEN="$listen" RELAY_ADMIN_LISTEN="$admin" RELAY_ADMIN_TOKEN="$admin_token" \
    RELAY_AUTH_AUDIENCES="http://$listen" RELAY_AUTH_JWKS_HOSTS=localhost:8444 RELAY_CYBERSCAN_HOSTS=localhost:8443 \
    RELAY_EGRESS_ALLOW_CIDRS=127.0.0.0/8,::1/128 RELAY_EGRESS_EXTRA_CA_FILE="$work/ca.pem" RELAY_SERVER_SHUTDOWN_DELAY=2s \
    RELAY_LIMITER_TENANT=100000/m,1000000/h,9000000/d RELAY_LIMITER_FLEET=1000000/h \
    "$binary" serve >"$work/relay.log" 2>&1 &
relay=$!
until_there "the relay" "$relay" "$work/relay.log" "$python" -c "import urllib.request; urllib.request.urlopen('http://$admin/readyz', timeout=1)"

"$python" scripts/openapi/live.py "$listen" "$admin" "$work/token" "$admin_token" || failed=1

RELAY_TOKEN="$(cat "$work/token")"
export RELAY_TOKEN ADMIN_TOKEN="$admin_token" RELAY_SEEN="$work/seen" SCHEMATHESIS_HOOKS=hooks PYTHONPATH="$PWD/scripts/openapi"
# What a relay route makes of a bad request is said with status 200: hooks.py judges that.
checks=negative_data_rejection,positive_data_acceptance,missing_required_header,ignored_auth,object_level_authorization
checks=$checks,use_after_free,ensure_resource_availability
schemathesis="$(cd "$tools/bin" && pwd)/schemathesis"
documents="$PWD/docs"
# generated SENTENCE DOCUMENT ADDRESS OPTION...
generated() {
    sentence="$1" document="$2" address="$3"
    shift 3
    : >"$RELAY_SEEN"
    if (cd "$work" && "$schemathesis" run "$documents/$document" \
        --url "http://$address" --checks all --phases examples,coverage,fuzzing --max-examples "$examples" --seed "$seed" \
        --request-timeout 25 --generation-database none --no-color --warnings off --suppress-health-check all "$@") >"$work/generated" 2>&1; then
        echo "ok       $sentence: $(grep -o '[0-9]* generated.*' "$work/generated" | tail -1), met: $(sort "$RELAY_SEEN" | uniq -c | awk '{ printf "%s%s %s", sep, $1, $2; sep = ", " }')"
    else
        cat "$work/generated"
        echo "FAILED   $sentence"
        failed=1
    fi
}
# met KIND...: without these, the run above has proved little.
met() {
    for kind in "$@"; do
        grep -qx "$kind" "$RELAY_SEEN" || { echo "FAILED   $sentence: no answer of the kind '$kind' was met"; failed=1; }
    done
}
generated "generated requests, authorized" openapi.yaml "$listen" --exclude-checks "$checks" -H "Authorization: Bearer $RELAY_TOKEN"
met found nothing invalid health
generated "generated requests, not authorized" openapi.yaml "$listen" --exclude-checks "$checks"
met unauthorized
generated "generated requests to the admin listener, authorized" openapi-admin.yaml "$admin" \
    --exclude-checks "$checks" -H "Authorization: Bearer $admin_token"
met purged refused
generated "generated requests to the admin listener, not authorized" openapi-admin.yaml "$admin" --exclude-checks "$checks"
met unauthorized

if grep -q '"panic"\|panicked' "$work/relay.log"; then
    grep '"panic"\|panicked' "$work/relay.log" | head -3
    echo "FAILED   the relay panicked"
    failed=1
fi
kill -0 "$relay" 2>/dev/null || { echo "FAILED   the relay ended"; failed=1; }
kill -TERM "$relay" 2>/dev/null || true
sleep 0.5
"$python" scripts/openapi/live.py draining "$admin" || failed=1
if [ "$failed" != 0 ]; then
    echo "openapi: relay and documents differ" >&2
    exit 1
fi
echo "openapi: relay and documents agree"
