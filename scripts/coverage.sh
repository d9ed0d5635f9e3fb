#!/bin/sh
# coverage.sh: which lines of src the unit tests and tests/it run; of the relays they start as processes, those that are not
# killed. The table by file is in target/coverage/report.txt. LLVM's tools have to be of the version rustc has.
set -eu
cd "$(dirname "$0")/.."
version=0.9.1
target="$(realpath -m "${CARGO_TARGET_DIR:-target}")"
llvm="$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')"
scripts/need.sh "llvm-cov-$llvm" "llvm-$llvm"
scripts/need-redis.sh
scripts/need.sh openssl openssl
scripts/need.sh nginx nginx-light
scripts/need.sh caddy caddy
scripts/need.sh haproxy haproxy
if ! [ -x "$target/tools/bin/cargo-llvm-cov" ]; then
    cargo install cargo-llvm-cov --version "$version" --locked --debug --root "$target/tools" --quiet
fi
LLVM_COV="$(command -v "llvm-cov-$llvm")" LLVM_PROFDATA="$(command -v "llvm-profdata-$llvm")"
export LLVM_COV LLVM_PROFDATA CARGO_TARGET_DIR="$target/coverage"
coverage() {
    "$target/tools/bin/cargo-llvm-cov" llvm-cov "$@"
}
coverage clean --profraw-only
# Relays that tests start with an environment of their own count here; what they run others have run.
trap 'rm -f default_*.profraw' EXIT
coverage --locked --lib --test it --no-report --quiet
coverage report --ignore-filename-regex '(tests|demo|sandbox/.*|fuzz)\.rs' >"$target/coverage/report.txt"
tail -n 1 "$target/coverage/report.txt"
