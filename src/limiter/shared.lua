-- Takes calls from all windows of one account (a tenant, or the fleet) at once, on Redis's clock.
--
-- KEYS: the account's hash; the key that stands while CyberScan has asked for a pause.
-- ARGV: calls wanted, share to be left over, the replica, when the memory came into being and when it last changed
--   as the replica heard (nought: not heard), 1 if the replica was without Redis, what the account's clock must show
--   at least and at most. Then per window: its length in seconds, its limit, and of a window whose calls are
--   spaced: the interval, calls of a burst, how late a call may be, how far the replica is ahead; of another: 0,
--   calls the replica ever made without Redis, those of them that are in the window, and those it was granted
--   before the memory was lost, both as `parts ago:calls ...`, newest first. Times are microseconds.
-- The hash holds doubles. `c` is the account's clock: when it last changed, how far it is ahead of Redis's, when
--   it came into being, from when on it lost what was there before and when that had come into being, 1 if it is at
--   rest and has a time to live. Per window, under its length: of spaced calls when the next one is due, what is left of a burst, and for display
--   the number of the current window, calls in it and in the one before; of others the calls in it, the number of
--   its oldest part with calls, that of its newest, and calls in that. The calls of older parts lie under
--   `length:part` as text, the part's number modulo 128; what a replica has reported under `length:r:replica`.
-- Answer: 1 if the memory is not what the replica heard, with nothing granted; calls granted, microseconds until
--   there is one, milliseconds of a pause, when the memory came into being, lost something, changed, what its
--   clock shows; then per window: calls used, microseconds until the next one is due.
local call, floor, max, min = redis.call, math.floor, math.max, math.min
local pack, unpack_doubles = struct.pack, struct.unpack
local key, count = KEYS[1], #ARGV
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local want, reserve = tonumber(ARGV[1]), tonumber(ARGV[2])
local known, cold = tonumber(ARGV[4]), ARGV[6] == '1'
local paused = max(0, call('PTTL', KEYS[2]))

