#!/bin/sh
# need.sh PROGRAM PACKAGE: installs PACKAGE by apt-get if PROGRAM is missing, and starts no service of it.
set -eu
if command -v "$1" >/dev/null; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "$1 is missing: install it" >&2
    exit 1
fi
as_root=
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "$1 is missing: apt-get install $2" >&2
        exit 1
    fi
    as_root=sudo
fi
# What invoke-rc.d asks before it starts anything: 101 means no.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' | $as_root tee /usr/sbin/policy-rc.d >/dev/null
    $as_root chmod +x /usr/sbin/policy-rc.d
    trap '$as_root rm -f /usr/sbin/policy-rc.d' EXIT
fi
$as_root apt-get update -q >/dev/null
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$2" >/dev/null
command -v "$1" >/dev/null
