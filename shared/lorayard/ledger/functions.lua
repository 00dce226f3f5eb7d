#!lua name=lorayard
-- The ledger: every transition of a job, each one call that may carry many jobs. The only writer of what is listed here.
--
-- KEYS[1] of every function is the pool's prefix `ly:{POOL}:`; all keys are derived from it, so all lie in one hash slot.
-- A job is named by its ref, TENANT/ID: one tenant's ids can therefore never reach another tenant's jobs.
-- Every function may be called again with the same arguments, as a client does whose reply was lost, and changes nothing then. (What
-- `renew` said of jobs to stop it says once; the channel has said it too.)
--
--   job:REF              STRING  of a living job: head \n birth \n meta \n request
--                                of an ended one, with a TTL: end \n birth \n meta \n outcome; a dead letter has two more lines, head \n request
--   queue:DIGEST:TENANT  ZSET    id -> due ms; when it was claimed, of one whose worker was lost, if that is earlier. DIGEST has the lane behind
--                                it, where there is one: DIGEST@LANE (jobs.py), so that who serves one lane never claims another's
--   groups               SET     DIGEST:TENANT of every queue that is not empty
--   paused               SET     pool | adapter:DIGEST | tenant:TENANT | group:DIGEST:TENANT
--   delayed              ZSET    ref -> ms when it goes to its queue
--   deadlines            ZSET    ref -> ms when it expires unless it was started
--   batch:BID            HASH    w worker, i incarnation, k token of the take, d digest, f fence, c claimed ms, t taken ms, n jobs,
--                                by tenants, y why; of a submitted one: s submitted ms, o note, x token of who looks after it
--   members:BID          SET     refs not ended yet
--   begun:BID            SET     those of them that were started
--   stop:BID             SET     refs cancelled, deleted or recalled while at a worker, until the worker has heard of it
--   leases               ZSET    batch -> expiry ms (of the delivery until it is taken, of the lease from then on)
--   submitted            ZSET    batch -> ms when it is looked at next: batches at a hosted batch service, no worker's, with no lease
--   outstanding:WORKER   SET     batches
--   once:TENANT:HASH     STRING  id of the job that computes for all of its tenant that ask for the very same and want it computed once (HASH
--                                stands in their meta lines); with a TTL once it has succeeded
--   follows              HASH    ref -> id of the job whose outcome a living one waits for, instead of being in a queue
--   behind:REF           ZSET    id -> due ms, of those that follow it
--   tries                HASH    ref -> attempts \t laters \t why, of living jobs that came back from a worker; why is the last error that one
--                                came back with: JSON of its code and message, or nothing
--   dead:TENANT          ZSET    id -> ms; dead letters: failed at the attempt cap
--   idem:TENANT:KEY      STRING  id \t digest of the body
--   by_tenant:TENANT     ZSET    id -> enqueued ms
--   served               HASH    tenant, or tenant@hosted -> tokens that local, or hosted workers computed for it
--   counts               HASH    queued (exact), and totals since the pool was made
--   leader               HASH    id, epoch, until
--   fence                STRING  counter
--   reaped               STRING  ms; when leases were last looked through
--   events               STREAM  k kind (queued, batch, worker), v value: for schedulers; capped: a hint, never the truth
--   ends                 STREAM  k ended, v refs: for whoever waits for results; as lossy
--   to:WORKER            CHANNEL "take BID" at once, "stop BID REF..." at once; lossy: the Celery message, the lease and `stop:BID` are what counts
--
-- head:  flag \t due \t deadline \t digest \t tenant \t max attempts \t idem     flag: '-' with neither deadline, idem nor HASH, 'x' with one
-- birth: enqueued \t via
-- end:   status \t fence \t ended \t claimed \t taken \t attempts \t worker \t batch \t batch size \t why \t digest \t idem
-- Totals: enqueued + revived = succeeded + failed + cancelled + expired + deleted_live + the jobs that live.
--
-- What is said for each job is kept short, and what commands can take for many is given to them at once: a call of one command costs 1 µs,
-- and this is one thread for everybody (docs/benchmarks.md).

local EVENTS_KEPT = 4000
local MOST = 2000 -- arguments of one command: what Lua's stack surely holds

local function now() -- ms; the only clock of the ledger
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function digits(number) -- redis.call would print it as a floating point number, which takes longer
  return string.format('%d', number)
end

-- What one call of a function changes beside jobs themselves, told once at its end.
local function begin(keys)
  local at = now()
  return { p = keys[1], at = at, at_text = digits(at), groups = {}, ended = {}, counts = {} }
end

