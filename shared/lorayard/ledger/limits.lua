#!lua name=lorayard_limits
-- What the workers of one organisation at a hosted service share: its limits, how much of them is used, its money. The only writer of
-- what is listed here.
--
-- KEYS[1] of every function is the organisation's prefix `ly:{org:NAME}:`. MODEL is the hosted base model: the service limits by that.
-- Functions that count take a token of the caller's as their first argument; called again with it, as by a client whose reply was lost,
-- they answer as before and count nothing.
--
--   told:MODEL     HASH    rpm, tpm, rpd, tpd as the service said in a refusal; forgotten after a day
--   head:MODEL     HASH    tpm, rpd as its last headers said
--   slots:MODEL    LIST    quarters of a second in which something was reserved, oldest first, of the last minute
--   used:MODEL     HASH    r, t: requests and tokens in those; rSLOT, tSLOT: in each
--   day:MODEL      HASH    r, t: what is left of the day's requests and tokens; at: when that was so. It fills up evenly, as the service's does
--   blocked:MODEL  STRING  what for; lives until calls may go on
--   called         HASH    model id -> ms of its last call
--   spent:DATE     HASH    tenant, and * for all -> nano-dollars; DATE is a day or a month (UTC)
--   costs:MONTH    HASH    tenant \t adapter -> nano-dollars
--   once:TOKEN     STRING  the reply, for a minute; of what was settled for ten, of what concerns a batch for a month

local SLOT_MS = 250
local MINUTE_MS, DAY_MS = 60000, 86400000
local DAYS_KEPT, MONTHS_KEPT = 3 * 86400, 400 * 86400
local SETTLED_MS = 600000 -- whose server was away says the same again when it is back
local HELD_MS = 30 * DAY_MS -- a batch is read again as late as its keeper comes back
local MOST_BATCH = 1e15

local function now() -- ms; the only clock here
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function digits(number)
  return string.format('%d', number)
end

-- A whole number from 0 to `most`, whatever was sent: what a function has written when it fails stays written.
local MOST_TOKENS, MOST_NANO = 1e9, 1e12 -- of one call
local function bounded(text, most)
  local number = tonumber(text)
  if not number or number ~= number or number < 0 then return 0 end
  return math.floor(math.min(number, most))
end

local function dates(at) -- day and month, as 2026-11-22 and 2026-11
  local days = math.floor(at / DAY_MS) + 719468 -- since the first of March of the year 0
  local era = math.floor(days / 146097)
  local doe = days - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day, month = doy - math.floor((153 * mp + 2) / 5) + 1, mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local name = string.format('%04d-%02d', year, month)
  return string.format('%s-%02d', name, day), name
end

local function once(p, token, call, ttl_ms)
  local key = p .. 'once:' .. token
  local known = redis.call('GET', key)
  if known then return cjson.decode(known) end
  local reply = call()
  redis.call('SET', key, cjson.encode(reply), 'PX', ttl_ms or 60000)
  return reply
end

-- -- limits ------------------------------------------------------------------------------------------------------------------------------

-- Numbers of rpm, tpm, rpd, tpd: what the service said when it refused, else its headers, else the settings; nil where nobody knows.
local function limits(p, model, set)
  local told = redis.call('HMGET', p .. 'told:' .. model, 'rpm', 'tpm', 'rpd', 'tpd')
  local head = redis.call('HMGET', p .. 'head:' .. model, 'tpm', 'rpd')
  local function known(i, header)
    local value = tonumber(header or told[i] or set[i]) or 0
    return value > 0 and value or nil
  end
  return { rpm = known(1), tpm = known(2, head[1]), rpd = known(3, head[2]), tpd = known(4) }
end

-- The last minute and `margin` ms more: a call may reach the service so much later than another that was reserved at the same moment.
local function read_minute(p, model, at, margin)
  local slots, used = p .. 'slots:' .. model, p .. 'used:' .. model
  local oldest = math.floor((at - MINUTE_MS - margin) / SLOT_MS) - 1
  while true do
    local slot = redis.call('LINDEX', slots, 0)
    if not slot or tonumber(slot) > oldest then break end
    redis.call('LPOP', slots)
    local gone = redis.call('HMGET', used, 'r' .. slot, 't' .. slot)
    redis.call('HINCRBY', used, 'r', -(tonumber(gone[1]) or 0))
    redis.call('HINCRBY', used, 't', -(tonumber(gone[2]) or 0))
    redis.call('HDEL', used, 'r' .. slot, 't' .. slot)
  end
  local totals = redis.call('HMGET', used, 'r', 't')
  return tonumber(totals[1]) or 0, tonumber(totals[2]) or 0
