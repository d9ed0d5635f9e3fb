-- The index of what was asked for lately, of one tenant, on Redis's clock.
-- KEYS: a hash of entries (name -> reads, as of, since when, in all, unread, life, resource, subject) and a
--   sorted set of what is due when. Milliseconds throughout.
-- ARGV[1] is what to do.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function load(name)
  local text = redis.call('HGET', KEYS[1], name)
  if not text then return nil end
  local reads, at, since, all, unread, life, resource, subject =
    text:match('^(%S+) (%d+) (%d+) (%d+) (%d) (%d+) (%S+) (%S+)$')
  if not reads then return nil end
  return {reads = tonumber(reads), at = tonumber(at), since = tonumber(since), all = tonumber(all),
    unread = unread == '1', life = tonumber(life), resource = resource, subject = subject}
end

-- Reads count less the older they are: after three lives a third.
local function faded(entry)
  -- Nothing is later than now, unless the clock was set back.
  return entry.reads * math.exp(math.min(0, entry.at - now) / (3 * entry.life))
end

-- Reads to be expected per life. Of what is younger than a life, a life is taken to have been watched.
local function expected(entry)
  local memory = 3 * entry.life
  local watched = math.max(now - entry.since, entry.life)
  return faded(entry) * entry.life / memory / (1 - math.exp(-watched / memory))
end

-- Milliseconds until the next is due (-1: none is), and how many are on the schedule.
local function schedule()
  local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
  return first[2] and math.max(0, tonumber(first[2]) - now) or -1, redis.call('ZCARD', KEYS[2])
end

if ARGV[1] == 'put' then
  -- ARGV: most entries, time to live, then per entry: name, reads, due in (0: not to be scheduled, -1: to be
  -- taken off the schedule), life, resource, subject, unread (1, 0, or - for as it is).
  -- Answer: milliseconds until the next is due (-1: none), entries on the schedule, then per entry: reads expected per
  -- life in thousandths, 1 if it was unread and is read now, 1 if it is on the schedule.
  local answer = {}
  for at = 4, #ARGV, 7 do
    local name, reads, due, life = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
    local entry = load(name) or {reads = 0, at = now, since = now, all = 0, unread = false}
    if not entry.life then entry.life = life end
    -- The read that began the watch says nothing of how many there are in a life.
    local counted = (entry.all == 0 and reads > 0) and reads - 1 or reads
    entry.reads = faded(entry) + counted
    entry.at, entry.all, entry.life = now, entry.all + reads, life
    entry.resource, entry.subject = ARGV[at + 4], ARGV[at + 5]
    local useful = entry.unread and reads > 0
    if ARGV[at + 6] == '1' then entry.unread = true
    elseif ARGV[at + 6] == '0' or reads > 0 then entry.unread = false end
    redis.call('HSET', KEYS[1], name, string.format('%.4f %d %d %d %d %d %s %s', entry.reads, entry.at, entry.since,
      entry.all, entry.unread and 1 or 0, entry.life, entry.resource, entry.subject))
    local scheduled = 0
    if due < 0 then
      redis.call('ZREM', KEYS[2], name)
    elseif due > 0 and (entry.all >= 2 or entry.unread) then
      -- A claim or a later renewal is not undone by a read of an older copy. What is due later than either could be was
      -- told by a clock that has been set back since.
      local present = tonumber(redis.call('ZSCORE', KEYS[2], name) or nil)
      if not present or present < now + due or present > now + math.max(life, 60000) then
        redis.call('ZADD', KEYS[2], now + due, name)
      end
      scheduled = 1
    end
    answer[#answer + 1] = math.floor(expected(entry) * 1000)
    answer[#answer + 1] = useful and 1 or 0
    answer[#answer + 1] = scheduled
  end
  -- Of eight taken at random, the one with the fewest reads goes. Where there may be fewer than before they go by and by.
  for _ = 1, math.min(64, redis.call('HLEN', KEYS[1]) - tonumber(ARGV[2])) do
    local least, victim
    for _, name in ipairs(redis.call('HRANDFIELD', KEYS[1], 8)) do
      local entry = load(name)
      local reads = entry and faded(entry) or -1
      if not least or reads < least then least, victim = reads, name end
    end
    redis.call('HDEL', KEYS[1], victim)
    redis.call('ZREM', KEYS[2], victim)
  end
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
  local next_due, scheduled = schedule()
  table.insert(answer, 1, next_due)
  table.insert(answer, 2, scheduled)
  return answer
end

if ARGV[1] == 'claim' then
  -- ARGV: at most so many, lease. What is claimed is due again when the lease ends.
  -- Answer: milliseconds until the next is due (-1: none), entries on the schedule, then per entry claimed:
  -- name, resource, subject, reads expected per life in thousandths, 1 if unread, milliseconds overdue, life.
  local names = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[2])
  local claimed = {}
  for at = 1, #names, 2 do
    local name = names[at]
    local entry = load(name)
    if entry then
      redis.call('ZADD', KEYS[2], now + tonumber(ARGV[3]), name)
      for _, field in ipairs({name, entry.resource, entry.subject, math.floor(expected(entry) * 1000),
        entry.unread and 1 or 0, math.max(0, now - tonumber(names[at + 1])), entry.life}) do
        claimed[#claimed + 1] = tostring(field)
      end
    else
      redis.call('ZREM', KEYS[2], name)
    end
  end
  local next_due, scheduled = schedule()
  local answer = {tostring(next_due), tostring(scheduled)}
  for _, field in ipairs(claimed) do answer[#answer + 1] = field end
  return answer
end

-- 'recent': ARGV: from, so many. Of what is on the schedule, because it was asked for more than once, the last to become
-- due is the first. Answer, per entry: name, resource, subject.
local from = tonumber(ARGV[2])
local answer = {}
for _, name in ipairs(redis.call('ZRANGE', KEYS[2], from, from + tonumber(ARGV[3]) - 1, 'REV')) do
  local entry = load(name)
  for _, field in ipairs({name, entry and entry.resource or '', entry and entry.subject or ''}) do
    answer[#answer + 1] = field
  end
end
return answer
