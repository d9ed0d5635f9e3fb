# Sourced by scripts that need relays that really run: Redis, the sandbox, relays and traffic on free ports of this machine.
# It owns what it starts and ends all of it, by pid, however the script ends; it must not know what it is good for.
#
#   playground RELAY-BINARY-OR-NOTHING PORTS   $relay is the program, $work a directory, $ports the free ports
#   launch NAME COMMAND...                     starts it; its output is in $work/NAME.log, its pid in ${pid[NAME]}
#   end NAME                                   ends it
#   wait_for SECONDS WHAT COMMAND...           until COMMAND succeeds
#   start_redis, start_sandbox, start_relay, start_traffic

declare -A pid=()
order=()
work=
relay=
ports=()

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

end() {
    local of=${pid[$1]:-} tries=0
    [ -n "$of" ] || return 0
    unset "pid[$1]"
    kill "$of" 2>/dev/null || return 0
    # What is stopped does not hear it otherwise.
    kill -CONT "$of" 2>/dev/null || true
    while kill -0 "$of" 2>/dev/null; do
        if [ $((tries += 1)) -gt 100 ]; then
            kill -KILL "$of" 2>/dev/null || true
        fi
        sleep 0.05
    done
    wait "$of" 2>/dev/null || true
}

end_all() {
    local status=$? at
    trap '' INT TERM
    # The last first: traffic before relays, relays before what they rely on.
    for ((at = ${#order[@]} - 1; at >= 0; at--)); do
        end "${order[at]}"
    done
    if [ -n "$work" ]; then
        # Who has to find out why it failed wants the logs.
        if [ "$status" != 0 ]; then
            tail -n 15 "$work"/*.log >&2 || true
        fi
        rm -rf "$work"
    fi
    exit "$status"
}

playground() {
    local target
    relay=$1
    if [ -z "$relay" ]; then
        target=${CARGO_TARGET_DIR:-target}
        relay=$target/debug/cyberscan-relay
        [ -x "$relay" ] || cargo build --locked || fail "the relay cannot be built"
    fi
    [ -x "$relay" ] || fail "$relay is no program"
    relay=$(realpath "$relay")
    work=$(mktemp -d)
    trap end_all EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # All at once, so that none is given twice.
    # shellcheck disable=SC2034  # for who sources this
    read -r -a ports < <(python3 - "$2" <<'PYTHON'
import socket, sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(one.getsockname()[1] for one in sockets))
PYTHON
    )
}

launch() {
    local name=$1
    shift
    "$@" >"$work/$name.log" 2>&1 </dev/null &
    pid[$name]=$!
    order+=("$name")
}

wait_for() {
    local until=$((SECONDS + $1)) what=$2 name
    shift 2
    until "$@" >/dev/null 2>&1; do
        for name in "${!pid[@]}"; do
            kill -0 "${pid[$name]}" 2>/dev/null || fail "$name has ended"
        done
        [ "$SECONDS" -lt "$until" ] || fail "$what: not within the time given"
        sleep 0.2
    done
}

# start_redis PORT
start_redis() {
    "$(dirname "${BASH_SOURCE[0]}")/need-redis.sh" || fail "there is no redis-server"
    launch redis redis-server --port "$1" --bind 127.0.0.1 --save '' --appendonly no --dir "$work" \
        --maxmemory 64mb --maxmemory-policy volatile-lfu
    wait_for 10 "Redis" redis-cli -p "$1" ping
}

# start_sandbox AUDIENCE
start_sandbox() {
    local port
    for port in 8443 8444; do
        if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            fail "port $port is taken: the sandbox needs 8443 and 8444, end what listens there"
        fi
    done
    launch sandbox env -i PATH="$PATH" "$relay" sandbox --listen 127.0.0.1 --name localhost --directory "$work" --audience "$1"
    wait_for 20 "the sandbox" test -s "$work/token"
}

# start_relay NAME PORT ADMIN-PORT AUDIENCE [SETTING=VALUE...]; without those of the environment
start_relay() {
    local name=$1 port=$2 admin=$3 audience=$4
    shift 4
    launch "$name" env -i PATH="$PATH" \
        RELAY_LISTEN="127.0.0.1:$port" RELAY_ADMIN_LISTEN="127.0.0.1:$admin" RELAY_AUTH_AUDIENCES="$audience" \
        RELAY_AUTH_JWKS_HOSTS=localhost:8444 RELAY_CYBERSCAN_HOSTS=localhost:8443 \
        RELAY_EGRESS_ALLOW_CIDRS=127.0.0.0/8,::1/128 RELAY_EGRESS_EXTRA_CA_FILE="$work/ca.pem" RELAY_LOG_LEVEL=warn \
        "$@" "$relay" serve
    wait_for 20 "$name" curl -fsS "http://127.0.0.1:$admin/readyz"
}

# start_traffic NAME PORT RATE
start_traffic() {
    launch "$1" env -i PATH="$PATH" "$relay" traffic --relay "http://127.0.0.1:$2" --directory "$work" --rate "$3"
}
