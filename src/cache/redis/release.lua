-- Gives a lock back. KEYS: lock. ARGV: owner. Answer: 1 if somebody waits.
local holder = redis.pcall('GET', KEYS[1])
if type(holder) ~= 'string' then return 0 end
local waited = string.sub(holder, -1) == '+'
if waited then holder = string.sub(holder, 1, -2) end
if holder ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
return waited and 1 or 0
