#!/bin/sh
# mutants.sh [K/N]: makes lines of auth, egress, cache, limiter and flight wrong, one at a time, and looks whether the unit tests of
# that part notice. K/N is every N-th mutant from the K-th on (0/8); 0/1 is all of them, and a night. What became of them is in
# target/mutants, a directory for each part; what survives may still be noticed by other tests.
set -eu
cd "$(dirname "$0")/.."
version=27.1.0
target="$(realpath -m "${CARGO_TARGET_DIR:-target}")"
mutants="$target/tools/bin/cargo-mutants"
if ! [ "$("$mutants" mutants --version 2>/dev/null)" = "cargo-mutants $version" ]; then
    cargo install cargo-mutants --version "$version" --locked --debug --root "$target/tools" --quiet
fi
scripts/need-redis.sh
# Of its own, and kept: only the first mutant waits for the dependencies.
export CARGO_TARGET_DIR="$target/mutants/build"
for part in auth egress cache limiter flight; do
    tried="$target/mutants/$part"
    rm -rf "$tried"
    mkdir -p "$tried"
    # What takes half a minute, and twice as long as without the mutant, hangs: noticed.
    "$mutants" mutants --file "src/$part.rs" --file "src/$part/**" --exclude 'src/**/fuzz.rs' --exclude 'src/**/tests.rs' \
        --shard "${1:-0/8}" --sharding round-robin --timeout-multiplier 2 --minimum-test-timeout 30 \
        --cargo-arg=--lib --output "$tried" --no-times --colors never -- -- "$part::" || ended=$?
    # That some survive, or hang, is what this is about; anything else is a failure of the run.
    case "${ended:-0}" in
        0 | 2 | 3) ended=0 ;;
        *) exit "$ended" ;;
    esac
    echo "$part: $(wc -l < "$tried/mutants.out/missed.txt") survive; see $tried/mutants.out/missed.txt"
done
