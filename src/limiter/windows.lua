-- Takes calls from all windows of a tenant and the fleet at once, on Redis's clock.
-- KEYS: the tenant's pause, then one hash per window: number of a part -> calls in it, and `b`, when the
--   window came into being. A window that is not there is new: it grows from a hundredth to its limit.
-- ARGV: calls wanted, share of each ceiling that is to be left over, then per window: limit, microseconds,
--   calls made elsewhere that are not counted yet.
-- Answer: calls granted, microseconds until the next one, 1 if paused, the time, then per window: calls used,
-- ceiling.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local want, leave = tonumber(ARGV[1]), tonumber(ARGV[2])
local paused = redis.call('PTTL', KEYS[1])
local granted, windows = want, {}
if paused > 0 then granted = 0 end

for key = 2, #KEYS do
  local at = 3 * (key - 1)
  local limit, per, debt = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local part = math.floor(per / 100)
  -- Leaving parts that count in full: calls do not arrive the moment they are granted.
  local leaving = per > 1000000 and 1 or 3
  local number = math.floor(now / part)
  local fields = redis.call('HGETALL', KEYS[key])
  local born, used, oldest = nil, 0, nil
  for field = 1, #fields, 2 do
    if fields[field] == 'b' then
      born = tonumber(fields[field + 1])
    elseif tonumber(fields[field]) <= number - 100 - leaving then
      redis.call('HDEL', KEYS[key], fields[field])
    else
      used = used + tonumber(fields[field + 1])
      if not oldest or tonumber(fields[field]) < oldest then oldest = tonumber(fields[field]) end
    end
  end
  if not born then
    born = now
    redis.call('HSET', KEYS[key], 'b', string.format('%.0f', now))
  end
  if debt > 0 then
    redis.call('HINCRBY', KEYS[key], string.format('%.0f', number), debt)
    used = used + debt
    oldest = oldest or number
  end
  local ceiling = math.min(limit, math.max(1, math.floor(limit / 100)) + math.floor(limit * math.max(0, now - born) / per))
  local free = math.max(0, ceiling - used - math.floor(ceiling * leave))
  granted = math.min(granted, free)
  windows[key] = {part = part, leaving = leaving, number = number, used = used, oldest = oldest, ceiling = ceiling, limit = limit, per = per, free = free}
end

local wait = math.max(0, paused) * 1000
local answer = {granted, 0, paused > 0 and 1 or 0, now}
for key = 2, #KEYS do
  local window = windows[key]
  if granted > 0 then
    redis.call('HINCRBY', KEYS[key], string.format('%.0f', window.number), granted)
    window.oldest = window.oldest or window.number
  end
  if window.free - granted < 1 then
    local leaves = window.oldest and (window.oldest + 100 + window.leaving) * window.part - now or window.per
    local grows = window.ceiling < window.limit and math.ceil(window.per / window.limit) or leaves
    wait = math.max(wait, math.min(leaves, grows))
  end
  answer[#answer + 1] = window.used + granted
  answer[#answer + 1] = window.ceiling
end
answer[2] = wait
return answer
