#!/bin/sh
# Brings the stack of docker-compose.yml up for real, demo included: health, metrics in Prometheus, what each process may
# do, what Redis refuses, a restart and a crash of each container. Takes everything down and away again.
#
#   tests/compose.sh                              # builds the image with the Dockerfile (minutes)
#   RELAY_BINARY=target/release/cyberscan-relay tests/compose.sh    # its last stage only, around this binary
#
# It uses the engine it finds (DOCKER_HOST). Without one, root on Debian gets one from the package docker.io for as long as
# this runs, on a socket of its own. Images that cannot be pulled are made from Debian's packages, under the same names and
# for as long as this runs; there is no Grafana among those, so then it is left out.
set -eu
cd "$(dirname "$0")/.."
work="$(mktemp -d /var/tmp/relay-compose.XXXXXX)"
project="relaytest$$"
engine=""
made=""
failed=0
passed=0

say() { printf '%s\n' "$*"; }
give_up() {
    say "compose: $*" >&2
    exit 1
}
pass() {
    passed=$((passed + 1))
    say "ok       $1"
}
fail() {
    failed=$((failed + 1))
    say "FAILED   $1" >&2
}
# check SENTENCE COMMAND...
check() {
    sentence="$1"
    shift
    if "$@" >"$work/out" 2>&1; then
        pass "$sentence"
    else
        fail "$sentence"
        tail -n 20 "$work/out" | sed 's/^/         /' >&2
    fi
}
# within SECONDS COMMAND...: until it succeeds.
within() {
    left="$1"
    shift
    until "$@"; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || return 1
        sleep 1
    done
}

clean_up() {
    status=$?
    trap - EXIT INT TERM
    set +e
    if [ -e "$work/project/docker-compose.yml" ]; then
        if [ "$failed" != 0 ] || [ "$status" != 0 ]; then compose logs --tail 40 >&2; fi
        compose down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1
    fi
    for image in $made; do docker image rm --force "$image" >/dev/null 2>&1; done
    if [ -n "$engine" ]; then
        kill "$engine" 2>/dev/null
        wait "$engine" 2>/dev/null
        # What it leaves mounted, the namespace of its default network among it.
        awk -v work="$work/" 'index($2, work) == 1 { print $2 }' /proc/mounts | sort -r | while read -r mounted; do
            umount "$mounted" 2>/dev/null
        done
    fi
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# --- An engine, and Compose ---

as_debian_root() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }
install() {
    as_debian_root || give_up "$1 is missing; install it (it is not installed by itself: that needs root on Debian)"
    # At runlevel 1 no package starts a service.
    { DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq install -y --no-install-recommends "$@" ||
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq install -y --no-install-recommends "$@"; }; } \
        >"$work/apt" 2>&1 || give_up "could not install $*: $(tail -n 1 "$work/apt")"
}
if ! docker info >/dev/null 2>&1; then
    for program in dockerd docker iptables; do
        command -v "$program" >/dev/null 2>&1 || { install docker.io iptables && break; }
    done
    [ "$(id -u)" = 0 ] || give_up "there is no container engine that answers; start one, or set DOCKER_HOST"
    mkdir "$work/engine"
    export DOCKER_HOST="unix://$work/docker.sock"
    dockerd --host "$DOCKER_HOST" --data-root "$work/engine" --exec-root "$work/exec" --pidfile "$work/docker.pid" \
        >"$work/dockerd.log" 2>&1 &
    engine=$!
    within 30 docker info >/dev/null 2>&1 || {
        tail -n 5 "$work/dockerd.log" >&2
        give_up "no container engine answers, and dockerd did not start"
    }
    say "started an engine for this run"
fi
if docker compose version >/dev/null 2>&1; then
    compose() { (cd "$work/project" && docker compose --project-name "$project" --profile demo "$@"); }
else
    command -v docker-compose >/dev/null 2>&1 || install docker-compose
    compose() { (cd "$work/project" && docker-compose --project-name "$project" --profile demo "$@"); }
fi

# --- Images ---