end

local function write_minute(p, model, slot, requests, tokens)
  local used = p .. 'used:' .. model
  if redis.call('LINDEX', p .. 'slots:' .. model, -1) ~= slot then redis.call('RPUSH', p .. 'slots:' .. model, slot) end
  for field, by in pairs({ r = requests, t = tokens }) do
    redis.call('HINCRBY', used, field, by)
    redis.call('HINCRBY', used, field .. slot, by)
  end
  redis.call('PEXPIRE', used, 2 * MINUTE_MS)
  redis.call('PEXPIRE', p .. 'slots:' .. model, 2 * MINUTE_MS)
end

-- ms until so many requests and tokens of the minute have become free
local function minute_wait(p, model, at, margin, requests, tokens)
  for _, slot in ipairs(redis.call('LRANGE', p .. 'slots:' .. model, 0, -1)) do
    local held = redis.call('HMGET', p .. 'used:' .. model, 'r' .. slot, 't' .. slot)
    requests, tokens = requests - (tonumber(held[1]) or 0), tokens - (tonumber(held[2]) or 0)
    if requests <= 0 and tokens <= 0 then return math.max(1, (slot + 1) * SLOT_MS + MINUTE_MS + margin - at) end
  end
  return SLOT_MS
end

-- What is left of the day: requests, tokens; math.huge of what has no limit.
local function read_day(p, model, at, known)
  local held = redis.call('HMGET', p .. 'day:' .. model, 'r', 't', 'at')
  local passed = at - (tonumber(held[3]) or at)
  local function left(limit, level)
    if not limit then return math.huge end
    return math.min(limit, (tonumber(level) or limit) + passed * limit / DAY_MS)
  end
  return left(known.rpd, held[1]), left(known.tpd, held[2])
end

