-- Which tenants have something due, and from when on, on Redis's clock. KEYS: a sorted set of tenants' names by that time.
-- Milliseconds throughout. ARGV[1] is what to do.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

if ARGV[1] == 'tell' then
  -- ARGV: time to live, a tenant, in how long something of it is due (-1: nothing is), 1 if what was due has been claimed.
  local tenant, due = ARGV[3], tonumber(ARGV[4])
  local told = tonumber(redis.call('ZSCORE', KEYS[1], tenant) or nil)
  -- What others have told meanwhile counts, but not what the claim was made for.
  if told and told <= now and ARGV[5] == '1' then
    told = nil
    if due < 0 then redis.call('ZREM', KEYS[1], tenant) end
  end
  if due >= 0 and (not told or now + due < told) then
    redis.call('ZADD', KEYS[1], now + due, tenant)
  end
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return 0
end

-- 'due': ARGV: from, at most so many, after how long nobody does it any more. Answer: 1 if anything is told here, then
-- tenants, the first that has something due first.
if ARGV[2] == '0' then
  local late = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[4], 'LIMIT', 0, ARGV[3])
  if #late > 0 then redis.call('ZREM', KEYS[1], unpack(late)) end
end
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', ARGV[2], ARGV[3])
table.insert(due, 1, redis.call('ZCARD', KEYS[1]) > 0 and '1' or '0')
return due
