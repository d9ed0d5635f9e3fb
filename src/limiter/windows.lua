-- Takes calls from all windows of a tenant and the fleet at once, on Redis's clock.
-- KEYS: the tenant's pause, then one hash per window: number of a part -> calls in it, `p` and such a number -> calls
--   made before the window came into being, as far as somebody has told, and `b`, when that was. A window that
--   is not there is new: it grows from a hundredth to its limit, or to what those calls leave of it.
-- ARGV: calls wanted, share of each ceiling that is to be left over, then per window: limit, microseconds,
--   calls made elsewhere that are not counted yet, and calls of before it came into being, as `parts ago:calls ...`.
-- Answer: calls granted, microseconds until the next one, 1 if paused, the time, then per window: calls used,
-- ceiling, when it came into being.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local want, leave = tonumber(ARGV[1]), tonumber(ARGV[2])
local paused = redis.call('PTTL', KEYS[1])
local granted, windows = want, {}
if paused > 0 then granted = 0 end

for key = 2, #KEYS do
  local at = 4 * key - 5
  local limit, per, debt = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local part = math.floor(per / 100)
  -- Leaving parts that count in full: calls do not arrive the moment they are granted.
  local leaving = per > 1000000 and 1 or 3
  local number = math.floor(now / part)
  for ago, calls in string.gmatch(ARGV[at + 3], '(%d+):(%d+)') do
    redis.call('HINCRBY', KEYS[key], 'p' .. string.format('%.0f', number - ago), calls)
  end
  local fields = redis.call('HGETALL', KEYS[key])
  local born, used, before, oldest = nil, 0, 0, nil
  for field = 1, #fields, 2 do
    local told, name = string.match(fields[field], '^(p?)(%d+)$')
    if not name then
      born = tonumber(fields[field + 1])
    elseif tonumber(name) <= number - 100 - leaving then
      redis.call('HDEL', KEYS[key], fields[field])
    else
      if told == 'p' then
        before = before + tonumber(fields[field + 1])
      else
        used = used + tonumber(fields[field + 1])
      end
      if not oldest or tonumber(name) < oldest then oldest = tonumber(name) end
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
  local grown = math.max(1, math.floor(limit / 100)) + math.floor(limit * math.max(0, now - born) / per)
  local most = math.max(0, limit - before)
  local ceiling = math.min(most, grown)
  local free = math.max(0, ceiling - used - math.floor(ceiling * leave))
  granted = math.min(granted, free)
  windows[key] = {part = part, leaving = leaving, number = number, used = used, oldest = oldest, ceiling = ceiling, growing = grown < most, born = born, limit = limit, per = per, free = free}
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
    local grows = window.growing and math.ceil(window.per / window.limit) or leaves
    wait = math.max(wait, math.min(leaves, grows))
  end
  answer[#answer + 1] = window.used + granted
  answer[#answer + 1] = window.ceiling
  answer[#answer + 1] = window.born
end
answer[2] = wait
return answer