local function write_day(p, model, at, requests, tokens)
  if requests == math.huge and tokens == math.huge then return end
  local values = { 'at', digits(at) }
  for field, level in pairs({ r = requests, t = tokens }) do
    if level < math.huge then
      values[#values + 1] = field
      values[#values + 1] = string.format('%.3f', level)
    end
  end
  redis.call('HSET', p .. 'day:' .. model, unpack(values))
  redis.call('PEXPIRE', p .. 'day:' .. model, 2 * DAY_MS)
end

-- -- money -------------------------------------------------------------------------------------------------------------------------------

local function spend(p, date, month, tenant, nano)
  if nano == 0 then return end
  for name, ttl in pairs({ [date] = DAYS_KEPT, [month] = MONTHS_KEPT }) do
    redis.call('HINCRBY', p .. 'spent:' .. name, tenant, digits(nano))
    redis.call('HINCRBY', p .. 'spent:' .. name, '*', digits(nano))
    redis.call('EXPIRE', p .. 'spent:' .. name, ttl)
  end
end

-- Which of the caps would be passed: 'day' or 'month', whose it is, the tenant's or that of all (*), and the cap; nil if none. A cap below 0
-- is none.
local function over(p, day, month, tenant, nano, caps, caps_of_all)
  for _, whose in ipairs({ { tenant, caps }, { '*', caps_of_all } }) do
    for i, date in ipairs({ day, month }) do
      local who, cap = whose[1], whose[2][i]
      local passed = tonumber(cap) >= 0 and (tonumber(redis.call('HGET', p .. 'spent:' .. date, who)) or 0) + nano > tonumber(cap)
      if passed then return { i == 1 and 'day' or 'month', who, cap } end
    end
  end
end

-- -- what is called ----------------------------------------------------------------------------------------------------------------------

-- lyl_reserve P | token MODEL margin_ms rpm tpm rpd tpd cap_day cap_month, then per call: model_id tokens tenant nano cap_day cap_month
-- -> {calls answered for, wait ms, what for, then per call answered for: 'g' slot idle_ms date | 'b' which whose cap | 'l' limit}
-- In order, up to the first there is no room for. g: granted, and counted; idle_ms since the model's last call, -1 for never.
-- b: no money left for it: of day or month, of its tenant's or of all's (*). l: it has more tokens than a whole minute.
local function reserve(keys, args)
  local p = keys[1]
  return once(p, args[1], function()
    local at, model, margin = now(), args[2], tonumber(args[3])
    local known = limits(p, model, { args[4], args[5], args[6], args[7] })
    local blocked = redis.call('PTTL', p .. 'blocked:' .. model)
    if blocked > 0 then return { 0, blocked, redis.call('GET', p .. 'blocked:' .. model) } end
    local requests, tokens = read_minute(p, model, at, margin)
    local day_requests, day_tokens = read_day(p, model, at, known)
    local day, month = dates(at)
    local slot, reply, n, wait, why = digits(math.floor(at / SLOT_MS)), {}, 0, 0, ''
    local took_requests, took_tokens = 0, 0
    for i = 10, #args, 6 do
      local id, want, tenant, nano = args[i], bounded(args[i + 1], MOST_TOKENS), args[i + 2], bounded(args[i + 3], MOST_NANO)
      local poor = over(p, day, month, tenant, nano, { args[i + 4], args[i + 5] }, { args[8], args[9] })
      if known.tpm and want > known.tpm then
        reply[#reply + 1] = { 'l', known.tpm }
      elseif poor then
        reply[#reply + 1] = { 'b', unpack(poor) }
      elseif (known.rpm and requests + took_requests + 1 > known.rpm) or (known.tpm and tokens + took_tokens + want > known.tpm) then
        local more_requests = known.rpm and requests + took_requests + 1 - known.rpm or 0
        local more_tokens = known.tpm and tokens + took_tokens + want - known.tpm or 0
        wait, why = 0, more_requests > 0 and 'rpm' or 'tpm'
        if took_requests > 0 then write_minute(p, model, slot, took_requests, took_tokens) end
        wait = minute_wait(p, model, at, margin, more_requests, more_tokens)
        requests, tokens, took_requests, took_tokens = requests + took_requests, tokens + took_tokens, 0, 0
        break
      elseif day_requests < 1 then
        wait, why = math.ceil((1 - day_requests) * DAY_MS / known.rpd), 'rpd'
        break
      elseif day_tokens < want then
        wait, why = math.ceil((want - day_tokens) * DAY_MS / known.tpd), 'tpd'
        break
      else
        took_requests, took_tokens = took_requests + 1, took_tokens + want
        day_requests, day_tokens = day_requests - 1, day_tokens - want
        spend(p, day, month, tenant, nano)
        local last = tonumber(redis.call('HGET', p .. 'called', id))
        redis.call('HSET', p .. 'called', id, digits(at))
        reply[#reply + 1] = { 'g', tonumber(slot), last and at - last or -1, day }
      end
      n = n + 1
    end
    if took_requests > 0 then write_minute(p, model, slot, took_requests, took_tokens) end
    write_day(p, model, at, day_requests, day_tokens)
    return { n, math.ceil(wait), why, unpack(reply) }
  end)
end

-- lyl_settle P | token MODEL, then per call: slot tokens tokens_used tenant adapter nano nano_spent date -> 1. What was reserved was too much or
-- too little, and is put right where and when it was reserved.
local function settle(keys, args)
  local p, model = keys[1], args[2]
  return once(p, args[1], function()
    local back = 0
    for i = 3, #args, 8 do
      local slot, more = args[i], bounded(args[i + 2], MOST_TOKENS) - bounded(args[i + 1], MOST_TOKENS)
      if more ~= 0 and redis.call('HEXISTS', p .. 'used:' .. model, 't' .. slot) == 1 then
        redis.call('HINCRBY', p .. 'used:' .. model, 't' .. slot, digits(more))
        redis.call('HINCRBY', p .. 'used:' .. model, 't', digits(more))
      end
      back = back - more
      local date, nano, spent = args[i + 7], bounded(args[i + 5], MOST_NANO), bounded(args[i + 6], MOST_NANO)
      local month = string.sub(date, 1, 7)
      if spent ~= nano then spend(p, date, month, args[i + 3], spent - nano) end
      if spent > 0 then
        redis.call('HINCRBY', p .. 'costs:' .. month, args[i + 3] .. '\t' .. args[i + 4], digits(spent))
        redis.call('EXPIRE', p .. 'costs:' .. month, MONTHS_KEPT)
      end
    end
    if redis.call('HEXISTS', p .. 'day:' .. model, 't') == 1 then redis.call('HINCRBYFLOAT', p .. 'day:' .. model, 't', back) end
    return 1
  end, SETTLED_MS)
end

-- lyl_hold P | token cap_day cap_month, then per job: name tenant nano cap_day cap_month -> {date, {name, tenant, nano, then if there is none: which whose cap}...}
-- Money set aside for jobs that go to a batch service, as far as there is any; `charge` puts what they took in its place.
local function hold(keys, args)
  local p = keys[1]
  return once(p, args[1], function()
    local day, month = dates(now())
    local reply = { day }
    for i = 4, #args, 5 do
      local tenant, nano = args[i + 1], bounded(args[i + 2], MOST_NANO)
      local poor = over(p, day, month, tenant, nano, { args[i + 3], args[i + 4] }, { args[2], args[3] })
      if not poor then spend(p, day, month, tenant, nano) end
      reply[#reply + 1] = { args[i], tenant, nano, unpack(poor or {}) }
    end
    return reply
  end, HELD_MS)
end

-- lyl_charge P | token date, then per row: tenant adapter nano nano_held -> 1. What a batch took, instead of what was held for it then.
local function charge(keys, args)
  local p, date = keys[1], args[2]
  return once(p, args[1], function()
    local month = string.sub(date, 1, 7)
    for i = 3, #args, 4 do
      local spent, held = bounded(args[i + 2], MOST_BATCH), bounded(args[i + 3], MOST_BATCH)
      spend(p, date, month, args[i], spent - held)
      if spent > 0 then
        redis.call('HINCRBY', p .. 'costs:' .. month, args[i] .. '\t' .. args[i + 1], digits(spent))
        redis.call('EXPIRE', p .. 'costs:' .. month, MONTHS_KEPT)
      end
    end
    return 1
  end, HELD_MS)
end

-- lyl_learn P | MODEL source rpm tpm rpd tpd, then name value... -> 1. source 'told': rpm tpm rpd tpd of a refusal. 'head': tpm rpd
-- left_tokens left_requests of headers. What others of the organisation use, who are not our workers, shows in what is left.
local FOREIGN = 0.1 -- the part of a limit by which the service's count may be ahead of ours: calls under way are counted by each in its own way
local function learn(keys, args)
  local p, model, at, said = keys[1], args[1], now(), {}
  for i = 7, #args, 2 do said[args[i]] = bounded(args[i + 1], 1e12) end
  local key = p .. args[2] .. ':' .. model
  for _, name in ipairs({ 'rpm', 'tpm', 'rpd', 'tpd' }) do
    if said[name] then redis.call('HSET', key, name, digits(said[name])) end
  end
  if redis.call('EXISTS', key) == 1 then redis.call('PEXPIRE', key, DAY_MS) end
  if said.tpm and said.left_tokens then
    local _, tokens = read_minute(p, model, at, 0)
    local foreign = math.floor(said.tpm - said.left_tokens - tokens - FOREIGN * said.tpm)
    if foreign > 0 then write_minute(p, model, digits(math.floor(at / SLOT_MS)), 0, foreign) end
  end
  if said.rpd and said.left_requests then
    local set = { args[3], args[4], args[5], args[6] } -- without them the day's tokens would stay where they were, and count as told now
    local requests, tokens = read_day(p, model, at, { rpd = said.rpd, tpd = limits(p, model, set).tpd })
    write_day(p, model, at, math.min(requests, said.left_requests), tokens)
  end
  return 1
end

-- lyl_block P | MODEL ms what -> 1. No call before that; a block that lasts longer stays.
local function block(keys, args)
  local key = keys[1] .. 'blocked:' .. args[1]
  local ms = math.max(1, bounded(args[2], DAY_MS))
  if redis.call('PTTL', key) < ms then redis.call('SET', key, args[3], 'PX', digits(ms)) end
  return 1
end

-- lyl_state P | MODEL margin_ms rpm tpm rpd tpd -> {blocked ms, what for, day, month, then name value of limits and use}
local function state(keys, args)
  local p, at, model = keys[1], now(), args[1]
  local known = limits(p, model, { args[3], args[4], args[5], args[6] })
  local totals = redis.call('HMGET', p .. 'used:' .. model, 'r', 't')
  local day_requests, day_tokens = read_day(p, model, at, known)
  local reply = { math.max(0, redis.call('PTTL', p .. 'blocked:' .. model)), redis.call('GET', p .. 'blocked:' .. model) or '', dates(at) }
  local rows = { used_requests = totals[1] or 0, used_tokens = totals[2] or 0 }
  for name, value in pairs(known) do rows[name] = value end
  if day_requests < math.huge then rows.left_requests = math.floor(day_requests) end
  if day_tokens < math.huge then rows.left_tokens = math.floor(day_tokens) end
  for name, value in pairs(rows) do
    reply[#reply + 1] = name
    reply[#reply + 1] = tostring(value)
  end
  return reply
end

local library = {
  { 'lyl_reserve', reserve, 'allow-oom' }, { 'lyl_settle', settle, 'allow-oom' }, { 'lyl_hold', hold, 'allow-oom' },
  { 'lyl_charge', charge, 'allow-oom' },
  { 'lyl_learn', learn, 'allow-oom' }, { 'lyl_block', block, 'allow-oom' }, { 'lyl_state', state, 'no-writes' },
}
for i = 1, #library do
  redis.register_function({ function_name = library[i][1], callback = library[i][2], flags = { library[i][3] } })
end