present() { docker image inspect "$1" >/dev/null 2>&1; }
had() { present "$1" || timeout 60 docker pull --quiet "$1" >/dev/null 2>&1; }
image_of() { sed -n "/^  $1:/,/^  [a-z]/s/^    image: //p" docker-compose.yml; }
# stand_in NAME: from a Dockerfile on standard input, in $work/images.
stand_in() {
    docker build --quiet --tag "$1" --file - "$work/images" >"$work/out" 2>&1 || {
        cat "$work/out" >&2
        give_up "could not make a stand-in for $1"
    }
    made="$made $1"
    say "made a stand-in for $1 from Debian's packages"
}
# One small Debian with all that the stand-ins need; they differ in what they run.
debian() {
    [ -e "$work/images/debian.tar" ] && return
    command -v debootstrap >/dev/null 2>&1 || install debootstrap
    say "making a Debian for the images that cannot be pulled (some minutes)"
    mkdir -p "$work/images"
    debootstrap --variant=minbase --include=ca-certificates,gcc,libc6-dev,make,perl,redis-server,prometheus bookworm \
        "$work/debian" >"$work/out" 2>&1 || {
        tail -n 5 "$work/out" >&2
        give_up "debootstrap failed"
    }
    # The authorities this machine trusts: a proxy between it and crates.io may have one of its own.
    cp /etc/ssl/certs/ca-certificates.crt "$work/debian/etc/ssl/certs/ca-certificates.crt"
    rm -rf "$work/debian/var/cache/apt" "$work/debian/var/lib/apt/lists" "$work/debian/usr/share/doc" "$work/debian/usr/share/man"
    tar -C "$work/debian" --exclude=./proc/* --exclude=./sys/* --exclude=./dev/* -cf "$work/images/debian.tar" .
}

rust_image="$(sed -n 's/^ARG RUST_IMAGE=//p' Dockerfile)"
base_image="$(sed -n '1,/^FROM/s/^ARG BASE_IMAGE=//p' Dockerfile)"
redis_image="$(image_of redis)"
prometheus_image="$(image_of prometheus)"
grafana_image="$(image_of grafana)"

if ! had "$base_image"; then
    debian
    # What the original contains: the C library, the compiler's, time zones, authorities, and a user.
    base="$work/base"
    mkdir -p "$base/etc/ssl/certs" "$base/tmp" "$base/home/nonroot" "$work/packages"
    chmod 1777 "$base/tmp"
    chown 65532:65532 "$base/home/nonroot"
    (cd "$work/packages" && apt-get -qq download base-files libc6 libgcc-s1 libstdc++6 libssl3 netbase tzdata) >"$work/out" 2>&1 ||
        give_up "could not fetch the packages of the base image: $(tail -n 1 "$work/out")"
    for package in "$work/packages"/*.deb; do dpkg-deb -x "$package" "$base"; done
    rm -rf "$base/usr/share/doc" "$base/usr/share/man"
    cp "$work/debian/etc/ssl/certs/ca-certificates.crt" "$base/etc/ssl/certs/"
    printf '%s\n' 'root:x:0:0:root:/root:/sbin/nologin' 'nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin' >"$base/etc/passwd"
    printf '%s\n' 'root:x:0:' 'nonroot:x:65532:' >"$base/etc/group"
    tar -C "$base" -cf "$work/images/base.tar" .
    stand_in "$base_image" <<'DOCKERFILE'
FROM scratch
ADD base.tar /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
USER 65532
WORKDIR /home/nonroot
DOCKERFILE
    rm "$work/images/base.tar"
fi
if ! had "$redis_image"; then
    debian
    stand_in "$redis_image" <<'DOCKERFILE'
FROM scratch
ADD debian.tar /
RUN mkdir /data && chown 999:1000 /data
WORKDIR /data
CMD ["redis-server"]
DOCKERFILE
fi
if ! had "$prometheus_image"; then
    debian
    stand_in "$prometheus_image" <<'DOCKERFILE'
FROM scratch
ADD debian.tar /
RUN mkdir /prometheus && chown 65534:65534 /prometheus
WORKDIR /prometheus
USER 65534
VOLUME ["/prometheus"]
ENTRYPOINT ["/usr/bin/prometheus"]
DOCKERFILE
fi
grafana=""
if had "$grafana_image"; then
    grafana=grafana
else
    say "left out  Grafana: $grafana_image cannot be pulled, and Debian has no Grafana; its dashboards are not loaded here"
fi

revision="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
image="cyberscan-relay:$project"
made="$made $image"
if [ -n "${RELAY_BINARY:-}" ]; then
    mkdir -p "$work/context"
    cp "$RELAY_BINARY" "$work/context/cyberscan-relay"
    cp LICENSE "$work/context/"
    # The Dockerfile with its last stage only.
    # shellcheck disable=SC2016 # the Dockerfile's variable
    sed -e '/^FROM.* AS build/,/^FROM \${BASE_IMAGE}/{/^FROM \${BASE_IMAGE}/!d}' \
        -e 's|^COPY --from=build /src/target/release/|COPY |' Dockerfile >"$work/context/Dockerfile"
    docker build --quiet --build-arg RELAY_REVISION="$revision" --tag "$image" "$work/context" >"$work/out" 2>&1 ||
        { cat "$work/out" >&2; give_up "could not build the image around $RELAY_BINARY"; }
    say "the image holds $RELAY_BINARY"
else
    if ! had "$rust_image"; then
        debian
        toolchain="$(rustc --print sysroot)" || give_up "$rust_image cannot be pulled, and there is no Rust here to make it from"
        mkdir "$work/images/toolchain"
        cp -a "$toolchain/bin" "$work/images/toolchain/"
        mkdir -p "$work/images/toolchain/lib/rustlib"
        cp -a "$toolchain"/lib/*.so* "$work/images/toolchain/lib/"
        cp -a "$toolchain"/lib/rustlib/*-linux-gnu "$work/images/toolchain/lib/rustlib/"
        stand_in "$rust_image" <<'DOCKERFILE'
FROM scratch
ADD debian.tar /
COPY toolchain /usr/local/rust
ENV PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin CARGO_HOME=/usr/local/cargo
DOCKERFILE
        rm -rf "$work/images/toolchain"
    fi
    say "building the image; this takes minutes"
    # The network of the machine, for engines without one of their own.
    docker build --network host --build-arg RELAY_REVISION="$revision" --tag "$image" . >"$work/build.log" 2>&1 ||
        { tail -n 30 "$work/build.log" >&2; give_up "the Dockerfile does not build"; }
    pass "the Dockerfile builds"
fi
rm -rf "$work/debian" "$work/images"

megabytes() { echo $(($1 / 1000000)); }
size="$(docker image inspect --format '{{.Size}}' "$image")"
base_size="$(docker image inspect --format '{{.Size}}' "$base_image")"
say "         the image has $(megabytes "$size") MB, of which $(megabytes $((size - base_size))) above its base"
check "the image has at most 40 MB, of which 20 above its base" test "$size" -le 40000000 -a $((size - base_size)) -le 20000000
check "the image runs as nobody" test "$(docker image inspect --format '{{.Config.User}}' "$image")" = 65532:65532
check "the image says where it comes from" test "$(docker image inspect --format '{{index .Config.Labels "org.opencontainers.image.revision"}}' "$image")" = "$revision"
check "the image has no shell" sh -c "! docker run --rm --entrypoint /bin/sh '$image' -c true"

# --- Up ---

mkdir "$work/project"
cp -R docker-compose.yml .env deploy dashboards scripts "$work/project/"
rm -rf "$work/project/deploy/secrets"
"$work/project/scripts/secrets.sh" >/dev/null
secrets="$work/project/deploy/secrets"
# Any free port, so that a stack that runs here already is in nobody's way.
sed -i 's/"127\.0\.0\.1:[0-9]*:/"127.0.0.1::/' "$work/project/docker-compose.yml"
export RELAY_TAG="$project" DEMO_RATE=5
services="redis relay prometheus sandbox relay-demo traffic $grafana"
# shellcheck disable=SC2086 # one word each
compose up --detach --no-build $services >"$work/up" 2>&1 || {
    cat "$work/up" >&2
    give_up "the stack does not come up"
}
pass "the stack comes up"

container() { compose ps --quiet "$1"; }
state() { docker inspect --format "$2" "$(container "$1")"; }
healthy() { [ "$(state "$1" '{{.State.Health.Status}}')" = healthy ]; }
running() { [ "$(state "$1" '{{.State.Running}}')" = true ]; }
well() { case $1 in sandbox | traffic) running "$1" ;; *) healthy "$1" ;; esac; }
port() { docker port "$(container "$1")" "$2" | head -n 1; }
get() { curl --silent --show-error --fail --max-time 5 "$@"; }
prometheus() { get --get --data-urlencode "query=$1" "http://$(port prometheus 9090)/api/v1/query"; }
# The first value of a query, or 0.
value() { prometheus "$1" | sed -n 's/.*"value":\[[0-9.]*,"\([^"]*\)"\].*/\1/p' | grep . || echo 0; }
above() { value "$1" | awk -v floor="$2" '{ exit !($1 > floor) }'; }
operator() { docker exec "$(container redis)" redis-cli --user operator --pass "$(cat "$secrets/redis-operator-password")" --no-auth-warning "$@"; }

for service in $services; do check "$service is well" within 60 well "$service"; done
check "the relay answers" within 10 get -o /dev/null "http://$(port relay 9090)/"
check "the relay is ready" within 15 get -o /dev/null "http://$(port relay 9091)/readyz"
check "the relay says which revision it is" sh -c "curl -s 'http://$(port relay 9091)/metrics' | grep relay_build_info"
check "a purge needs the admin token" test "$(curl -s -o /dev/null -w '%{http_code}' -X POST -d '{"all":true}' "http://$(port relay 9091)/purge")" = 401
check "with it, answers are purged everywhere" get -o /dev/null -X POST -H "Authorization: Bearer $(cat "$secrets/admin-token")" -d '{"all":true}' "http://$(port relay 9091)/purge"

# --- What each may do ---

for service in $services; do
    pid="$(state "$service" '{{.State.Pid}}')"
    if [ -r "/proc/$pid/status" ]; then
        # Read from the kernel, not from what was asked of the engine.
        check "$service: not root" sh -c "awk '/^Uid:/ { exit (\$2 == 0 || \$3 == 0) }' /proc/$pid/status"
        check "$service: no capability, none to be had" sh -c "awk '/^Cap(Eff|Prm|Bnd|Amb):/ && \$2 !~ /^0+\$/ { bad = 1 } /^NoNewPrivs:/ && \$2 != 1 { bad = 1 } END { exit bad }' /proc/$pid/status"
        check "$service: a read-only root" sh -c "awk '\$5 == \"/\" { exit (\$6 !~ /^ro/) }' /proc/$pid/mountinfo"
    fi
    check "$service: memory and processes are limited" sh -c "! echo ' $(state "$service" '{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}') ' | grep -e ' 0 ' -e ' <nil> '"
    check "$service: no port beyond this machine" sh -c "! docker port '$(container "$service")' | grep -v -- '-> 127.0.0.1:'"
    docker inspect "$(container "$service")" >"$work/inspected"
    compose logs "$service" >>"$work/inspected" 2>&1
    for secret in admin-token redis-password redis-encryption-key redis-operator-password grafana-admin-password; do
        if grep -qF "$(cat "$secrets/$secret")" "$work/inspected"; then fail "$service: $secret shows in its settings or logs"; fi
    done
done
pass "no secret shows in settings or logs"

# --- Traffic ---

check "Prometheus scrapes the relay" within 60 above 'up{job="cyberscan-relay",instance=~"relay(:.*)?"}' 0
check "Prometheus scrapes the demo's relay" within 60 above 'up{job="cyberscan-relay",instance=~"relay-demo(:.*)?"}' 0
check "Prometheus sees the demo's traffic" within 90 above 'sum(rate(relay_requests_total{endpoint="observe"}[1m]))' 0
check "Prometheus sees answers from memory" within 60 above 'sum(relay_cache_lookups_total{tier="memory",outcome="fresh"})' 0
check "Prometheus sees that Redis answers the demo's relay" within 60 above 'relay_redis_up{instance=~"relay-demo(:.*)?"}' 0
check "Prometheus has taken the rules" sh -c "curl -s 'http://$(port prometheus 9090)/api/v1/rules' | grep -q RelayErrorBudgetBurn"
if [ -n "$grafana" ]; then
    # The password by standard input: an argument is for all to see.
    grafana() { printf 'user = "admin:%s"\n' "$(cat "$secrets/grafana-admin-password")" | get --config - "http://$(port grafana 3000)/api/$1"; }
    check "Grafana reaches Prometheus" within 30 grafana datasources/uid/cyberscan-relay-prometheus/health
    for board in dashboards/*.json; do
        uid="$(sed -n 's/^  "uid": "\(.*\)",$/\1/p' "$board")"
        check "Grafana has taken $board" within 60 grafana "dashboards/uid/$uid"
    done
fi
docker cp "$(container sandbox):/sandbox/token" "$work/token" >/dev/null 2>&1 || true
observe() {
    curl --silent --max-time 10 -H "Authorization: Bearer $(tr -d '\n' <"$work/token")" -H 'Content-Type: application/json' \
        -d '[{"type":"ip","value":"203.0.113.10"}]' "http://$(port relay-demo 9090)/observe/observables"
}
answered() { observe | grep '"sightings"' | grep -qv '"errors"'; }
if [ -s "$work/token" ]; then
    check "the demo's relay answers an investigation" within 10 answered
else
    fail "the sandbox has written no token"
fi
keys() { operator dbsize | tr -dc '0-9'; }
check "Redis holds answers" test "$(keys)" -gt 0

# --- Trouble ---

check "without Redis the relay goes on answering" sh -c "docker stop --time 2 '$(container redis)'"
check "without Redis: an investigation" answered
check "without Redis: healthy" healthy relay
check "without Redis: Prometheus sees it" within 60 above '1 - relay_redis_up{instance=~"relay-demo(:.*)?"}' 0
check "without Redis: ready all the same" get -o /dev/null "http://$(port relay 9091)/readyz"
docker start "$(container redis)" >/dev/null
check "with Redis again: redis is well" within 30 well redis
check "with Redis again: Prometheus sees it" within 60 above 'relay_redis_up{instance=~"relay-demo(:.*)?"}' 0

for service in $services; do
    check "$service: a restart" docker restart --time 30 "$(container "$service")"
    check "$service is well after a restart" within 60 well "$service"
done
for service in relay relay-demo; do
    docker stop --time 30 "$(container "$service")" >/dev/null
    check "$service ends in peace" test "$(state "$service" '{{.State.ExitCode}}')" = 0
    docker start "$(container "$service")" >/dev/null
    check "$service is well again" within 30 well "$service"
done
for service in $services; do
    pid="$(state "$service" '{{.State.Pid}}')"
    if kill -9 "$pid" 2>/dev/null; then
        restarted() { [ "$(state "$service" '{{.RestartCount}}')" -gt 0 ] && well "$service"; }
        check "$service comes back after a crash" within 60 restarted
    fi
done
docker cp "$(container sandbox):/sandbox/token" "$work/token" >/dev/null 2>&1 || true
check "the demo's relay answers an investigation after all that" within 60 answered
# The driver introduces itself with CLIENT SETINFO, which may be refused; it goes on.
refused() { operator acl log | grep -A 1 '^object$' | grep -v -e '^object$' -e '^--$' -e '^client|setinfo$' | sort -u; }
say "         refused by Redis: $(refused | tr '\n' ' ')"
check "Redis has refused the relay nothing it needs" test -z "$(refused)"

say
if [ "$failed" = 0 ]; then
    say "compose: $passed passed, 0 failed"
else
    say "compose: $passed passed, $failed failed" >&2
    exit 1
fi
