#!/bin/sh
# A real Redis for the tests. They run it in a container where they can; those that kill, freeze or cluster it need
# the program itself. It is installed with the system's package manager where it is missing, and not started as a service.
set -eu
if command -v redis-server >/dev/null 2>&1; then
    exit 0
fi
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo "$@"
    else
        echo "need-redis: root is needed for: $*" >&2
        return 1
    fi
}
install() {
    if command -v apt-get >/dev/null 2>&1; then
        # At runlevel 1 the package does not start a server on the default port.
        set -- env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get
        as_root "$@" install -y --no-install-recommends redis-server ||
            { as_root "$@" update && as_root "$@" install -y --no-install-recommends redis-server; }
    elif command -v dnf >/dev/null 2>&1; then
        # Fedora has valkey in its place, which brings the old name as a package of its own.
        as_root dnf install -y redis || as_root dnf install -y valkey-compat-redis
    elif command -v apk >/dev/null 2>&1; then
        as_root apk add redis
    elif command -v brew >/dev/null 2>&1; then
        brew install redis
    else
        return 1
    fi
}
if install >&2 && command -v redis-server >/dev/null 2>&1; then
    exit 0
fi
echo "need-redis: redis-server could not be installed; install it for the tests that run on a real Redis" >&2
# With Docker, most of them run all the same.
docker info >/dev/null 2>&1
