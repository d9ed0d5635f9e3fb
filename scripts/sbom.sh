#!/bin/sh
# The bill of materials of what is shipped (CycloneDX 1.5, JSON) into target/sbom, with cargo-cyclonedx; installed on
# first use. The same sources give the same file.
set -eu
cd "$(dirname "$0")/.."
version=0.5.9
target="${CARGO_TARGET_DIR:-target}"
root="$target/tools"
if ! [ -x "$root/bin/cargo-cyclonedx" ]; then
    # A debug build: it runs for a second and is built for minutes.
    cargo install cargo-cyclonedx --version "$version" --locked --debug --root "$root" --quiet
fi
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || echo 0)
export SOURCE_DATE_EPOCH
name=cyberscan-relay.cdx
# It writes beside Cargo.toml.
trap 'rm -f "$name.json"' EXIT
"$root/bin/cargo-cyclonedx" cyclonedx --format json --spec-version 1.5 --override-filename "$name" \
    --target x86_64-unknown-linux-gnu --no-build-deps --quiet
mkdir -p "$target/sbom"
# Where the sources lie on this machine is nobody's affair.
sed "s|file://$PWD#|file:///cyberscan-relay#|g" "$name.json" >"$target/sbom/$name.json"
echo "$target/sbom/$name.json"