local names = {'c', ARGV[9], ARGV[15], ARGV[21], ARGV[27]}
for at = 33, count, 6 do names[#names + 1] = ARGV[at] end
local state = call('HMGET', key, unpack(names))
local changed, ahead, born, lost, previous, resting
local write, forgot = false, 0
if state[1] then
  changed, ahead, born, lost, previous, resting = unpack_doubles('<dddddd', state[1])
  -- Where Redis's clock has stepped, the account's goes on as that of the replica does; never back.
  local shows = now + ahead
  if born == known then
    local least, most = tonumber(ARGV[7]), tonumber(ARGV[8])
    -- As far as the replica can tell: it may be off by a burst.
    if shows > most then shows, cold = most, true end
    shows = max(shows, least)
  end
  shows = max(shows, changed)
  if shows ~= now + ahead then ahead, write = shows - now, true end
  now = shows
end

-- A window that is not there, or was when calls were made elsewhere, does not begin with a burst.
if not born or (born == known and changed < tonumber(ARGV[5])) then
  -- It is new, or Redis has lost it, or has come back with an older state.
  if known > 0 then cold, forgot = true, 1 end
  -- To ask for nothing makes nothing.
  write = want > 0 or forgot == 1
  lost, previous = changed or 0, born or 0
  changed, ahead, born, resting = now, ahead or 0, max(now, known + 1), 0
elseif known > 0 and born ~= known then
  forgot = 1
end
if forgot == 1 or paused > 0 then want = 0 end

-- How many calls each window has.
local granted, windows = want, {}
for w = 2, #names do
  local at, saved = 6 * w - 3, state[w]
  local per, interval = tonumber(ARGV[at]), tonumber(ARGV[at + 2])
  if interval > 0 then
    local burst, late = tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
    local this = floor(now / (per * 1000000))
    local due, left, turn, calls, before = now - burst * interval, 0, this, 0, 0
    if saved then due, left, turn, calls, before = unpack_doubles('<ddddd', saved) end
    if turn < this then
      before = turn == this - 1 and calls or 0
      turn, calls = this, 0
    end
    if cold and now >= due + interval then
      due, left, write = now + min(per, 1) * 1000000, 0, true
    end
    -- What the replica knows to be taken, of calls Redis has not heard of.
    if cold or forgot == 1 then
      local taken = now + tonumber(ARGV[at + 5])
      if due < taken then due, left, write = taken, 0, true end
    end
    local first, free = 0, nil
    if now >= due then
      first, left = 1, min(burst - 1, floor((now - due) / interval))
    end
    local base = max(due, now)
    if reserve > 0 then
      -- Rest, and a burst, of which the rest of the rate, and of the burst, is left.
      local rested = first == 0 or (reserve < 1 and now >= due + interval * reserve / (1 - reserve))
      free = rested and first + max(0, left - math.ceil(burst * reserve)) or 0
    else
      free = first + left
      local lead = base - now + free * interval
      if lead <= late then free = free + floor((late - lead) / interval) + 1 end
    end
    granted = min(granted, free)
    windows[w] = {interval, free, due, base, first, left, late, turn, calls, before, calls + math.ceil(before * (this + 1 - now / (per * 1000000)))}
  else
    local limit, part = tonumber(ARGV[at + 1]), per * 10000
    local current = floor(now / part)
    local used, oldest, newest, calls = 0, current, current, 0
    if saved then used, oldest, newest, calls = unpack_doubles('<dddd', saved) end
    if newest < current then
      -- Once in a part: what was the newest is laid down, and what has left the window is gone.
      if calls > 0 then call('HSET', key, per .. ':' .. newest % 128, calls) end
      newest, calls, write = current, 0, true
    end
    if oldest < current - 100 then
      local parts, gone = {}, {}
      for place = oldest, oldest + 101 do parts[#parts + 1] = per .. ':' .. place % 128 end
      local counts = call('HMGET', key, unpack(parts))
      local first = current
      for place = #parts, 1, -1 do
        if counts[place] then
          if oldest + place - 1 < current - 100 then
            used = used - counts[place]
            gone[#gone + 1] = parts[place]
          else
            first = oldest + place - 1
          end
        end
      end
      if #gone > 0 then call('HDEL', key, unpack(gone)) end
      oldest, write = first, true
    end
    local ever, alone, history = tonumber(ARGV[at + 3]), ARGV[at + 4], ARGV[at + 5]
    if forgot == 0 and (ever > 0 or history ~= '') then
      local name = per .. ':r:' .. ARGV[3]
      local report = call('HGET', key, name)
      local when, far = 0, 0
      if report then when, far = unpack_doubles('<dd', report) end
      local function add(by_part, most)
        for ago, made in string.gmatch(by_part, '(%d+):(%d+)') do
          made = min(made, most)
          most = most - made
          -- The replica's parts may begin a little earlier.
          local which = min(current, current - ago + 1)
          if which == current then
            calls = calls + made
          elseif made > 0 then
            call('HINCRBY', key, per .. ':' .. which % 128, made)
          end
          oldest = used > 0 and min(oldest, which) or which
          used = used + made
        end
      end
      add(alone, max(0, ever - far))
      if when ~= born then add(history, math.huge) end
      call('HSET', key, name, pack('<dd', born, max(ever, far)))
      write = true
    end
    if used == 0 then oldest = current end
    local free = max(0, limit - used - floor(limit * reserve))
    granted = min(granted, free)
    windows[w] = {0, free, used, oldest, newest, calls, part}
  end
end

-- What is left of them.
local wait = paused * 1000
-- What was lost is known to who had heard of the memory before.
local answer = {forgot, granted, 0, paused, born, known == previous and lost or 0, 0, now}
write = write or granted > 0
local set = {key, 'c', ''}
for w = 2, #names do
  local window = windows[w]
  local place = 2 * w
  if window[1] > 0 then
    local interval, free, due, base, first, left, late, turn, calls, before, used = unpack(window)
    if granted > 0 then
      due = base + granted * interval
      -- Calls beyond the one that is due are of the burst, and then late ones.
      left = max(0, left - max(0, granted - first))
    end
    local until_due = max(0, due - now)
    if free <= granted then wait = max(wait, until_due - late, 1) end
    if write then
      set[place], set[place + 1] = names[w], pack('<ddddd', due, left, turn, calls + granted, before)
    end
    answer[2 * w + 5], answer[2 * w + 6] = used + granted, until_due
  else
    local _, free, used, oldest, newest, calls, part = unpack(window)
    if free <= granted then wait = max(wait, (oldest + 101) * part - now, 1) end
    if write then
      set[place], set[place + 1] = names[w], pack('<dddd', used + granted, oldest, newest, calls + granted)
    end
    answer[2 * w + 5], answer[2 * w + 6] = used + granted, 0
  end
end
if write then
  changed = now
  if resting == 1 then call('PERSIST', key) end
  set[3] = pack('<dddddd', changed, ahead, born, lost, previous, 0)
  call('HSET', unpack(set))
end
answer[3], answer[7] = math.ceil(wait), changed
return answer
