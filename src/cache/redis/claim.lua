-- Looks for a value, and takes the lock of whoever fetches it if there is none.
-- KEYS: value, lock. ARGV: owner, lease in ms, version a value has to be newer than, last version that can be true.
-- What has no version, or is no string at all, is no value: compared as text it could be newer than everything.
local value = redis.pcall('GET', KEYS[1])
local present = type(value) == 'string' and string.sub(value, 3, 18) or ''
if #present == 16 and not string.find(present, '[^0-9a-f]') and present > ARGV[3] and present <= ARGV[4] then
  return {1, value}
end
if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return {2, ''} end
-- Whoever has the lock sees by the mark that somebody waits.
local holder = redis.pcall('GET', KEYS[2])
if type(holder) == 'string' and string.sub(holder, -1) ~= '+' then redis.call('APPEND', KEYS[2], '+') end
return {3, ''}
