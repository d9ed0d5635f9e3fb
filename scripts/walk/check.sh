#!/bin/sh
# Goes the way that the README's rehearsal shows, with the binary in the target directory.
set -eu
cd "$(dirname "$0")/../.."
scripts/need.sh curl curl
scripts/need.sh jq jq
scripts/need.sh python3 python3
for port in 8443 8444 9443 9444; do
    if python3 -c "import socket; socket.create_connection(('127.0.0.1', $port), 1)" 2>/dev/null; then
        echo "walk: port $port of 127.0.0.1 is taken; the rehearsal needs 8443, 8444, 9443 and 9444" >&2
        exit 1
    fi
done
exec python3 scripts/walk/walk.py "${CARGO_TARGET_DIR:-target}/debug/cyberscan-relay"