local function chunks(list, call)
  for i = 1, #list, MOST do
    call(unpack(list, i, math.min(i + MOST - 1, #list)))
  end
end

-- Replies of a command that answers with a list, over any number of arguments.
local function gather(command, key, list)
  local values = {}
  for i = 1, #list, MOST do
    local part
    if key then
      part = redis.call(command, key, unpack(list, i, math.min(i + MOST - 1, #list)))
    else
      part = redis.call(command, unpack(list, i, math.min(i + MOST - 1, #list)))
    end
    for k = 1, #part do values[i + k - 1] = part[k] end
  end
  return values
end

local function count(c, what, by)
  c.counts[what] = (c.counts[what] or 0) + by
end

local function event(p, kind, value)
  local stream = kind == 'ended' and 'ends' or 'events' -- a scheduler has no use for every ref
  redis.call('XADD', p .. stream, 'MAXLEN', '~', EVENTS_KEPT, '*', 'k', kind, 'v', value)
end

local function tell(p, kind, list)
  for i = 1, #list, MOST do
    event(p, kind, table.concat(list, ' ', i, math.min(i + MOST - 1, #list)))
  end
end

local function commit(c)
  for what, by in pairs(c.counts) do
    if by ~= 0 then redis.call('HINCRBY', c.p .. 'counts', what, by) end
  end
  local names = {}
  for group in pairs(c.groups) do names[#names + 1] = group end
  table.sort(names)
  tell(c.p, 'queued', names)
  tell(c.p, 'ended', c.ended)
end

-- -- one job -----------------------------------------------------------------------------------------------------------------------------

local function lives(value) -- its first character tells
  local first = value and string.byte(value)
  return first == 45 or first == 120 -- '-' 'x'
end

-- A living job, or nil.
local function parse_job(ref, value)
  if not lives(value) then return nil end
  local flag, due, deadline, digest, tenant, max, idem, birth, meta, request =
    string.match(value, '^(.)\t(%d+)\t(%d+)\t([^\t]+)\t([^\t]+)\t(%d+)\t([^\n]*)\n([^\n]*)\n([^\n]*)\n(.*)$')
  return {
    ref = ref, flag = flag, due = due, deadline = tonumber(deadline), digest = digest, tenant = tenant, max = tonumber(max), idem = idem,
    birth = birth, meta = meta, request = request, id = string.sub(ref, #tenant + 2),
  }
end

local function read_job(p, ref)
  return parse_job(ref, redis.call('GET', p .. 'job:' .. ref))
end

local function head_of(job)
  return table.concat({ job.flag, job.due, digits(job.deadline), job.digest, job.tenant, job.max, job.idem }, '\t')
end

local function group_of(job)
  return job.digest .. ':' .. job.tenant
end

local function push(c, job, place) -- into its queue, where it is due, or at a place further in front
  local group = group_of(job)
  local first = job.flag == 'x' and redis.call('ZRANGE', c.p .. 'behind:' .. job.ref, 0, 0, 'WITHSCORES')[2]
  if first and tonumber(first) < tonumber(place or job.due) then place = first end -- for whoever waits for its outcome
  if redis.call('ZADD', c.p .. 'queue:' .. group, place or job.due, job.id) == 1 then count(c, 'queued', 1) end
  redis.call('SADD', c.p .. 'groups', group)
  c.groups[group] = true
end

local function leave_queue(c, job) -- true if it was queued
  local group = group_of(job)
  if redis.call('ZREM', c.p .. 'queue:' .. group, job.id) == 0 then return false end
  if redis.call('EXISTS', c.p .. 'queue:' .. group) == 0 then redis.call('SREM', c.p .. 'groups', group) end
  count(c, 'queued', -1)
  return true
end

-- How often it was started and came back, how often it was put off, and the last error it came back with.
local function parse_tries(text)
  if not text then return 0, 0, '' end
  local attempts, laters, why = string.match(text, '^(%d+)\t(%d+)\t?(.*)$')
  return tonumber(attempts), tonumber(laters), why
end

local function read_tries(p, ref)
  return parse_tries(redis.call('HGET', p .. 'tries', ref))
end

-- Of many: texts for parse_tries. Mostly nobody has any.
local function all_tries(p, refs)
  if redis.call('EXISTS', p .. 'tries') == 0 then return {} end
  return gather('HMGET', p .. 'tries', refs)
end

local function write_tries(p, ref, attempts, laters, why)
  if attempts + laters > 0 then
    redis.call('HSET', p .. 'tries', ref, attempts .. '\t' .. laters .. (why == '' and '' or '\t' .. why))
  end
end

local WHY_BYTES = 300 -- of a message: whole queues may be put off at once

-- Of an outcome: code and message of its error, as JSON; nothing where it tells none.
local function why_of(outcome)
  local readable, told = pcall(cjson.decode, outcome)
  local error = readable and type(told) == 'table' and told.error
  if type(error) ~= 'table' or type(error.code) ~= 'string' or type(error.message) ~= 'string' then return '' end
  local message, last = error.message, WHY_BYTES
  if #message > last then
    while string.byte(message, last + 1) >= 128 and string.byte(message, last + 1) < 192 do last = last - 1 end -- no half of a character
    message = string.sub(message, 1, last) .. '…'
  end
  return '{"code":' .. cjson.encode(error.code) .. ',"message":' .. cjson.encode(message) .. '}'
end

-- An outcome with more before it: `fields` is JSON without its braces.
local function with(fields, outcome)
  return '{' .. fields .. (outcome == '{}' and '}' or ',' .. string.sub(outcome, 2))
end

-- The outcome of a job that came back before: it says how often it was put off, and why the last time.
local function with_tries(tries, outcome)
  local _, laters, why = parse_tries(tries)
  if laters > 0 then outcome = with('"postponed":' .. laters, outcome) end
  return why == '' and outcome or with('"postponed_why":' .. why, outcome)
end

-- -- one batch ---------------------------------------------------------------------------------------------------------------------------

local NO_BATCH = { id = '', worker = '', claimed = '0', taken = '0', size = '0', why = '' }

local function read_batch(p, bid)
  local b = redis.call('HMGET', p .. 'batch:' .. bid, 'w', 'f', 'c', 't', 'n', 'y', 'i', 'k', 'd', 's')
  if not b[1] then return NO_BATCH end
  return {
    id = bid, worker = b[1], fence = b[2], claimed = b[3], taken = b[4] or '0', size = b[5], why = b[6] or '', incarnation = b[7],
    token = b[8], digest = b[9], was_taken = b[4] and true, submitted = b[10],
  }
end

local function all_batches(p)
  local names = redis.call('ZRANGE', p .. 'leases', 0, -1)
  for _, bid in ipairs(redis.call('ZRANGE', p .. 'submitted', 0, -1)) do names[#names + 1] = bid end
  return names
end

-- The batches that have jobs which are neither queued nor delayed, by ref: {batch, 1 where the job has begun}. They are looked for among
-- the few there are, in each once for all jobs.
local function batches_of(p, refs)
  local found = {}
  for _, bid in ipairs(all_batches(p)) do
    if #refs == 0 then break end
    local batch
    for i, inside in ipairs(gather('SMISMEMBER', p .. 'members:' .. bid, refs)) do
      if inside == 1 then
        batch = batch or read_batch(p, bid)
        found[refs[i]] = { batch, redis.call('SISMEMBER', p .. 'begun:' .. bid, refs[i]) }
      end
    end
    if batch then
      local left = {}
      for _, ref in ipairs(refs) do
        if not found[ref] then left[#left + 1] = ref end
      end
      refs = left
    end
  end
  return found
end

local function batch_of(p, ref)
  local found = batches_of(p, { ref })[ref]
  if not found then return NO_BATCH, 0 end
  return found[1], found[2]
end

local function close_if_empty(c, bid)
  if redis.call('EXISTS', c.p .. 'members:' .. bid) == 1 then return end
  local worker, submitted = unpack(redis.call('HMGET', c.p .. 'batch:' .. bid, 'w', 's'))
  if submitted then return end -- something of it is still at the service: `settle` closes it
  redis.call('DEL', c.p .. 'batch:' .. bid, c.p .. 'begun:' .. bid)
  redis.call('ZREM', c.p .. 'leases', bid)
  if redis.call('EXISTS', c.p .. 'stop:' .. bid) == 1 then redis.call('PEXPIRE', c.p .. 'stop:' .. bid, 60000) end
  if worker then
    redis.call('SREM', c.p .. 'outstanding:' .. worker, bid)
    event(c.p, 'batch', bid)
  end
end

-- -- the ends of a job -------------------------------------------------------------------------------------------------------------------

-- The end line, in two parts about the number of attempts.
local function end_line(c, status, fence, batch)
  return table.concat({ status, fence, c.at_text, batch.claimed, batch.taken, '' }, '\t'),
    table.concat({ '', batch.worker, batch.id, batch.size, batch.why, '' }, '\t')
end

-- What is left of a living job elsewhere, once it has ended.
local function clean(c, job, ttl)
  if job.deadline > 0 then redis.call('ZREM', c.p .. 'deadlines', job.ref) end
  if job.idem ~= '' then redis.call('EXPIRE', c.p .. 'idem:' .. job.tenant .. ':' .. job.idem, ttl) end
end

-- `outcome` is JSON; `rest` is what a dead letter keeps.
local function store(c, job, status, fence, outcome, ttl, attempts, batch, rest)
  local front, back = end_line(c, status, fence, batch)
  local value = front .. attempts .. back .. job.digest .. '\t' .. job.idem .. '\n' .. job.birth .. '\n' .. job.meta .. '\n' .. outcome
  redis.call('SET', c.p .. 'job:' .. job.ref, value .. (rest or ''), 'EX', ttl)
  clean(c, job, ttl)
  count(c, status, 1)
  c.ended[#c.ended + 1] = job.ref
end

-- -- the same request of many jobs, computed once ------------------------------------------------------------------------------------------

local FOLLOWERS = 1000 -- behind one job: all of them end in one call

-- By a meta line, which begins with it: what jobs that are to be computed once have in common; nil for others.
local function once_of(meta)
  return string.match(meta, '^{"coalesce":"(%x+)"')
end

-- The outcome of another job, saying whose.
local function copied(outcome, leader)
  return with('"coalesced_with":"' .. leader .. '"', outcome)
end

local function same_as(leader)
  return { id = '', worker = '', claimed = '0', taken = '0', size = '0', why = 'computed once, by ' .. leader }
end

local function stop_following(c, ref, leader)
  redis.call('HDEL', c.p .. 'follows', ref)
  redis.call('ZREM', c.p .. 'behind:' .. leader, string.match(ref, '/(.*)$'))
end

-- A job has ended, or is deleted: those behind it end as it did if it has succeeded; else the most due of them takes its place.
local function pass_on(c, job, status, outcome, ttl)
  local p, hash = c.p, once_of(job.meta)
  if not hash then return end
  local once, behind = p .. 'once:' .. job.tenant .. ':' .. hash, p .. 'behind:' .. job.ref
  local leads = redis.call('GET', once) == job.id
  local next_id
  for _, id in ipairs(redis.call('ZRANGE', behind, 0, -1)) do
    local ref = job.tenant .. '/' .. id
    local follower = redis.call('HGET', p .. 'follows', ref) == job.id and read_job(p, ref)
    if follower and status == 'succeeded' then
      redis.call('HDEL', p .. 'follows', ref)
      store(c, follower, status, 0, copied(outcome, job.id), ttl, 0, same_as(job.id))
      count(c, 'coalesced', 1)
    elseif follower and not next_id then
      next_id = id
      redis.call('HDEL', p .. 'follows', ref)
      redis.call('ZREM', behind, id)
      if redis.call('EXISTS', behind) == 1 then redis.call('RENAME', behind, p .. 'behind:' .. ref) end
      push(c, follower)
    elseif follower then
      redis.call('HSET', p .. 'follows', ref, next_id)
    end
  end
  if not next_id then redis.call('DEL', behind) end
  if leads and status == 'succeeded' then
    redis.call('EXPIRE', once, ttl)
  elseif leads and next_id then
    redis.call('SET', once, next_id)
  elseif leads then
    redis.call('DEL', once)
  end
end

-- The one way into a terminal status, but for the plain case in `finish`.
local function conclude(c, job, status, fence, outcome, ttl, attempts, batch, rest)
  local tries = redis.call('HGET', c.p .. 'tries', job.ref)
  if tries then
    redis.call('HDEL', c.p .. 'tries', job.ref)
    outcome = with_tries(tries, outcome)
  end
  store(c, job, status, fence, outcome, ttl, attempts, batch, rest)
  if job.flag == 'x' then pass_on(c, job, status, outcome, ttl) end
end

-- A job at its attempt cap goes to the dead letters with its request, so that it can be retried by hand.
local function bury(c, job, fence, outcome, ttl, attempts, batch)
  conclude(c, job, 'failed', fence, outcome, ttl, attempts, batch, '\n' .. head_of(job) .. '\n' .. job.request)
  redis.call('ZADD', c.p .. 'dead:' .. job.tenant, c.at_text, job.id)
  count(c, 'dead', 1)
end

-- Take a living job out of wherever it is, for good. The worker that has it hears of it at once, or when it renews, or when it would start it.
local function withdraw(c, job)
  local leader = job.flag == 'x' and redis.call('HGET', c.p .. 'follows', job.ref)
  if leader then
    stop_following(c, job.ref, job.tenant .. '/' .. leader)
    return NO_BATCH, 0
  end
  if leave_queue(c, job) or redis.call('ZREM', c.p .. 'delayed', job.ref) == 1 then return NO_BATCH, 0 end
  local batch, begun = batch_of(c.p, job.ref)
  if batch.id ~= '' then
    redis.call('SREM', c.p .. 'members:' .. batch.id, job.ref)
    redis.call('SREM', c.p .. 'begun:' .. batch.id, job.ref)
    if not batch.submitted then
      redis.call('SADD', c.p .. 'stop:' .. batch.id, job.ref)
      redis.call('PUBLISH', c.p .. 'to:' .. batch.worker, 'stop ' .. batch.id .. ' ' .. job.ref)
    end
    close_if_empty(c, batch.id)
  end
  return batch, begun
end

-- `why`: what it waited for, of a job that no worker had.
local function end_at_once(c, job, status, outcome, ttl, why)
  local batch, begun = withdraw(c, job)
  if why and batch.id == '' then batch = { id = '', worker = '', claimed = '0', taken = '0', size = '0', why = why } end
  conclude(c, job, status, 0, outcome, ttl, read_tries(c.p, job.ref) + begun, batch)
end

local LOST = '{"error":{"message":"the worker was lost while it ran this job, as often as attempts are allowed","type":"server_error","code":"worker_lost","param":null}}'

-- Take one job out of a batch and queue it again, in front of what has not had its turn yet. One that had started has used an attempt.
local function requeue(c, ref, batch, begun, ttl)
  local job = read_job(c.p, ref)
  if redis.call('SREM', c.p .. 'members:' .. batch.id, ref) == 0 or not job then return end
  local attempts, laters, why = read_tries(c.p, ref)
  attempts = attempts + begun
  if begun == 1 and attempts >= job.max then
    bury(c, job, batch.fence, LOST, ttl, attempts, batch)
  else
    write_tries(c.p, ref, attempts, laters, why)
    push(c, job, digits(math.min(tonumber(job.due), tonumber(batch.claimed))))
    count(c, 'requeued', 1)
  end
end

local function requeue_batch(c, bid, ttl)
  local batch, refs = read_batch(c.p, bid), redis.call('SMEMBERS', c.p .. 'members:' .. bid)
  local begun = gather('SMISMEMBER', c.p .. 'begun:' .. bid, refs)
  for i, ref in ipairs(refs) do requeue(c, ref, batch, begun[i], ttl) end
  close_if_empty(c, bid)
end

-- -- producers ---------------------------------------------------------------------------------------------------------------------------

-- Bytes that may still be stored before a part of maxmemory is used; without a maxmemory, as many as anyone wants.
local function room_in_memory(part)
  local info = redis.call('INFO', 'memory')
  local most = tonumber(string.match(info, '\nmaxmemory:(%d+)'))
  if not most or most == 0 then return math.huge end
  return most * part - tonumber(string.match(info, 'used_memory:(%d+)'))
end

local OVERHEAD = 400 -- bytes that a queued job takes beside its text: keys, headers, index entries (benchmarks.ledger)

-- What jobs enqueued together share, worked out once for all that say the same.
local function sort_of(c, same, queues, tenants)
  local tenant, digest, wait, deadline, not_before, max, via, idem, hash, once =
    string.match(same, '^([^\t]*)\t([^\t]*)\t(%d+)\t(%d+)\t(%d+)\t(%d+)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t(%x*)$')
  wait, deadline, not_before = tonumber(wait), tonumber(deadline), tonumber(not_before)
  local due = digits(c.at + (deadline > 0 and deadline or not_before + wait))
  local expiry = deadline > 0 and digits(c.at + deadline) or '0'
  local flag = (deadline > 0 or idem ~= '' or once ~= '') and 'x' or '-'
  local group = digest .. ':' .. tenant
  tenants[tenant] = tenants[tenant] or {}
  if not_before == 0 then queues[group] = queues[group] or {} end
  return {
    tenant = tenant, due = due, expiry = expiry, wake = not_before > 0 and digits(c.at + not_before), idem = idem, hash = hash,
    once = once ~= '' and not_before == 0 and once, digest = digest,
    queue = queues[group], list = tenants[tenant],
    head = table.concat({ flag, due, expiry, digest, tenant, max, idem }, '\t') .. '\n' .. c.at_text .. '\t' .. via .. '\n',
  }
end

-- A job that is to be computed once: the id of another one, of the same call perhaps, that computes it for both, and that one's value if it has
-- succeeded; nil, if it is the first, or as many as may follow do already.
local function leader_of(p, sort, id, fresh)
  local once = p .. 'once:' .. sort.tenant .. ':' .. sort.once
  local leader = redis.call('GET', once)
  if leader then
    local ref = sort.tenant .. '/' .. leader
    local value = not fresh[ref] and redis.call('GET', p .. 'job:' .. ref)
    if value and string.sub(value, 1, 10) == 'succeeded\t' then return leader, value end
    if (fresh[ref] or lives(value)) and redis.call('ZCARD', p .. 'behind:' .. ref) < FOLLOWERS then return leader end
  end
  redis.call('SET', once, id)
  return nil
end

-- The value of a job that asks for what another one has computed. It lives as long as that, not longer.
local function copy_of(c, sort, payload, leader, value)
  local outcome = string.match(value, '^[^\n]*\n[^\n]*\n[^\n]*\n([^\n]*)')
  local front, back = end_line(c, 'succeeded', 0, same_as(leader))
  local birth = string.match(sort.head, '\n(.*)$')
  return front .. 0 .. back .. sort.digest .. '\t' .. sort.idem .. '\n' .. birth .. string.match(payload, '^[^\n]*\n') .. copied(outcome, leader)
end

-- ly_enqueue P | max_queued max_memory, then per job: id same payload
-- `same`: tenant digest wait_ms deadline_ms not_before_ms max_attempts via idem hash once, joined by tabs
-- -> index and answer of each job that is not simply queued: 'd' delayed, 'e'..id the same again, 'c' the key or id with another body,
--    'f' too many jobs, 'm' too little memory, 's' succeeded: what it asks for was computed before
local function enqueue(keys, args)
  local c = begin(keys)
  local p, reply, names, refs = c.p, {}, {}, {}
  local room = tonumber(args[1]) - tonumber(redis.call('HGET', p .. 'counts', 'queued') or 0) - redis.call('ZCARD', p .. 'delayed')
  room = room - redis.call('HLEN', p .. 'follows')
  local bytes = room_in_memory(tonumber(args[2]))
  local sorts, queues, tenants = {}, {}, {}
  for i = 3, #args, 3 do
    local sort = sorts[args[i + 1]]
    if not sort then
      sort = sort_of(c, args[i + 1], queues, tenants)
      sorts[args[i + 1]] = sort
    end
    local ref = sort.tenant .. '/' .. args[i]
    refs[#refs + 1] = ref
    names[#names + 1] = p .. 'job:' .. ref
  end
  local known_ids = 0 -- one question for all: an id that is there already is rare
  chunks(names, function(...) known_ids = known_ids + redis.call('EXISTS', ...) end)
  local values, fresh, queued, n, sooner, copies = {}, {}, 0, 0, {}, {}
  for k = 1, #refs do
    local i = 3 * k
    local id, sort, payload, ref, answer = args[i], sorts[args[i + 1]], args[i + 2], refs[k], nil
    local idem = sort.idem
    local known = idem ~= '' and redis.call('GET', p .. 'idem:' .. sort.tenant .. ':' .. idem)
    if known then
      local first, body = string.match(known, '^(.-)\t(.*)$')
      answer = body == sort.hash and 'e' .. first or 'c'
    elseif fresh[ref] or (known_ids > 0 and redis.call('EXISTS', names[k]) == 1) then
      answer = idem == '' and 'e' .. id or 'c'
    elseif room <= 0 then
      answer = 'f'
    elseif bytes < #payload + OVERHEAD then
      answer = 'm'
    else
      local leader, done
      if sort.once then leader, done = leader_of(p, sort, id, fresh) end
      room, bytes, fresh[ref] = room - 1, bytes - #payload - OVERHEAD, true
      values[n + 1] = names[k]
      values[n + 2] = done and copy_of(c, sort, payload, leader, done) or sort.head .. payload
      n = n + 2
      if idem ~= '' then
        redis.call('SET', p .. 'idem:' .. sort.tenant .. ':' .. idem, id .. '\t' .. sort.hash)
        redis.call('ZREM', p .. 'dead:' .. sort.tenant, id) -- one of this id whose result has expired
      end
      if sort.expiry ~= '0' and not done then redis.call('ZADD', p .. 'deadlines', sort.expiry, ref) end
      local list = sort.list
      local m = #list
      list[m + 1] = c.at_text
      list[m + 2] = id
      if done then
        copies[#copies + 1] = { ref, sort }
        answer = 's'
      elseif leader then
        redis.call('HSET', p .. 'follows', ref, leader)
        redis.call('ZADD', p .. 'behind:' .. sort.tenant .. '/' .. leader, sort.due, id)
        sooner[#sooner + 1] = { sort, leader }
      elseif sort.wake then
        redis.call('ZADD', p .. 'delayed', sort.wake, ref)
        answer = 'd'
      else
        list = sort.queue
        m = #list
        list[m + 1] = sort.due
        list[m + 2] = id
        queued = queued + 1
      end
    end
    if answer then
      reply[#reply + 1] = k - 1
      reply[#reply + 1] = answer
    end
  end
  chunks(values, function(...) redis.call('MSET', ...) end)
  local groups = {}
  for group, entries in pairs(queues) do
    if #entries > 0 then
      chunks(entries, function(...) redis.call('ZADD', p .. 'queue:' .. group, ...) end)
      groups[#groups + 1] = group
      c.groups[group] = true
    end
  end
  chunks(groups, function(...) redis.call('SADD', p .. 'groups', ...) end)
  for tenant, entries in pairs(tenants) do
    chunks(entries, function(...) redis.call('ZADD', p .. 'by_tenant:' .. tenant, ...) end)
  end
  for _, follower in ipairs(sooner) do -- what computes it is as urgent as they are
    local sort, leader = unpack(follower)
    local group = sort.digest .. ':' .. sort.tenant
    redis.call('ZADD', p .. 'queue:' .. group, 'XX', 'LT', sort.due, leader)
    c.groups[group] = true
  end
  for _, copy in ipairs(copies) do
    local ref, sort = unpack(copy)
    local ttl = math.max(1, redis.call('PTTL', p .. 'once:' .. sort.tenant .. ':' .. sort.once))
    redis.call('PEXPIRE', p .. 'job:' .. ref, ttl)
    if sort.idem ~= '' then redis.call('PEXPIRE', p .. 'idem:' .. sort.tenant .. ':' .. sort.idem, ttl) end
    c.ended[#c.ended + 1] = ref
  end
  count(c, 'succeeded', #copies)
  count(c, 'coalesced', #copies)
  count(c, 'queued', queued)
  count(c, 'enqueued', n / 2)
  commit(c)
  return reply
end

local CANCELLED = '{"error":{"message":"cancelled by request","type":"invalid_request_error","code":"cancelled","param":null}}'
local EXPIRED = '{"error":{"message":"its deadline passed before it was started","type":"server_error","code":"expired","param":null}}'

-- ly_cancel P | tenant ttl_s id... -> per job 'c' cancelled, 't' ended before, 'n' no such job
local function cancel(keys, args)
  local c, reply = begin(keys), {}
  for i = 3, #args do
    local ref = args[1] .. '/' .. args[i]
    local value = redis.call('GET', c.p .. 'job:' .. ref)
    if not value then
      reply[#reply + 1] = 'n'
    elseif not lives(value) then
      reply[#reply + 1] = 't'
    else
      end_at_once(c, parse_job(ref, value), 'cancelled', CANCELLED, args[2])
      reply[#reply + 1] = 'c'
    end
  end
  commit(c)
  return reply
end

-- ly_delete P | tenant id... -> per job 'd' deleted, 'n' no such job. Nothing with its id is left.
local function delete(keys, args)
  local c, tenant, reply = begin(keys), args[1], {}
  for i = 2, #args do
    local id = args[i]
    local ref = tenant .. '/' .. id
    local value = redis.call('GET', c.p .. 'job:' .. ref)
    if not value then
      reply[#reply + 1] = 'n'
    else
      local idem = string.match(value, '^[^\n]*\t([^\t\n]*)\n') -- the last field of head and end alike
      local job = parse_job(ref, value)
      if job then
        withdraw(c, job)
        redis.call('ZREM', c.p .. 'deadlines', ref)
        redis.call('HDEL', c.p .. 'tries', ref)
        count(c, 'deleted_live', 1)
        if job.flag == 'x' then pass_on(c, job, 'deleted') end
      end
      local once = once_of(string.match(value, '^[^\n]*\n[^\n]*\n([^\n]*)'))
      if once and redis.call('GET', c.p .. 'once:' .. tenant .. ':' .. once) == id then redis.call('DEL', c.p .. 'once:' .. tenant .. ':' .. once) end
      redis.call('DEL', c.p .. 'job:' .. ref)
      if idem ~= '' then redis.call('DEL', c.p .. 'idem:' .. tenant .. ':' .. idem) end
      redis.call('ZREM', c.p .. 'by_tenant:' .. tenant, id)
      redis.call('ZREM', c.p .. 'dead:' .. tenant, id)
      count(c, 'deleted', 1)
      c.ended[#c.ended + 1] = ref
      reply[#reply + 1] = 'd'
    end
  end
  commit(c)
  return reply
end

-- ly_revive P | tenant id... -> per job 'q' queued again as if it were new, 'n' no dead letter
local function revive(keys, args)
  local c, tenant, reply = begin(keys), args[1], {}
  for i = 2, #args do
    local id = args[i]
    local ref = tenant .. '/' .. id
    local value = redis.call('ZREM', c.p .. 'dead:' .. tenant, id) == 1 and redis.call('GET', c.p .. 'job:' .. ref)
    local birth, meta, head, request = string.match(value or '', '^[^\n]*\n([^\n]*)\n([^\n]*)\n[^\n]*\n([^\n]*)\n(.*)$')
    if not head then
      reply[#reply + 1] = 'n'
    else
      local job = parse_job(ref, head .. '\n' .. birth .. '\n' .. meta .. '\n' .. request)
      local enqueued, via = string.match(birth, '^(%d+)\t(.*)$')
      job.due = digits(c.at + math.max(0, tonumber(job.due) - tonumber(enqueued))) -- as long a wait as it had asked for
      job.deadline = 0 -- it may have passed, and whoever retries wants it run
      job.flag = (job.idem ~= '' or once_of(meta)) and 'x' or '-'
      redis.call('SET', c.p .. 'job:' .. ref, head_of(job) .. '\n' .. c.at_text .. '\t' .. via .. '\n' .. meta .. '\n' .. request)
      redis.call('ZADD', c.p .. 'by_tenant:' .. tenant, c.at_text, id)
      if job.idem ~= '' then redis.call('PERSIST', c.p .. 'idem:' .. tenant .. ':' .. job.idem) end
      push(c, job)
      count(c, 'revived', 1)
      reply[#reply + 1] = 'q'
    end
  end
  commit(c)
  return reply
end

-- -- scheduler ---------------------------------------------------------------------------------------------------------------------------

local function read_paused(p)
  local paused = {}
  for _, what in ipairs(redis.call('SMEMBERS', p .. 'paused')) do paused[what] = true end
  return paused
end

-- What of it is, in words; false where nothing is.
local function is_paused(paused, digest, tenant)
  digest = string.match(digest, '^[^@]*') -- in whatever lane
  return paused['pool'] and 'the pool' or paused['adapter:' .. digest] and 'its adapter' or paused['tenant:' .. tenant] and 'its tenant'
    or paused['group:' .. digest .. ':' .. tenant] and 'its adapter for its tenant' or false
end

-- What a job that no worker has waits for, as the scheduler would put it (lorayard/ledger/explained.py).
local function waits_for(p, job)
  local leader = redis.call('HGET', p .. 'follows', job.ref)
  if leader then return 'for the answer to ' .. leader .. ', which asks for the very same' end
  local place = redis.call('ZRANK', p .. 'queue:' .. group_of(job), job.id)
  if not place then return 'until a later time' end
  local paused = is_paused(read_paused(p), job.digest, job.tenant)
  return paused and 'for a pause of ' .. paused or 'behind ' .. place .. (place == 1 and ' job' or ' jobs') .. ' of its own adapter and tenant'
end

-- ly_claim P | epoch worker max_outstanding batch digest delivery_ms why, then per tenant: tenant n
-- -> {'ok', fence, n} | {'epoch'} | {'busy'} | {'paused'} | {'empty'}
local function claim(keys, args)
  local c = begin(keys)
  local p, epoch, worker, most, bid, digest = c.p, args[1], args[2], tonumber(args[3]), args[4], args[5]
  if redis.call('HGET', p .. 'leader', 'epoch') ~= epoch then return { 'epoch' } end
  local before = read_batch(p, bid)
  if before.id ~= '' then return { 'ok', tonumber(before.fence), tonumber(before.size) } end
  if redis.call('SCARD', p .. 'outstanding:' .. worker) >= most then return { 'busy' } end
  local paused = read_paused(p)
  if is_paused(paused, digest, '') then return { 'paused' } end
  local refs, by = {}, {}
  for i = 8, #args, 2 do
    local tenant = args[i]
    local group = digest .. ':' .. tenant
    local popped = is_paused(paused, digest, tenant) and {} or redis.call('ZPOPMIN', p .. 'queue:' .. group, args[i + 1])
    for k = 1, #popped, 2 do refs[#refs + 1] = tenant .. '/' .. popped[k] end
    if #popped > 0 then
      by[#by + 1] = tenant .. ' ' .. (#popped / 2)
      if redis.call('EXISTS', p .. 'queue:' .. group) == 0 then redis.call('SREM', p .. 'groups', group) end
    end
  end
  if #refs == 0 then return { 'empty' } end
  count(c, 'queued', -#refs)
  local fence = redis.call('INCR', p .. 'fence')
  chunks(refs, function(...) redis.call('SADD', p .. 'members:' .. bid, ...) end)
  redis.call('HSET', p .. 'batch:' .. bid, 'w', worker, 'd', digest, 'f', fence, 'c', c.at_text, 'n', #refs, 'by', table.concat(by, ' '), 'y', args[7])
  redis.call('ZADD', p .. 'leases', digits(c.at + args[6]), bid)
  redis.call('SADD', p .. 'outstanding:' .. worker, bid)
  redis.call('PUBLISH', p .. 'to:' .. worker, 'take ' .. bid)
  commit(c)
  return { 'ok', fence, #refs }
end

-- ly_recall P | epoch batch -> number queued again, where they are due and at no cost: those that have not begun are their worker's no more,
-- whether it has taken the batch or not. 0 where another scheduler leads.
local function recall(keys, args)
  local c, bid = begin(keys), args[2]
  local p, back = c.p, {}
  if redis.call('HGET', p .. 'leader', 'epoch') ~= args[1] then return 0 end
  local refs = redis.call('SMEMBERS', p .. 'members:' .. bid)
  local begun = gather('SMISMEMBER', p .. 'begun:' .. bid, refs)
  for i, ref in ipairs(refs) do
    local job = begun[i] == 0 and read_job(p, ref)
    if job then
      push(c, job)
      back[#back + 1] = ref
    end
  end
  if #back == 0 then return 0 end
  chunks(back, function(...)
    redis.call('SREM', p .. 'members:' .. bid, ...)
    redis.call('SADD', p .. 'stop:' .. bid, ...)
  end)
  count(c, 'recalled', #back)
  local worker = redis.call('HGET', p .. 'batch:' .. bid, 'w')
  if worker then redis.call('PUBLISH', p .. 'to:' .. worker, 'stop ' .. bid .. ' ' .. table.concat(back, ' ')) end
  commit(c)
  close_if_empty(c, bid)
  return #back
end

-- ly_reap P | limit ttl_s grace_ms gap_ms -> {batches never taken in time, batches whose lease ran out, delayed jobs woken, jobs expired}
local function reap(keys, args)
  local c, limit, ttl = begin(keys), args[1], args[2]
  local p = c.p
  local undelivered, lapsed, expired = 0, 0, 0
  if tonumber(args[3]) > 0 then
    local before = tonumber(redis.call('GET', p .. 'reaped'))
    redis.call('SET', p .. 'reaped', c.at_text)
    if before and c.at - before > tonumber(args[4]) then -- nobody could renew meanwhile: it was not the workers that were away
      for _, bid in ipairs(redis.call('ZRANGEBYSCORE', p .. 'leases', '-inf', digits(c.at + args[3]))) do
        redis.call('ZADD', p .. 'leases', digits(c.at + args[3]), bid)
      end
    end
  end
  for _, bid in ipairs(redis.call('ZRANGEBYSCORE', p .. 'leases', '-inf', c.at_text, 'LIMIT', 0, limit)) do
    if redis.call('HEXISTS', p .. 'batch:' .. bid, 't') == 1 then lapsed = lapsed + 1 else undelivered = undelivered + 1 end
    requeue_batch(c, bid, ttl)
  end
  count(c, 'deliveries_lapsed', undelivered)
  count(c, 'leases_lapsed', lapsed)
  local woken = redis.call('ZRANGEBYSCORE', p .. 'delayed', '-inf', c.at_text, 'LIMIT', 0, limit)
  for _, ref in ipairs(woken) do
    redis.call('ZREM', p .. 'delayed', ref)
    local job = read_job(p, ref)
    if job then push(c, job) end
  end
  for _, ref in ipairs(redis.call('ZRANGEBYSCORE', p .. 'deadlines', '-inf', c.at_text, 'LIMIT', 0, limit)) do
    redis.call('ZREM', p .. 'deadlines', ref)
    local job = read_job(p, ref)
    local begun = 0
    if job and not redis.call('ZSCORE', p .. 'queue:' .. group_of(job), job.id) then
      local leader = redis.call('HGET', p .. 'follows', ref) -- what it waits for may be running
      begun = select(2, batch_of(p, leader and job.tenant .. '/' .. leader or ref))
    end
    if begun == 1 then -- it runs: let it finish; should it come back to its queue, the next sweep finds it again
      redis.call('ZADD', p .. 'deadlines', digits(c.at + 1000), ref)
    elseif job then
      end_at_once(c, job, 'expired', EXPIRED, ttl, waits_for(p, job))
      expired = expired + 1
    end
  end
  commit(c)
  return { undelivered, lapsed, #woken, expired }
end

-- ly_lead P | me ttl_ms -> epoch while `me` leads, else 0
local function lead(keys, args)
  local key, at = keys[1] .. 'leader', now()
  local held = redis.call('HMGET', key, 'id', 'until', 'epoch')
  if held[1] and held[1] ~= args[1] and tonumber(held[2]) > at then return 0 end
  local epoch = tonumber(held[3] or 0)
  if held[1] ~= args[1] then epoch = epoch + 1 end
  redis.call('HSET', key, 'id', args[1], 'until', digits(at + args[2]), 'epoch', epoch)
  return epoch
end

-- ly_resign P | me
local function resign(keys, args)
  if redis.call('HGET', keys[1] .. 'leader', 'id') == args[1] then redis.call('HSET', keys[1] .. 'leader', 'until', 0) end
  return 1
end

local function all_groups(p)
  return redis.call('SMEMBERS', p .. 'groups')
end

-- {group, jobs, earliest due} of each; a paused group has no jobs that could be claimed.
local function measure(p, groups)
  local reply, paused = {}, read_paused(p)
  for _, group in ipairs(groups) do
    local digest, tenant = string.match(group, '^(.-):(.*)$')
    if is_paused(paused, digest, tenant) then
      reply[#reply + 1] = { group, 0, '0' }
    else
      local head = redis.call('ZRANGE', p .. 'queue:' .. group, 0, 0, 'WITHSCORES')
      reply[#reply + 1] = { group, redis.call('ZCARD', p .. 'queue:' .. group), head[2] or '0' }
    end
  end
  return reply
end

local function in_flight(p)
  local reply = {}
  for _, bid in ipairs(redis.call('ZRANGE', p .. 'leases', 0, -1)) do
    local b = redis.call('HMGET', p .. 'batch:' .. bid, 'w', 'd', 'by', 'c', 't')
    if b[1] then
      local left, begun = redis.call('SCARD', p .. 'members:' .. bid), redis.call('SCARD', p .. 'begun:' .. bid)
      reply[#reply + 1] = { bid, b[1], b[2], b[3], b[4], b[5] or '0', left, math.max(0, left - begun) }
    end
  end
  return reply
end

-- ly_groups P | group... -> {now, {group, jobs, earliest due}..., {batch, worker, digest, by, claimed, taken, jobs left, of them not begun}..., served}
local function groups(keys, args)
  return { now(), measure(keys[1], args), in_flight(keys[1]), redis.call('HGETALL', keys[1] .. 'served') }
end

-- ly_snapshot P -> as ly_groups over all groups, then the id of the last event it includes
local function snapshot(keys)
  local p = keys[1]
  local last = redis.call('XREVRANGE', p .. 'events', '+', '-', 'COUNT', 1)
  local reply = { now(), measure(p, all_groups(p)), in_flight(p), redis.call('HGETALL', p .. 'served') }
  reply[5] = last[1] and last[1][1] or '0-0'
  return reply
end

-- ly_lift P | tenant to -> raises what a tenant counts as served to `to`: a newcomer has no claim on the past
local function lift(keys, args)
  local served = tonumber(redis.call('HGET', keys[1] .. 'served', args[1]) or 0)
  if served < tonumber(args[2]) then redis.call('HSET', keys[1] .. 'served', args[1], args[2]) end
  return 1
end

-- ly_pause P | 'SADD' or 'SREM', what -> 1 if that changed something. Enqueueing goes on, and so does what a worker has already.
local function pause(keys, args)
  local changed = redis.call(args[1], keys[1] .. 'paused', args[2])
  if changed == 1 then tell(keys[1], 'queued', all_groups(keys[1])) end
  return changed
end

-- ly_forget P | tenant before_ms skip limit -> {entries looked at, listing entries dropped because their job is gone}
local function forget(keys, args)
  local p, tenant, dropped = keys[1], args[1], 0
  local ids = redis.call('ZRANGEBYSCORE', p .. 'by_tenant:' .. tenant, '-inf', args[2], 'LIMIT', args[3], args[4])
  for _, id in ipairs(ids) do
    if redis.call('EXISTS', p .. 'job:' .. tenant .. '/' .. id) == 0 then
      redis.call('ZREM', p .. 'by_tenant:' .. tenant, id)
      redis.call('ZREM', p .. 'dead:' .. tenant, id)
      dropped = dropped + 1
    end
  end
  return { #ids, dropped }
end

-- -- workers -----------------------------------------------------------------------------------------------------------------------------

-- ly_hello P | worker incarnation ttl_s -> batches taken by an earlier process of this name, queued again at once
local function hello(keys, args)
  local c, worker, n = begin(keys), args[1], 0
  for _, bid in ipairs(redis.call('SMEMBERS', c.p .. 'outstanding:' .. worker)) do
    local by = redis.call('HGET', c.p .. 'batch:' .. bid, 'i')
    if by and by ~= args[2] then
      requeue_batch(c, bid, args[3])
      n = n + 1
    end
  end
  commit(c)
  event(c.p, 'worker', worker)
  return n
end

-- The jobs of a batch behind `reply`: {ref attempts laters of each that was at a worker before}, then per job: ref value.
local function contents(p, bid, reply)
  local again, n = {}, #reply + 1
  reply[n] = again
  local refs, names = redis.call('SMEMBERS', p .. 'members:' .. bid), {}
  for i = 1, #refs do names[i] = p .. 'job:' .. refs[i] end
  local jobs, tries = gather('MGET', nil, names), all_tries(p, refs)
  for i, ref in ipairs(refs) do
    if lives(jobs[i]) then
      reply[n + 1], reply[n + 2] = ref, jobs[i]
      n = n + 2
      if tries[i] then
        again[#again + 1] = ref
        again[#again + 1], again[#again + 2] = parse_tries(tries[i])
      end
    end
  end
  return reply
end

-- ly_take P | batch worker incarnation lease_ms token -> {} | {fence, digest, claimed, taken, then its jobs as `contents` has them}
-- A batch is taken once; with the same token again, by a client whose reply was lost, the answer is the same.
local function take(keys, args)
  local c, bid = begin(keys), args[1]
  local batch = read_batch(c.p, bid)
  if batch.worker ~= args[2] or batch.id == '' then return {} end
  if batch.token and (batch.token ~= args[5] or batch.incarnation ~= args[3]) then return {} end
  redis.call('HSET', c.p .. 'batch:' .. bid, 't', c.at_text, 'i', args[3], 'k', args[5])
  redis.call('ZADD', c.p .. 'leases', digits(c.at + args[4]), bid)
  return contents(c.p, bid, { tonumber(batch.fence), batch.digest, tonumber(batch.claimed), c.at })
end

local function current(p, bid, fence)
  return redis.call('HGET', p .. 'batch:' .. bid, 'f') == fence
end

-- ly_start P | batch fence ref... -> refs that must not go on. Counts the attempt.
local function start(keys, args)
  local p, bid, stop, begun, refs = keys[1], args[1], {}, {}, {}
  for i = 3, #args do refs[i - 2] = args[i] end
  local mine = current(p, bid, args[2]) and gather('SMISMEMBER', p .. 'members:' .. bid, refs) or {}
  for i, ref in ipairs(refs) do
    if mine[i] == 1 then begun[#begun + 1] = ref else stop[#stop + 1] = ref end
  end
  chunks(begun, function(...) redis.call('SADD', p .. 'begun:' .. bid, ...) end)
  return stop
end

-- ly_renew P | lease_ms, then per batch: batch fence -> {lost batches, batch and ref of each job to stop}
local function renew(keys, args)
  local p, at, lost, stop = keys[1], now(), {}, {}
  for i = 2, #args, 2 do
    local bid = args[i]
    if current(p, bid, args[i + 1]) and redis.call('HEXISTS', p .. 'batch:' .. bid, 's') == 0 then
      redis.call('ZADD', p .. 'leases', 'XX', digits(at + args[1]), bid)
    else
      lost[#lost + 1] = bid
    end
    for _, ref in ipairs(redis.call('SMEMBERS', p .. 'stop:' .. bid)) do
      stop[#stop + 1] = bid
      stop[#stop + 1] = ref
    end
    redis.call('DEL', p .. 'stop:' .. bid)
  end
  return { lost, stop }
end

-- What a worker says of a job that is no longer its own: the same end again, or a stale one.
local function refuse(c, value, fence)
  if value and not lives(value) and string.match(value, '^%a+\t(%d+)\t') == fence then return 'a' end
  count(c, 'stale', 1)
  return 'x'
end

-- An end that is none yet: the job is queued again, at once or after `delay`; at its cap it is buried. True if it is.
local function come_back(c, job, status, delay, outcome, ttl, fence, batch, tries)
  local attempts, laters, before = parse_tries(tries)
  if status == 'retry' then
    attempts = attempts + 1 -- also where it failed before it was started: without this it would be tried for ever
    if attempts >= job.max then
      bury(c, job, fence, outcome, ttl, attempts, batch)
      return true
    end
    count(c, 'retried', 1)
  else
    laters = laters + 1
    count(c, 'postponed', 1)
  end
  local why = why_of(outcome)
  write_tries(c.p, job.ref, attempts, laters, why == '' and before or why)
  if delay > 0 then redis.call('ZADD', c.p .. 'delayed', digits(c.at + delay), job.ref) else push(c, job) end
  return false
end

-- ly_finish P | batch fence ttl_s, then per job: ref same outcome
-- `same`: status delay_ms tokens, joined by tabs; '@hosted' behind it if a hosted worker computed it. All but later use an attempt, whether or not `start` was told of it.
-- -> per job 's' stored, 'r' will be retried, 'a' already stored by this fence, 'x' stale: refused
local function finish(keys, args)
  local c, bid, fence, ttl = begin(keys), args[1], args[2], args[3]
  local p, refs, names, reply, served, gone, done, sorts = c.p, {}, {}, {}, {}, {}, {}, {}
  for i = 4, #args, 3 do
    local same = args[i + 1]
    if not sorts[same] then sorts[same] = { string.match(same, '^(%a+)\t(%d+)\t(%d+)(@?%a*)$') } end
    if not sorts[same][1] or not args[i + 2] then error('not an end: ' .. same) end -- before anything is written: nothing undoes a half
    refs[#refs + 1] = args[i]
    names[#names + 1] = p .. 'job:' .. args[i]
  end
  local batch = read_batch(p, bid)
  local valid = batch.fence == fence
  local values = gather('MGET', nil, names)
  local mine, tries = {}, {}
  if valid then mine, tries = gather('SMISMEMBER', p .. 'members:' .. bid, refs), all_tries(p, refs) end
  local fronts, back = {}, nil
  for k, ref in ipairs(refs) do
    local same, outcome, value = args[3 * k + 2], args[3 * k + 3], values[k]
    local status, tokens = sorts[same][1], tonumber(sorts[same][3])
    if mine[k] ~= 1 or done[ref] or not lives(value) then
      reply[k] = done[ref] == 's' and 'a' or refuse(c, value, fence)
    else
      local attempts = parse_tries(tries[k])
      if (status == 'succeeded' or status == 'failed') and string.byte(value) == 45 then
        -- The plain case: nothing else knows of the job, and its birth and meta lines are copied as they stand.
        if not fronts[status] then fronts[status], back = end_line(c, status, fence, batch) end
        local first = string.find(value, '\n', 1, true)
        local last = string.find(value, '\n', string.find(value, '\n', first + 1, true) + 1, true)
        local line = fronts[status] .. attempts + 1 .. back .. batch.digest .. '\t'
        if tries[k] then
          redis.call('HDEL', p .. 'tries', ref)
          outcome = with_tries(tries[k], outcome)
        end
        redis.call('SET', names[k], line .. string.sub(value, first, last) .. outcome, 'EX', ttl)
        count(c, status, 1)
        c.ended[#c.ended + 1] = ref
        reply[k] = 's'
      elseif status == 'succeeded' or status == 'failed' then
        conclude(c, parse_job(ref, value), status, fence, outcome, ttl, attempts + 1, batch)
        reply[k] = 's'
      else
        local delay, job = tonumber(sorts[same][2]), parse_job(ref, value)
        reply[k] = come_back(c, job, status, delay, outcome, ttl, fence, batch, tries[k]) and 's' or 'r'
      end
      if tokens > 0 then
        local tenant = string.match(ref, '^[^/]+') .. sorts[same][4]
        served[tenant] = (served[tenant] or 0) + tokens
      end
      done[ref] = reply[k]
      gone[#gone + 1] = ref
    end
  end
  for tenant, tokens in pairs(served) do redis.call('HINCRBY', p .. 'served', tenant, digits(tokens)) end
  chunks(gone, function(...)
    redis.call('SREM', p .. 'members:' .. bid, ...)
    redis.call('SREM', p .. 'begun:' .. bid, ...)
  end)
  commit(c)
  if valid then close_if_empty(c, bid) end
  return reply
end

-- ly_give_back P | batch fence ttl_s ref... -> number queued again. Only jobs that were not started; costs no attempt.
local function give_back(keys, args)
  local c, n = begin(keys), 0
  local batch = read_batch(c.p, args[1])
  if batch.fence ~= args[2] then return 0 end
  for i = 4, #args do
    local ref = args[i]
    local mine = redis.call('SISMEMBER', c.p .. 'members:' .. batch.id, ref) == 1
    if mine and redis.call('SISMEMBER', c.p .. 'begun:' .. batch.id, ref) == 0 then
      requeue(c, ref, batch, 0, args[3])
      n = n + 1
    end
  end
  commit(c)
  close_if_empty(c, batch.id)
  return n
end

-- -- batches at a hosted batch service -----------------------------------------------------------------------------------------------------

-- ly_submit P | batch fence note -> 1 when the batch is no worker's any more: it is looked after by whoever tends what is submitted, and the
-- attempt of each job counts. 0: it is not current.
local function submit(keys, args)
  local p, bid, at_text = keys[1], args[1], digits(now())
  local batch = read_batch(p, bid)
  if batch.fence ~= args[2] or not batch.was_taken then return 0 end
  if batch.submitted then return 1 end
  redis.call('HSET', p .. 'batch:' .. bid, 's', at_text, 'o', args[3])
  redis.call('ZREM', p .. 'leases', bid)
  redis.call('ZADD', p .. 'submitted', at_text, bid)
  redis.call('SREM', p .. 'outstanding:' .. batch.worker, bid)
  redis.call('DEL', p .. 'stop:' .. bid)
  redis.call('SUNIONSTORE', p .. 'begun:' .. bid, p .. 'members:' .. bid)
  event(p, 'batch', bid)
  return 1
end

-- ly_tend P | limit hold_ms token -> {batch, fence, digest, submitted, note, refs}... of those it is time to look at. They are the token's to
-- change for `hold_ms`; by then they are looked at again, by anyone.
local function tend(keys, args)
  local p, at, reply = keys[1], now(), {}
  for _, bid in ipairs(redis.call('ZRANGEBYSCORE', p .. 'submitted', '-inf', digits(at), 'LIMIT', 0, args[1])) do
    local batch = read_batch(p, bid)
    redis.call('ZADD', p .. 'submitted', digits(at + args[2]), bid)
    if batch.id ~= '' then -- else the audit finds it
      redis.call('HSET', p .. 'batch:' .. bid, 'x', args[3])
      local written, refs = redis.call('HGET', p .. 'batch:' .. bid, 'o'), redis.call('SMEMBERS', p .. 'members:' .. bid)
      reply[#reply + 1] = { bid, tonumber(batch.fence), batch.digest, tonumber(batch.submitted), written, refs }
    end
  end
  return reply
end

local function tended_by(p, bid, token)
  local b = redis.call('HMGET', p .. 'batch:' .. bid, 's', 'x')
  return b[1] and b[2] == token
end

-- ly_note P | batch token note look_ms -> 1, or 0 where another looks after it by now. Writes what is known of it at the service, and when it is
-- looked at next, which until then is this token's to do.
local function note(keys, args)
  local p, bid = keys[1], args[1]
  if not tended_by(p, bid, args[2]) then return 0 end
  redis.call('HSET', p .. 'batch:' .. bid, 'o', args[3])
  redis.call('ZADD', p .. 'submitted', digits(now() + args[4]), bid)
  return 1
end

-- ly_contents P | batch token -> its jobs as `contents` has them; nothing where another looks after it by now
local function read_contents(keys, args)
  return tended_by(keys[1], args[1], args[2]) and contents(keys[1], args[1], {}) or {}
end

-- ly_settle P | batch token -> 1 when the batch is closed: nothing of it is left, here or at the service. 0: jobs of it have not ended, or another
-- looks after it by now.
local function settle(keys, args)
  local p, bid = keys[1], args[1]
  if redis.call('EXISTS', p .. 'batch:' .. bid) == 0 then return 1 end
  if not tended_by(p, bid, args[2]) or redis.call('EXISTS', p .. 'members:' .. bid) == 1 then return 0 end
  redis.call('DEL', p .. 'batch:' .. bid, p .. 'begun:' .. bid)
  redis.call('ZREM', p .. 'submitted', bid)
  event(p, 'batch', bid)
  return 1
end

-- ly_tell WORKERS | field value -> what the scheduler plans next, or nil. What a worker says of itself: the registry's keys, and here for the
-- sake of allow-oom, and because the answer costs no call of its own.
local function tell_of_worker(keys, args)
  redis.call('HSET', keys[1], args[1], args[2])
  return redis.call('GET', keys[1] .. ':next')
end

-- -- everyone ----------------------------------------------------------------------------------------------------------------------------

-- ly_show P | ref... -> per job {} | {value of an ended job}
--                       | {value of a living job, batch, attempts, begun (2: submitted), delayed until, worker, batch size, why, laters,
--                          when the batch was claimed, place in the queue (-1: in none), id of the job whose outcome it waits for,
--                          the last error it came back with (JSON, or nothing)}
local function show(keys, args)
  local p, reply, away = keys[1], {}, {}
  for n, ref in ipairs(args) do
    local value = redis.call('GET', p .. 'job:' .. ref)
    if not value then
      reply[n] = {}
    elseif not lives(value) then
      reply[n] = { value }
    else
      local job = parse_job(ref, value)
      local delayed = redis.call('ZSCORE', p .. 'delayed', ref)
      local place = not delayed and redis.call('ZRANK', p .. 'queue:' .. group_of(job), job.id)
      local leader = job.flag == 'x' and redis.call('HGET', p .. 'follows', ref) or ''
      local attempts, laters, why = read_tries(p, ref)
      reply[n] = { value, '', attempts, 0, delayed or '', '', 0, '', laters, 0, place or -1, leader, why }
      if not delayed and not place and leader == '' then away[#away + 1] = ref end
    end
  end
  local found = batches_of(p, away)
  for n, ref in ipairs(args) do
    if found[ref] then
      local batch, begun = unpack(found[ref])
      local known = reply[n]
      known[2], known[3], known[4] = batch.id, known[3] + begun, batch.submitted and 2 or begun
      known[6], known[7], known[8], known[10] = batch.worker, tonumber(batch.size), batch.why, tonumber(batch.claimed)
    end
  end
  return reply
end

-- -- audit: what should never be found, and how it is put right --------------------------------------------------------------------------

local function finding(list, kind, name)
  list[#list + 1] = { kind, name }
end

local function audit_job(c, found, repair, ref)
  local job = read_job(c.p, ref)
  if not job then return end
  local queued = redis.call('ZSCORE', c.p .. 'queue:' .. group_of(job), job.id)
  local delayed = redis.call('ZSCORE', c.p .. 'delayed', ref)
  local leader = redis.call('HGET', c.p .. 'follows', ref)
  if leader then
    leader = job.tenant .. '/' .. leader
    local elsewhere = queued or delayed or batch_of(c.p, ref).id ~= ''
    local waits = lives(redis.call('GET', c.p .. 'job:' .. leader)) and redis.call('ZSCORE', c.p .. 'behind:' .. leader, job.id)
    if elsewhere or not waits then
      finding(found, elsewhere and 'job_in_two_places' or 'job_in_no_place', ref)
      if repair then
        stop_following(c, ref, leader)
        if not elsewhere then push(c, job) end
      end
    end
  elseif queued and delayed then
    finding(found, 'job_in_two_places', ref)
    if repair then redis.call('ZREM', c.p .. 'delayed', ref) end
  elseif not queued and not delayed and batch_of(c.p, ref).id == '' then
    finding(found, 'job_in_no_place', ref)
    if repair then push(c, job) end
  end
  if job.deadline > 0 and not redis.call('ZSCORE', c.p .. 'deadlines', ref) then
    finding(found, 'deadline_not_watched', ref)
    if repair then redis.call('ZADD', c.p .. 'deadlines', digits(job.deadline), ref) end
  end
  if not redis.call('ZSCORE', c.p .. 'by_tenant:' .. job.tenant, job.id) then
    finding(found, 'job_not_listed', ref)
    if repair then redis.call('ZADD', c.p .. 'by_tenant:' .. job.tenant, string.match(job.birth, '^%d+'), job.id) end
  end
end

-- ly_audit_jobs P | repair ref... -> {kind, ref}...
local function audit_jobs(keys, args)
  local c, found = begin(keys), {}
  for i = 2, #args do audit_job(c, found, args[1] == '1', args[i]) end
  commit(c)
  return found
end

local ENTRIES = { -- how to ask an index for a member, and how to remove it
  set = { 'SISMEMBER', 'SREM' }, zset = { 'ZSCORE', 'ZREM' }, hash = { 'HEXISTS', 'HDEL' },
}

-- ly_audit_entries P | repair, then per entry: index type member ref -> {kind, index member}...
-- Members of a queue, of delayed, deadlines, tries, follows, behind or a batch whose job is not there, or has ended.
local function audit_entries(keys, args)
  local p, found = keys[1], {}
  for i = 2, #args, 4 do
    local index, how, member, ref = args[i], ENTRIES[args[i + 1]], args[i + 2], args[i + 3]
    local there = redis.call(how[1], p .. index, member)
    if there and there ~= 0 and not lives(redis.call('GETRANGE', p .. 'job:' .. ref, 0, 0)) then
      finding(found, 'entry_without_job', index .. ' ' .. member)
      if args[1] == '1' then redis.call(how[2], p .. index, member) end
    end
  end
  return found
end

local function audit_batch(c, found, repair, bid)
  local batch = read_batch(c.p, bid)
  local index, other = 'leases', 'submitted'
  if batch.submitted then index, other = other, index end
  local leased = redis.call('ZSCORE', c.p .. index, bid)
  local refs = redis.call('SMEMBERS', c.p .. 'members:' .. bid)
  if redis.call('ZSCORE', c.p .. other, bid) or (leased and batch.id == '') then
    finding(found, 'lease_without_batch', bid)
    if repair then redis.call('ZREM', c.p .. (batch.id == '' and leased and index or other), bid) end
  end
  if batch.id == '' then
    if #refs > 0 or redis.call('EXISTS', c.p .. 'begun:' .. bid) == 1 then
      finding(found, 'members_without_batch', bid)
      if repair then redis.call('DEL', c.p .. 'members:' .. bid, c.p .. 'begun:' .. bid) end -- its jobs are found in no place, and queued again
    end
    return
  end
  for _, ref in ipairs(refs) do
    local job = read_job(c.p, ref)
    if job and (redis.call('ZSCORE', c.p .. 'queue:' .. group_of(job), job.id) or redis.call('ZSCORE', c.p .. 'delayed', ref)) then
      finding(found, 'job_in_two_places', ref)
      if repair and not leave_queue(c, job) then redis.call('ZREM', c.p .. 'delayed', ref) end
    end
  end
  if not leased then
    finding(found, 'batch_without_lease', bid)
    if repair then redis.call('ZADD', c.p .. index, c.at_text, bid) end -- it has lapsed, or is looked at now
  end
  if batch.submitted then return end
  if redis.call('SISMEMBER', c.p .. 'outstanding:' .. batch.worker, bid) == 0 then
    finding(found, 'batch_not_outstanding', bid)
    if repair then redis.call('SADD', c.p .. 'outstanding:' .. batch.worker, bid) end
  end
  if #refs == 0 then
    finding(found, 'batch_without_jobs', bid)
    if repair then close_if_empty(c, bid) end
  end
end

-- ly_audit_batches P | repair batch... -> {kind, batch}...
local function audit_batches(keys, args)
  local c, found = begin(keys), {}
  for i = 2, #args do audit_batch(c, found, args[1] == '1', args[i]) end
  commit(c)
  return found
end

-- ly_audit_worker P | repair worker... -> {kind, worker batch}... Batches counted as outstanding that are not there.
local function audit_worker(keys, args)
  local p, found = keys[1], {}
  for i = 2, #args do
    for _, bid in ipairs(redis.call('SMEMBERS', p .. 'outstanding:' .. args[i])) do
      if redis.call('HGET', p .. 'batch:' .. bid, 'w') ~= args[i] then
        finding(found, 'outstanding_without_batch', args[i] .. ' ' .. bid)
        if args[1] == '1' then redis.call('SREM', p .. 'outstanding:' .. args[i], bid) end
      end
    end
  end
  return found
end

-- The jobs in batches: how many, and which of them in two.
local function audit_members(c, found, repair)
  local holder, live = {}, 0
  for _, bid in ipairs(all_batches(c.p)) do
    for _, ref in ipairs(redis.call('SMEMBERS', c.p .. 'members:' .. bid)) do
      live = live + 1
      if holder[ref] then
        finding(found, 'job_in_two_places', ref)
        if repair then redis.call('SREM', c.p .. 'members:' .. bid, ref) end
      end
      holder[ref] = bid
    end
  end
  return live
end

-- ly_audit_groups P | repair group... -> {kind, group}... The index of groups.
local function audit_groups(keys, args)
  local c, found, repair = begin(keys), {}, args[1] == '1'
  for i = 2, #args do
    local group = args[i]
    local filled = redis.call('EXISTS', c.p .. 'queue:' .. group) == 1
    local listed = redis.call('SISMEMBER', c.p .. 'groups', group) == 1
    if filled ~= listed then
      finding(found, listed and 'group_without_jobs' or 'group_not_indexed', group)
      if repair then redis.call(listed and 'SREM' or 'SADD', c.p .. 'groups', group) end
      c.groups[group] = true
    end
  end
  if repair then commit(c) end
  return found
end

-- ly_audit_totals P | repair group... -> {kind, text}... The count of queued jobs, and whether the totals add up. Asked after the groups, and
-- given those that are not indexed.
local function audit_totals(keys, args)
  local c, found, repair = begin(keys), {}, args[1] == '1'
  local p, queued = c.p, 0
  for _, group in ipairs(all_groups(p)) do queued = queued + redis.call('ZCARD', p .. 'queue:' .. group) end
  for i = 2, #args do
    if redis.call('SISMEMBER', p .. 'groups', args[i]) == 0 then queued = queued + redis.call('ZCARD', p .. 'queue:' .. args[i]) end
  end
  local totals = {}
  local raw = redis.call('HGETALL', p .. 'counts')
  for i = 1, #raw, 2 do totals[raw[i]] = tonumber(raw[i + 1]) end
  local function total(name) return totals[name] or 0 end
  if queued ~= total('queued') then
    finding(found, 'count_of_queued', total('queued') .. ' instead of ' .. queued)
    if repair then redis.call('HSET', p .. 'counts', 'queued', queued) end
  end
  local live = queued + redis.call('ZCARD', p .. 'delayed') + redis.call('HLEN', p .. 'follows') + audit_members(c, found, repair)
  local ended = total('succeeded') + total('failed') + total('cancelled') + total('expired') + total('deleted_live')
  if total('enqueued') + total('revived') ~= ended + live then
    finding(found, 'totals', total('enqueued') .. ' enqueued, ' .. total('revived') .. ' revived, ' .. ended .. ' ended, ' .. live .. ' live')
  end
  if repair then commit(c) end
  return found
end

-- Without allow-oom, a function is refused once maxmemory is reached. All but those that add jobs end them in the end, which frees it.
local library = {
  { 'ly_enqueue', enqueue }, { 'ly_revive', revive },
  { 'ly_claim', claim, 'allow-oom' }, { 'ly_take', take, 'allow-oom' }, { 'ly_start', start, 'allow-oom' }, { 'ly_renew', renew, 'allow-oom' },
  { 'ly_finish', finish, 'allow-oom' }, { 'ly_give_back', give_back, 'allow-oom' }, { 'ly_hello', hello, 'allow-oom' },
  { 'ly_cancel', cancel, 'allow-oom' }, { 'ly_delete', delete, 'allow-oom' }, { 'ly_reap', reap, 'allow-oom' }, { 'ly_lead', lead, 'allow-oom' },
  { 'ly_recall', recall, 'allow-oom' },
  { 'ly_resign', resign, 'allow-oom' }, { 'ly_lift', lift, 'allow-oom' }, { 'ly_pause', pause, 'allow-oom' }, { 'ly_forget', forget, 'allow-oom' },
  { 'ly_audit_jobs', audit_jobs, 'allow-oom' }, { 'ly_audit_entries', audit_entries, 'allow-oom' },
  { 'ly_audit_batches', audit_batches, 'allow-oom' }, { 'ly_audit_worker', audit_worker, 'allow-oom' },
  { 'ly_audit_groups', audit_groups, 'allow-oom' }, { 'ly_audit_totals', audit_totals, 'allow-oom' },
  { 'ly_submit', submit, 'allow-oom' }, { 'ly_tend', tend, 'allow-oom' }, { 'ly_note', note, 'allow-oom' }, { 'ly_settle', settle, 'allow-oom' },
  { 'ly_contents', read_contents, 'no-writes' }, { 'ly_tell', tell_of_worker, 'allow-oom' },
  { 'ly_groups', groups, 'no-writes' }, { 'ly_snapshot', snapshot, 'no-writes' }, { 'ly_show', show, 'no-writes' },
}
for i = 1, #library do
  redis.register_function({ function_name = library[i][1], callback = library[i][2], flags = { library[i][3] } })
end
