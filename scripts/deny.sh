#!/bin/sh
# Bans, licences and sources of the dependencies that are shipped (deny.toml), with cargo-deny; installed on first use.
# Advisories need the advisory database, which is fetched from GitHub: they are checked when it can be had.
set -eu
cd "$(dirname "$0")/.."
version=0.20.2
root="${CARGO_TARGET_DIR:-target}/tools"
deny="$root/bin/cargo-deny"
if ! [ -x "$deny" ]; then
    # A debug build: it runs for a second and is built for minutes.
    cargo install cargo-deny --version "$version" --locked --debug --root "$root" --quiet
fi
"$deny" --log-level error check bans licenses sources
scripts/deny-test.sh "$deny"
if timeout 60 "$deny" --log-level error fetch db 2>/dev/null; then
    "$deny" --log-level error check advisories
else
    echo "deny: the advisory database cannot be reached from here; advisories were not checked" >&2
fi
