#!/bin/sh
# fuzz.sh [SECONDS [TARGET...]]: fuzzes each target for so long (10 s) with libFuzzer, on stable Rust, as many at once as there are
# cores. The seeds are in fuzz/seeds; what libFuzzer finds beyond them is kept in the target directory. An input that breaks
# something is written there, too: put it into fuzz/seeds/<target>, where every `cargo test` replays it.
set -eu
cd "$(dirname "$0")/.."
host="$(rustc -vV | sed -n 's/^host: //p')"
root="${CARGO_TARGET_DIR:-target}/fuzz"

if [ "${1:-}" = --one ]; then
    seconds="$2" target="$3"
    mkdir -p "$root/corpus/$target" "$root/found/$target"
    log="$root/$target.log"
    if ! "$root/$host/release/$target" -max_total_time="$seconds" -max_len=8192 -timeout=10 -rss_limit_mb=2048 \
        -print_final_stats=1 -artifact_prefix="$root/found/$target/" "$root/corpus/$target" "fuzz/seeds/$target" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        echo "fuzz: $target does not hold; the input is in $root/found/$target" >&2
        exit 1
    fi
    executed="$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")"
    coverage="$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)"
    echo "fuzz: $target holds: $executed inputs in $seconds s, $coverage edges"
    exit
fi

scripts/need.sh g++ g++
seconds="${1:-10}"
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- $(ls fuzz/targets | sed 's/\.rs$//')
# The coverage that libFuzzer steers by is a pass of LLVM's; only sanitizers need a nightly compiler. With --target these flags are
# not those of build scripts.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
RUSTFLAGS="$RUSTFLAGS -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
RUSTFLAGS="$RUSTFLAGS -Cllvm-args=-sanitizer-coverage-trace-compares"
export RUSTFLAGS
CARGO_TARGET_DIR="$root" "${CARGO:-cargo}" build --locked --quiet --release --target "$host" --manifest-path fuzz/Cargo.toml
printf '%s\n' "$@" | xargs -P "$(nproc)" -n 1 scripts/fuzz.sh --one "$seconds"
