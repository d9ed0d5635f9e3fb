#!/bin/sh
# need-python.sh NAME REQUIREMENTS: prints the folder of a Python environment with what the file REQUIREMENTS lists, for the
# tools called NAME. It is made on first use, in target/tools/NAME, and anew when that file has changed; nothing else is touched.
set -eu
tools="${CARGO_TARGET_DIR:-target}/tools/$1"
if ! cmp -s "$2" "$tools/installed"; then
    log="$(mktemp)"
    trap 'rm -f "$log"' EXIT
    die() {
        cat "$log" >&2
        echo "need-python: $1" >&2
        exit 1
    }
    # Debian has the module venv in a package of its own.
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
            die "python3 with venv is missing: apt-get install python3-venv"
        fi
        { DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends python3-venv ||
            { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends python3-venv; }; } >"$log" 2>&1 ||
            die "python3-venv cannot be installed"
    fi
    rm -rf "$tools"
    { python3 -m venv "$tools" && "$tools/bin/pip" -q --disable-pip-version-check install -r "$2"; } >"$log" 2>&1 ||
        die "the tools of $2 cannot be installed with python3 and pip"
    cp "$2" "$tools/installed"
fi
echo "$tools"
