-- Gives an account that is not in use a time to live.
-- KEYS: the account's hash. ARGV: the length of its longest window, in seconds.
-- Answer: 1 if it will be gone, 0 if it is in use.
local clock = redis.call('HGET', KEYS[1], 'c')
if not clock then return 1 end
local changed, ahead, born, lost, before = struct.unpack('<dddddd', clock)
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2] + ahead
if now - changed < ARGV[1] * 1000000 then return 0 end
redis.call('HSET', KEYS[1], 'c', struct.pack('<dddddd', changed, ahead, born, lost, before, 1))
redis.call('PEXPIRE', KEYS[1], ARGV[1] * 1000)
return 1
