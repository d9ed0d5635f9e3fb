-- The clock of the fleet: Redis's own, and so far ahead of it as it takes never to go back, whatever is done to that.
-- KEYS: the clock. ARGV: a name for a Redis that has none yet, the latest time a replica knows of (microseconds; 0: none).
-- Answer: the name, by which a Redis that lost its memory is told; what the clock would have shown by itself, and what it
-- shows; 1 if this is no master.
-- A Redis that is full still tells the time.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local named = redis.pcall('HSETNX', KEYS[1], 'name', ARGV[1])
local follows = type(named) == 'table' and named.err and string.find(named.err, 'READONLY')
local kept = redis.call('HMGET', KEYS[1], 'name', 'ahead', 'shown')
local ahead = tonumber(kept[2]) or 0
local by_itself = now + ahead
-- Replicas hear of the time late; what is within a twentieth of a second is the same.
local shown = math.max(tonumber(kept[3]) or 0, tonumber(ARGV[2]))
if shown > by_itself + 50000 then
  redis.pcall('HSET', KEYS[1], 'ahead', string.format('%.0f', shown - now))
else
  shown = by_itself
end
redis.pcall('HSET', KEYS[1], 'shown', string.format('%.0f', shown))
return {kept[1] or '', string.format('%.0f', by_itself), string.format('%.0f', shown), follows and 1 or 0}
