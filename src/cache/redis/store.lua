-- Writes a value unless a newer one is there, and gives the lock back.
-- KEYS: value, lock. ARGV: owner or '', version, value, time to live in ms, last version that can be true.
-- What claims to be from the future does not stay, nor does what is no value.
-- Answer: 1 if others are to be told: somebody waits, or has what was replaced.
local present = redis.pcall('GETRANGE', KEYS[1], 2, 17)
local there = present ~= ''
if type(present) ~= 'string' then present = '' end
local stays = #present == 16 and not string.find(present, '[^0-9a-f]') and present > ARGV[2] and present <= ARGV[5]
if not stays then redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4]) end
local holder = redis.pcall('GET', KEYS[2])
local waited = type(holder) == 'string' and string.sub(holder, -1) == '+'
if waited then holder = string.sub(holder, 1, -2) end
if ARGV[1] ~= '' and holder == ARGV[1] then redis.call('DEL', KEYS[2]) end
return (waited or (there and not stays)) and 1 or 0
