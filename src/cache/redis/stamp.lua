-- Notes what was purged. KEYS: the stamps. ARGV: most stamps, then per stamp: scope, version.
for at = 2, #ARGV, 2 do redis.call('ZADD', KEYS[1], 'GT', ARGV[at + 1], ARGV[at]) end
-- Beyond the most, the oldest goes: a refusal is asked for again anyway, of the rest as much is purged as is needed.
while redis.call('ZCARD', KEYS[1]) > tonumber(ARGV[1]) do
  local oldest = redis.call('ZRANGE', KEYS[1], 0, 1, 'WITHSCORES')
  local at = oldest[1] == 'all' and 3 or 1
  redis.call('ZREM', KEYS[1], oldest[at])
  if string.sub(oldest[at], 1, 2) ~= 'r:' then redis.call('ZADD', KEYS[1], 'GT', oldest[at + 1], 'all') end
end
return redis.call('ZCARD', KEYS[1])
