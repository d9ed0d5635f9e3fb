#!/bin/sh
# deny-test.sh CARGO-DENY: that deny.toml refuses what it is there to refuse. Each case adds one crate to a copy of the
# project; the harmless one has to pass, each other one to fail, and for its own reason. Needs no network.
set -eu
cd "$(dirname "$0")/.."
deny=$1
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

# crate DIRECTORY NAME LICENCE: a crate with nothing in it.
crate() {
    mkdir -p "$1/src"
    : >"$1/src/lib.rs"
    printf '[package]\nname = "%s"\nversion = "0.1.0"\nedition = "2024"\nlicense = "%s"\n[workspace]\n' "$2" "$3" >"$1/Cargo.toml"
}

# check CASE DEPENDENCY: what cargo-deny says to the project with one more dependency; fails as it does.
check() {
    mkdir "$copy/$1"
    cp -r Cargo.toml Cargo.lock deny.toml src benches "$copy/$1"
    sed -i "s|^\[dependencies\]\$|&\n$2|" "$copy/$1/Cargo.toml"
    "$deny" --log-level error $offline --manifest-path "$copy/$1/Cargo.toml" check bans licenses sources >"$copy/said" 2>&1
}

# What cargo would have to check out, even from this machine's disk, it does not offline.
offline=--offline

# refused CASE CODE DEPENDENCY: it fails, and one of its reasons is CODE.
refused() {
    if check "$1" "$3"; then
        echo "deny-test: $1: cargo-deny lets it pass" >&2
        exit 1
    elif ! grep -q "\[$2\]" "$copy/said"; then
        echo "deny-test: $1: cargo-deny fails, but not with $2:" >&2
        cat "$copy/said" >&2
        exit 1
    fi
}

crate "$copy/harmless" harmless MIT
crate "$copy/banned" openssl-sys MIT
crate "$copy/copyleft" copyleft AGPL-3.0-only
crate "$copy/elsewhere" elsewhere MIT
git -C "$copy/elsewhere" init -q
git -C "$copy/elsewhere" add .
git -C "$copy/elsewhere" -c user.name=test -c user.email=test@localhost commit -qm test

if ! check passes "harmless = { version = \"0.1\", path = \"$copy/harmless\" }"; then
    echo "deny-test: a harmless crate is refused:" >&2
    cat "$copy/said" >&2
    exit 1
fi
refused ban banned "openssl-sys = { version = \"0.1\", path = \"$copy/banned\" }"
refused licence rejected "copyleft = { version = \"0.1\", path = \"$copy/copyleft\" }"
refused wildcard wildcard "harmless = { version = \"*\", path = \"$copy/harmless\" }"
offline=
refused source source-not-allowed "elsewhere = { version = \"0.1\", git = \"file://$copy/elsewhere\" }"
