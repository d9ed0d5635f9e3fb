#!/bin/sh
# Random secrets for docker-compose.yml, one file each, in deploy/secrets (or the directory given). What is there
# already is kept: delete a file to have a new one made. To change the password of Redis, delete redis-password,
# redis-url and redis.acl together.
set -eu
cd "$(dirname "$0")/.."
directory="${1:-deploy/secrets}"

# Nobody else enters the directory. The files in it are readable by all, because Compose mounts them as they are and
# each container runs as a user of its own.
mkdir -p "$directory"
chmod 0700 "$directory"
umask 0222

random() {
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}
# make NAME CONTENT: as a whole or not at all.
make() {
    if [ -e "$directory/$1" ]; then
        case $1 in
        redis.acl | redis-url)
            # Made from the others, so it can be told whether it is still what it would be.
            if [ "$(cat "$directory/$1")" != "$2" ]; then
                echo "kept    $directory/$1, which is not what this version makes of the others: delete it for a new one" >&2
                return
            fi
            ;;
        esac
        echo "kept    $directory/$1"
    else
        printf '%s\n' "$2" >"$directory/.$1.new"
        mv "$directory/.$1.new" "$directory/$1"
        echo "made    $directory/$1"
    fi
}
hash_of() {
    tr -d '\n' <"$directory/$1" | sha256sum | cut -d ' ' -f 1
}

make admin-token "$(random)"
make grafana-admin-password "$(random)"
make redis-encryption-key "$(random)"
make redis-password "$(random)"
make redis-operator-password "$(random)"
make redis-url "redis://relay:$(cat "$directory/redis-password")@redis:6379/0"

# Redis reads hashes, so the file that its container sees contains no password.
#
# relay: what src/cache, src/limiter and src/worker send, on keys of the relay only. No KEYS, SCAN, FLUSHALL, CONFIG or DEBUG: who
#   steals this password can neither list what is kept nor reconfigure the server. INFO is for `doctor`. HELLO and AUTH need no permission.
# operator: looks after the server, sees no key (redis-cli --user operator --askpass).
# probe: the health check; may do nothing but ping, and so needs no password.
make redis.acl "user default reset
user relay on #$(hash_of redis-password) resetchannels ~relay:* -@all +ping +unwatch +time +mget +get +getrange +set +append +del +pexpire +pttl +hget +hset +hsetnx +hdel +hlen +hmget +persist +hincrby +hrandfield +zadd +zrem +zcard +zrange +zscore +zrangebyscore +xadd +xtrim +xread +xrange +xrevrange +evalsha +script|load +info
user operator on #$(hash_of redis-operator-password) resetchannels -@all +ping +info +dbsize +acl|log +slowlog|get +memory|stats +latency|latest
user probe on nopass resetchannels -@all +ping"
