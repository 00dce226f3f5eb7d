#!lua name=lorayard
-- The ledger: every transition of a job, each one call that may carry many jobs. The only writer of what is listed here.
--
-- KEYS[1] of every function is the pool's prefix `ly:{POOL}:`; all keys are derived from it, so all lie in one hash slot.
-- A job is named by its ref, TENANT/ID: one tenant's ids can therefore never reach another tenant's jobs.
-- Every function may be called again with the same arguments, as a client does whose reply was lost, and changes nothing then.
--
--   job:REF              STRING  header \n meta \n request                       from enqueue to its end (dead letters keep it)
--   run:REF              STRING  batch \t attempts \t started ms \t laters        from first claim to its end
--   result:REF           STRING  header \n meta \n outcome, with a TTL           from its end on
--   queue:DIGEST:TENANT  ZSET    id -> due ms
--   groups               SET     DIGEST:TENANT of every queue that is not empty
--   paused               SET     pool | adapter:DIGEST | tenant:TENANT | group:DIGEST:TENANT
--   delayed              ZSET    ref -> ms when it goes to its queue
--   deadlines            ZSET    ref -> ms when it expires unless it was started
--   batch:BID            HASH    w worker, i incarnation, k token of the take, d digest, f fence, c claimed ms, t taken ms, n jobs,
--                                by tenants, y why
--   members:BID          SET     refs not ended yet
--   stop:BID             SET     refs cancelled while at a worker, until the worker has heard of it
--   leases               ZSET    batch -> expiry ms (of the delivery until it is taken, of the lease from then on)
--   outstanding:WORKER   SET     batches
--   dead:TENANT          ZSET    id -> ms; dead letters: failed at the attempt cap
--   idem:TENANT:KEY      STRING  id \t digest of the body
--   by_tenant:TENANT     ZSET    id -> enqueued ms
--   served               HASH    tenant -> tokens
--   counts               HASH    queued (exact), and totals since the pool was made
--   leader               HASH    id, epoch, until
--   fence                STRING  counter
--   events               STREAM  k kind, v value; capped: a hint, never the truth
--   stop:WORKER          CHANNEL refs to stop, at once; lossy, `stop:BID` is what counts
--
-- job header:    due \t enqueued \t deadline \t digest \t tenant \t max attempts \t via \t idem
-- result header: status \t fence \t ended \t enqueued \t claimed \t taken \t attempts \t worker \t batch \t batch size \t via \t why \t digest \t idem
-- Totals: enqueued + revived = succeeded + failed + cancelled + expired + deleted_live + the jobs that live.

local EVENTS_KEPT = 20000
local MOST = 2000 -- arguments of one command: what Lua's stack surely holds

local function now() -- ms; the only clock of the ledger
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- What one call of a function changes beside jobs themselves, told once at its end.
local function begin(keys)
  return { p = keys[1], at = now(), groups = {}, ended = {}, counts = {}, doomed = {} }
end

local function chunks(list, call)
  for i = 1, #list, MOST do
    call(unpack(list, i, math.min(i + MOST - 1, #list)))
  end
end

local function count(c, what, by)
  c.counts[what] = (c.counts[what] or 0) + by
end

local function event(p, kind, value)
  redis.call('XADD', p .. 'events', 'MAXLEN', '~', EVENTS_KEPT, '*', 'k', kind, 'v', value)
end

local function tell(p, kind, list)
  for i = 1, #list, MOST do
    event(p, kind, table.concat(list, ' ', i, math.min(i + MOST - 1, #list)))
  end
end

local function commit(c)
  chunks(c.doomed, function(...) redis.call('DEL', ...) end)
  for what, by in pairs(c.counts) do
    if by ~= 0 then redis.call('HINCRBY', c.p .. 'counts', what, by) end
  end
  local names = {}
  for group in pairs(c.groups) do names[#names + 1] = group end
  table.sort(names)
  tell(c.p, 'queued', names)
  tell(c.p, 'ended', c.ended)
end

local function doom(c, key)
  c.doomed[#c.doomed + 1] = key
end

-- Values of the keys PREFIX..ref, false where there is none.
local function read_all(prefix, refs)
  local names, values = {}, {}
  for i = 1, #refs do names[i] = prefix .. refs[i] end
  for i = 1, #names, MOST do
    local part = redis.call('MGET', unpack(names, i, math.min(i + MOST - 1, #names)))
    for k = 1, #part do values[i + k - 1] = part[k] end
  end
  return values
end

-- A job out of the value of job:REF, or nil.
local function parse_job(ref, value)
  if not value then return nil end
  local due, enqueued, deadline, digest, tenant, max, via, idem, meta =
    string.match(value, '^(%d+)\t(%d+)\t(%d+)\t([^\t]+)\t([^\t]+)\t(%d+)\t([^\t]*)\t([^\n]*)\n([^\n]*)\n')
  return {
    ref = ref, due = due, enqueued = enqueued, deadline = tonumber(deadline), digest = digest, tenant = tenant,
    max = tonumber(max), via = via, idem = idem, meta = meta, id = string.sub(ref, #tenant + 2), value = value,
  }
end

local function read_job(p, ref)
  return parse_job(ref, redis.call('GET', p .. 'job:' .. ref))
end

-- batch ('' while queued again), attempts, started ms (nil before), laters
local function parse_run(value)
  if not value then return { batch = '', attempts = 0, laters = 0 } end
  local batch, attempts, started, laters = string.match(value, '^(.-)\t(%d+)\t(%d*)\t(%d+)$')
  return { batch = batch, attempts = tonumber(attempts), started = tonumber(started), laters = tonumber(laters) }
end

local function read_run(p, ref)
  return parse_run(redis.call('GET', p .. 'run:' .. ref))
end

local function run_value(run)
  return run.batch .. '\t' .. run.attempts .. '\t' .. (run.started or '') .. '\t' .. run.laters
end

local NO_BATCH = { id = '', worker = '', claimed = 0, taken = 0, size = 0, why = '' }

local function read_batch(p, bid)
  if bid == '' then return NO_BATCH end
  local b = redis.call('HMGET', p .. 'batch:' .. bid, 'w', 'f', 'c', 't', 'n', 'y', 'i', 'k', 'd')
  if not b[1] then return NO_BATCH end
  return {
    id = bid, worker = b[1], fence = b[2], claimed = b[3], taken = b[4] or 0, size = b[5], why = b[6] or '', incarnation = b[7], token = b[8],
    digest = b[9],
  }
end

local function header_of(job)
  return table.concat({ job.due, job.enqueued, job.deadline, job.digest, job.tenant, job.max, job.via, job.idem }, '\t')
end

local function group_of(job)
  return job.digest .. ':' .. job.tenant
end

local function push(c, job) -- into its queue
  local group = group_of(job)
  if redis.call('ZADD', c.p .. 'queue:' .. group, job.due, job.id) == 1 then count(c, 'queued', 1) end
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

-- The one way into a terminal status. `outcome` is JSON.
local function store(c, job, status, fence, outcome, ttl, run, batch)
  local header = table.concat({
    status, fence, c.at, job.enqueued, batch.claimed, batch.taken, run.attempts, batch.worker, batch.id, batch.size, job.via, batch.why,
    job.digest, job.idem,
  }, '\t')
  redis.call('SET', c.p .. 'result:' .. job.ref, header .. '\n' .. job.meta .. '\n' .. outcome, 'EX', ttl)
  doom(c, c.p .. 'run:' .. job.ref)
  if job.deadline > 0 then redis.call('ZREM', c.p .. 'deadlines', job.ref) end
  if job.idem ~= '' then redis.call('EXPIRE', c.p .. 'idem:' .. job.tenant .. ':' .. job.idem, ttl) end
  count(c, status, 1)
  c.ended[#c.ended + 1] = job.ref
end

local function finish_job(c, job, status, fence, outcome, ttl, run, batch)
  store(c, job, status, fence, outcome, ttl, run, batch)
  doom(c, c.p .. 'job:' .. job.ref)
end

-- A job at its attempt cap goes to the dead letters with its request, so that it can be retried by hand.
local function bury(c, job, fence, outcome, ttl, run, batch)
  store(c, job, 'failed', fence, outcome, ttl, run, batch)
  redis.call('ZADD', c.p .. 'dead:' .. job.tenant, c.at, job.id)
  redis.call('EXPIRE', c.p .. 'job:' .. job.ref, ttl)
  count(c, 'dead', 1)
end

local function close_if_empty(c, bid)
  if bid == '' or redis.call('EXISTS', c.p .. 'members:' .. bid) == 1 then return end
  local worker = redis.call('HGET', c.p .. 'batch:' .. bid, 'w')
  redis.call('DEL', c.p .. 'batch:' .. bid)
  redis.call('ZREM', c.p .. 'leases', bid)
  if redis.call('EXISTS', c.p .. 'stop:' .. bid) == 1 then redis.call('PEXPIRE', c.p .. 'stop:' .. bid, 60000) end
  if worker then
    redis.call('SREM', c.p .. 'outstanding:' .. worker, bid)
    event(c.p, 'batch', bid)
  end
end

-- Take an ended job out of a batch that a worker has. The worker hears of it at once, or when it renews, or when it would start the job.
local function stop_at_worker(c, ref, batch)
  redis.call('SADD', c.p .. 'stop:' .. batch.id, ref)
  redis.call('SREM', c.p .. 'members:' .. batch.id, ref)
  redis.call('PUBLISH', c.p .. 'stop:' .. batch.worker, ref)
  close_if_empty(c, batch.id)
end

local LOST = '{"error":{"message":"the worker was lost while it ran this job, as often as attempts are allowed","type":"server_error","code":"worker_lost","param":null}}'

-- Take one job out of a batch and queue it again. A job that had started has used an attempt already (ly_start counted it).
local function requeue(c, ref, batch, ttl)
  local run, job = read_run(c.p, ref), read_job(c.p, ref)
  if job and run.batch == batch.id then
    if run.started and run.attempts >= job.max then
      bury(c, job, batch.fence, LOST, ttl, run, batch)
    else
      redis.call('SET', c.p .. 'run:' .. ref, run_value({ batch = '', attempts = run.attempts, laters = run.laters }))
      push(c, job)
      count(c, 'requeued', 1)
    end
  end
  redis.call('SREM', c.p .. 'members:' .. batch.id, ref)
end

local function requeue_batch(c, bid, ttl)
  local batch = read_batch(c.p, bid)
  for _, ref in ipairs(redis.call('SMEMBERS', c.p .. 'members:' .. bid)) do
    requeue(c, ref, batch, ttl)
  end
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

local OVERHEAD = 400 -- bytes that a queued job takes beside its text: keys, headers, index entries (measured: benchmarks.ledger)

-- ly_enqueue P | max_queued max_memory, then per job: id tenant digest wait_ms deadline_ms not_before_ms max_attempts via idem hash payload
-- -> per job 'q' queued, 'd' delayed, 'e'..id the same again, 'c' the key or id with another body, 'f' too many jobs, 'm' too little memory
local function enqueue(keys, args)
  local c = begin(keys)
  local p, at = c.p, c.at
  local room = tonumber(args[1]) - tonumber(redis.call('HGET', p .. 'counts', 'queued') or 0)
  local bytes = room_in_memory(tonumber(args[2]))
  local reply, values, queues, tenants, queued, names = {}, {}, {}, {}, 0, {}
  for i = 3, #args, 11 do
    local ref = args[i + 1] .. '/' .. args[i]
    names[#names + 1] = p .. 'job:' .. ref
    names[#names + 1] = p .. 'result:' .. ref
  end
  local known_ids = 0 -- one question for all: an id that is there already is rare
  chunks(names, function(...) known_ids = known_ids + redis.call('EXISTS', ...) end)
  local fresh = {}
  for i = 3, #args, 11 do
    local id, tenant, digest, payload = args[i], args[i + 1], args[i + 2], args[i + 10]
    local wait, deadline, not_before = tonumber(args[i + 3]), tonumber(args[i + 4]), tonumber(args[i + 5])
    local idem, hash = args[i + 8], args[i + 9]
    local ref = tenant .. '/' .. id
    local known = idem ~= '' and redis.call('GET', p .. 'idem:' .. tenant .. ':' .. idem)
    local there = fresh[ref] or (known_ids > 0 and redis.call('EXISTS', p .. 'job:' .. ref, p .. 'result:' .. ref) > 0)
    if known then
      local first, body = string.match(known, '^(.-)\t(.*)$')
      reply[#reply + 1] = body == hash and 'e' .. first or 'c'
    elseif there then
      reply[#reply + 1] = idem == '' and 'e' .. id or 'c'
    elseif room <= 0 then
      reply[#reply + 1] = 'f'
    elseif bytes < #payload + OVERHEAD then
      reply[#reply + 1] = 'm'
    else
      room, bytes, fresh[ref] = room - 1, bytes - #payload - OVERHEAD, true
      local due = deadline > 0 and at + deadline or at + not_before + wait
      local expiry = deadline > 0 and at + deadline or 0
      values[#values + 1] = p .. 'job:' .. ref
      values[#values + 1] = table.concat({ due, at, expiry, digest, tenant, args[i + 6], args[i + 7], idem }, '\t') .. '\n' .. payload
      if idem ~= '' then redis.call('SET', p .. 'idem:' .. tenant .. ':' .. idem, id .. '\t' .. hash) end
      if expiry > 0 then redis.call('ZADD', p .. 'deadlines', expiry, ref) end
      local listed = tenants[tenant]
      if not listed then
        listed = {}
        tenants[tenant] = listed
      end
      listed[#listed + 1] = at
      listed[#listed + 1] = id
      if not_before > 0 then
        redis.call('ZADD', p .. 'delayed', at + not_before, ref)
        reply[#reply + 1] = 'd'
      else
        local group = digest .. ':' .. tenant
        local queue = queues[group]
        if not queue then
          queue = {}
          queues[group] = queue
        end
        queue[#queue + 1] = due
        queue[#queue + 1] = id
        queued = queued + 1
        reply[#reply + 1] = 'q'
      end
    end
  end
  chunks(values, function(...) redis.call('MSET', ...) end)
  for group, entries in pairs(queues) do
    chunks(entries, function(...) redis.call('ZADD', p .. 'queue:' .. group, ...) end)
    redis.call('SADD', p .. 'groups', group)
    c.groups[group] = true
  end
  for tenant, entries in pairs(tenants) do
    chunks(entries, function(...) redis.call('ZADD', p .. 'by_tenant:' .. tenant, ...) end)
  end
  count(c, 'queued', queued)
  count(c, 'enqueued', #values / 2)
  commit(c)
  return reply
end

local CANCELLED = '{"error":{"message":"cancelled by request","type":"invalid_request_error","code":"cancelled","param":null}}'
local EXPIRED = '{"error":{"message":"its deadline passed before it was started","type":"server_error","code":"expired","param":null}}'

-- Take a job that has not ended from wherever it is, for good.
local function withdraw(c, job)
  if not leave_queue(c, job) then redis.call('ZREM', c.p .. 'delayed', job.ref) end
  local run = read_run(c.p, job.ref)
  local batch = read_batch(c.p, run.batch)
  if batch.id ~= '' then stop_at_worker(c, job.ref, batch) end
  return run, batch
end

-- ly_cancel P | tenant ttl_s id... -> per job 'c' cancelled, 't' ended before, 'n' no such job
local function cancel(keys, args)
  local c, tenant, reply = begin(keys), args[1], {}
  for i = 3, #args do
    local ref = tenant .. '/' .. args[i]
    local job = read_job(c.p, ref)
    if redis.call('EXISTS', c.p .. 'result:' .. ref) == 1 then
      reply[#reply + 1] = 't'
    elseif not job then
      reply[#reply + 1] = 'n'
    else
      local run, batch = withdraw(c, job)
      finish_job(c, job, 'cancelled', 0, CANCELLED, args[2], run, batch)
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
    local job = read_job(c.p, ref)
    local header = string.match(redis.call('GETRANGE', c.p .. 'result:' .. ref, 0, 4095), '^([^\n]*)\n')
    if not job and not header then
      reply[#reply + 1] = 'n'
    else
      local idem = header and string.match(header, '\t([^\t]*)$') or job.idem
      if not header then
        withdraw(c, job)
        count(c, 'deleted_live', 1)
      end
      redis.call('DEL', c.p .. 'job:' .. ref, c.p .. 'run:' .. ref, c.p .. 'result:' .. ref)
      if idem ~= '' then redis.call('DEL', c.p .. 'idem:' .. tenant .. ':' .. idem) end
      redis.call('ZREM', c.p .. 'by_tenant:' .. tenant, id)
      redis.call('ZREM', c.p .. 'dead:' .. tenant, id)
      redis.call('ZREM', c.p .. 'deadlines', ref)
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
    local job = redis.call('ZREM', c.p .. 'dead:' .. tenant, id) == 1 and read_job(c.p, ref)
    if not job then
      reply[#reply + 1] = 'n'
    else
      local wait = math.max(0, tonumber(job.due) - tonumber(job.enqueued))
      local rest = string.match(job.value, '^[^\n]*(\n.*)$')
      job.due, job.enqueued, job.deadline = c.at + wait, c.at, 0 -- its deadline may have passed: whoever retries wants it run
      redis.call('SET', c.p .. 'job:' .. ref, header_of(job) .. rest)
      redis.call('DEL', c.p .. 'result:' .. ref)
      redis.call('ZADD', c.p .. 'by_tenant:' .. tenant, c.at, id)
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

local function is_paused(paused, digest, tenant)
  return paused['pool'] or paused['adapter:' .. digest] or paused['tenant:' .. tenant] or paused['group:' .. digest .. ':' .. tenant] or false
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
  local values, runs = {}, read_all(p .. 'run:', refs)
  for i, ref in ipairs(refs) do
    local run = parse_run(runs[i])
    run.batch = bid
    values[#values + 1] = p .. 'run:' .. ref
    values[#values + 1] = run_value(run)
  end
  chunks(values, function(...) redis.call('MSET', ...) end)
  chunks(refs, function(...) redis.call('SADD', p .. 'members:' .. bid, ...) end)
  redis.call('HSET', p .. 'batch:' .. bid, 'w', worker, 'd', digest, 'f', fence, 'c', c.at, 'n', #refs, 'by', table.concat(by, ' '), 'y', args[7])
  redis.call('ZADD', p .. 'leases', c.at + args[6], bid)
  redis.call('SADD', p .. 'outstanding:' .. worker, bid)
  commit(c)
  return { 'ok', fence, #refs }
end

-- ly_reap P | limit ttl_s -> {batches never taken in time, batches whose lease ran out, delayed jobs woken, jobs expired}
local function reap(keys, args)
  local c, limit, ttl = begin(keys), args[1], args[2]
  local p, at = c.p, c.at
  local undelivered, lapsed = 0, 0
  for _, bid in ipairs(redis.call('ZRANGEBYSCORE', p .. 'leases', '-inf', at, 'LIMIT', 0, limit)) do
    if redis.call('HEXISTS', p .. 'batch:' .. bid, 't') == 1 then lapsed = lapsed + 1 else undelivered = undelivered + 1 end
    requeue_batch(c, bid, ttl)
  end
  count(c, 'deliveries_lapsed', undelivered)
  count(c, 'leases_lapsed', lapsed)
  local woken = redis.call('ZRANGEBYSCORE', p .. 'delayed', '-inf', at, 'LIMIT', 0, limit)
  for _, ref in ipairs(woken) do
    redis.call('ZREM', p .. 'delayed', ref)
    local job = read_job(p, ref)
    if job then push(c, job) end
  end
  local expired = 0
  for _, ref in ipairs(redis.call('ZRANGEBYSCORE', p .. 'deadlines', '-inf', at, 'LIMIT', 0, limit)) do
    redis.call('ZREM', p .. 'deadlines', ref)
    local job = read_job(p, ref)
    if job then
      local run = read_run(p, ref)
      if run.started then -- it runs: let it finish; should it come back to its queue, the next sweep finds it again
        redis.call('ZADD', p .. 'deadlines', at + 1000, ref)
      else
        local batch
        run, batch = withdraw(c, job)
        finish_job(c, job, 'expired', 0, EXPIRED, ttl, run, batch)
        expired = expired + 1
      end
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
  redis.call('HSET', key, 'id', args[1], 'until', at + args[2], 'epoch', epoch)
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
    if b[1] then reply[#reply + 1] = { bid, b[1], b[2], b[3], b[4], b[5] or '0' } end
  end
  return reply
end

-- ly_groups P | group... -> {now, {group, jobs, earliest due}..., {batch, worker, digest, by, claimed, taken}..., served}
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

-- ly_forget P | tenant before_ms limit -> listing entries dropped whose job is gone
local function forget(keys, args)
  local p, tenant, dropped = keys[1], args[1], 0
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', p .. 'by_tenant:' .. tenant, '-inf', args[2], 'LIMIT', 0, args[3])) do
    local ref = tenant .. '/' .. id
    if redis.call('EXISTS', p .. 'job:' .. ref, p .. 'result:' .. ref) == 0 then
      redis.call('ZREM', p .. 'by_tenant:' .. tenant, id)
      redis.call('ZREM', p .. 'dead:' .. tenant, id)
      dropped = dropped + 1
    end
  end
  return dropped
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

-- ly_take P | batch worker incarnation lease_ms token -> {} | {fence, digest, claimed, taken, then per job: ref attempts laters value}
-- A batch is taken once; with the same token again, by a client whose reply was lost, the answer is the same.
local function take(keys, args)
  local c, bid = begin(keys), args[1]
  local batch = read_batch(c.p, bid)
  if batch.worker ~= args[2] or batch.id == '' then return {} end
  if batch.token and (batch.token ~= args[5] or batch.incarnation ~= args[3]) then return {} end
  redis.call('HSET', c.p .. 'batch:' .. bid, 't', c.at, 'i', args[3], 'k', args[5])
  redis.call('ZADD', c.p .. 'leases', c.at + args[4], bid)
  local reply = { tonumber(batch.fence), batch.digest, tonumber(batch.claimed), c.at }
  local refs = redis.call('SMEMBERS', c.p .. 'members:' .. bid)
  local jobs, runs = read_all(c.p .. 'job:', refs), read_all(c.p .. 'run:', refs)
  for i, ref in ipairs(refs) do
    if jobs[i] then
      local run, n = parse_run(runs[i]), #reply
      reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4] = ref, run.attempts, run.laters, jobs[i]
    end
  end
  return reply
end

local function current(p, bid, fence)
  return redis.call('HGET', p .. 'batch:' .. bid, 'f') == fence
end

-- ly_start P | batch fence ref... -> refs that must not go on. Counts the attempt.
local function start(keys, args)
  local c, bid, stop, refs, values = begin(keys), args[1], {}, {}, {}
  for i = 3, #args do refs[i - 2] = args[i] end
  local valid, runs, seen = current(c.p, bid, args[2]), read_all(c.p .. 'run:', refs), {}
  for i, ref in ipairs(refs) do
    local run = parse_run(runs[i])
    if not valid or run.batch ~= bid then
      stop[#stop + 1] = ref
    elseif not run.started and not seen[ref] then
      run.attempts, run.started, seen[ref] = run.attempts + 1, c.at, true
      values[#values + 1] = c.p .. 'run:' .. ref
      values[#values + 1] = run_value(run)
    end
  end
  chunks(values, function(...) redis.call('MSET', ...) end)
  return stop
end

-- ly_renew P | lease_ms, then per batch: batch fence -> {lost batches, refs to stop}
local function renew(keys, args)
  local p, at, lost, stop = keys[1], now(), {}, {}
  for i = 2, #args, 2 do
    local bid = args[i]
    if current(p, bid, args[i + 1]) then
      redis.call('ZADD', p .. 'leases', 'XX', at + args[1], bid)
    else
      lost[#lost + 1] = bid
    end
    for _, ref in ipairs(redis.call('SMEMBERS', p .. 'stop:' .. bid)) do stop[#stop + 1] = ref end
    redis.call('DEL', p .. 'stop:' .. bid)
  end
  return { lost, stop }
end

-- What a worker says of a job that is no longer its own: the same end again, or a stale one.
local function refuse(c, ref, fence)
  local stored = redis.call('GETRANGE', c.p .. 'result:' .. ref, 0, 64)
  if string.match(stored, '^%a+\t(%d+)\t') == fence then return 'a' end
  count(c, 'stale', 1)
  return 'x'
end

-- ly_finish P | batch fence ttl_s, then per job: ref status delay_ms tokens outcome
-- status succeeded | failed | retry (an attempt was used) | later (none was)
-- -> per job 's' stored, 'r' will be retried, 'a' already stored by this fence, 'x' stale: refused
local function finish(keys, args)
  local c, bid, fence, ttl = begin(keys), args[1], args[2], args[3]
  local batch, refs, reply, done, served, gone = read_batch(c.p, bid), {}, {}, {}, {}, {}
  for i = 4, #args, 5 do refs[#refs + 1] = args[i] end
  local valid = batch.fence == fence
  local jobs, runs = read_all(c.p .. 'job:', refs), read_all(c.p .. 'run:', refs)
  for k, ref in ipairs(refs) do
    local i = 4 + 5 * (k - 1)
    local status, delay, tokens, outcome = args[i + 1], tonumber(args[i + 2]), tonumber(args[i + 3]), args[i + 4]
    local run = parse_run(runs[k])
    local job = valid and not done[ref] and run.batch == bid and parse_job(ref, jobs[k])
    if not job then
      reply[k] = done[ref] == 's' and 'a' or refuse(c, ref, fence)
    else
      served[job.tenant] = (served[job.tenant] or 0) + tokens
      if status == 'retry' and not run.started then -- it failed before it was started: without this it would be tried for ever
        run.attempts = run.attempts + 1
      end
      if status == 'later' then
        if run.started then run.attempts = run.attempts - 1 end -- ly_start counted it
        run.laters = run.laters + 1
      end
      if status == 'later' or (status == 'retry' and run.attempts < job.max) then
        redis.call('SET', c.p .. 'run:' .. ref, run_value({ batch = '', attempts = run.attempts, laters = run.laters }))
        if delay > 0 then redis.call('ZADD', c.p .. 'delayed', c.at + delay, ref) else push(c, job) end
        count(c, status == 'later' and 'postponed' or 'retried', 1)
        reply[k] = 'r'
      elseif status == 'retry' then
        bury(c, job, fence, outcome, ttl, run, batch)
        reply[k] = 's'
      else
        finish_job(c, job, status, fence, outcome, ttl, run, batch)
        reply[k] = 's'
      end
      done[ref] = reply[k]
      gone[#gone + 1] = ref
    end
  end
  for tenant, tokens in pairs(served) do
    if tokens > 0 then redis.call('HINCRBY', c.p .. 'served', tenant, tokens) end
  end
  chunks(gone, function(...) redis.call('SREM', c.p .. 'members:' .. bid, ...) end)
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
    local run = read_run(c.p, args[i])
    if run.batch == batch.id and not run.started then
      requeue(c, args[i], batch, args[3])
      n = n + 1
    end
  end
  commit(c)
  close_if_empty(c, batch.id)
  return n
end

-- -- everyone ----------------------------------------------------------------------------------------------------------------------------

-- ly_show P | ref... -> per job {} | {result value} | {job value, batch, attempts, started, delayed until, worker, batch size, why, laters}
local function show(keys, args)
  local p, reply = keys[1], {}
  for _, ref in ipairs(args) do
    local result = redis.call('GET', p .. 'result:' .. ref)
    local value = not result and redis.call('GET', p .. 'job:' .. ref)
    if result then
      reply[#reply + 1] = { result }
    elseif value then
      local run = read_run(p, ref)
      local batch = read_batch(p, run.batch)
      reply[#reply + 1] = {
        value, run.batch, run.attempts, run.started or 0, redis.call('ZSCORE', p .. 'delayed', ref) or '', batch.worker, tonumber(batch.size),
        batch.why, run.laters,
      }
    else
      reply[#reply + 1] = {}
    end
  end
  return reply
end

-- -- audit: what should never be found, and how it is put right ----------------------------------------------------------------------------

local function finding(list, kind, name)
  list[#list + 1] = { kind, name }
end

local function audit_job(c, found, repair, ref)
  local job = read_job(c.p, ref)
  local ended = redis.call('EXISTS', c.p .. 'result:' .. ref) == 1
  local tenant, id = string.match(ref, '^(.-)/(.*)$')
  local run = read_run(c.p, ref)
  if not job or ended then
    local dead = redis.call('ZSCORE', c.p .. 'dead:' .. tenant, id)
    if job and not dead then
      finding(found, 'request_of_ended_job', ref)
      if repair then doom(c, c.p .. 'job:' .. ref) end
    end
    if redis.call('EXISTS', c.p .. 'run:' .. ref) == 1 then
      finding(found, 'run_of_ended_job', ref)
      if repair then doom(c, c.p .. 'run:' .. ref) end
    end
    return
  end
  local queued = redis.call('ZSCORE', c.p .. 'queue:' .. group_of(job), job.id)
  local delayed = redis.call('ZSCORE', c.p .. 'delayed', ref)
  local held = run.batch ~= '' and redis.call('SISMEMBER', c.p .. 'members:' .. run.batch, ref) == 1
    and redis.call('EXISTS', c.p .. 'batch:' .. run.batch) == 1
  local places = (queued and 1 or 0) + (delayed and 1 or 0) + (held and 1 or 0)
  if places == 0 then
    finding(found, 'job_in_no_place', ref)
    if repair then
      redis.call('SET', c.p .. 'run:' .. ref, run_value({ batch = '', attempts = run.attempts, laters = run.laters }))
      push(c, job)
    end
  elseif places > 1 then
    finding(found, 'job_in_two_places', ref)
    if repair then -- a batch that has it goes before a queue, a queue before waiting
      if queued and held then leave_queue(c, job) end
      if delayed then redis.call('ZREM', c.p .. 'delayed', ref) end
    end
  end
  if job.deadline > 0 and not redis.call('ZSCORE', c.p .. 'deadlines', ref) then
    finding(found, 'deadline_not_watched', ref)
    if repair then redis.call('ZADD', c.p .. 'deadlines', job.deadline, ref) end
  end
  if not redis.call('ZSCORE', c.p .. 'by_tenant:' .. tenant, id) then
    finding(found, 'job_not_listed', ref)
    if repair then redis.call('ZADD', c.p .. 'by_tenant:' .. tenant, job.enqueued, id) end
  end
end

-- ly_audit_jobs P | repair ref... -> {kind, ref}...
local function audit_jobs(keys, args)
  local c, found = begin(keys), {}
  for i = 2, #args do audit_job(c, found, args[1] == '1', args[i]) end
  commit(c)
  return found
end

-- ly_audit_entries P | repair, then per entry: index member ref -> {kind, index member}...
-- Members of a queue, of delayed, deadlines or a batch whose job is not there, or has ended.
local function audit_entries(keys, args)
  local c, found = begin(keys), {}
  for i = 2, #args, 3 do
    local index, member, ref = args[i], args[i + 1], args[i + 2]
    local is_set = string.sub(index, 1, 8) == 'members:'
    local there
    if is_set then
      there = redis.call('SISMEMBER', c.p .. index, member) == 1
    else
      there = redis.call('ZSCORE', c.p .. index, member) ~= false
    end
    if there and (redis.call('EXISTS', c.p .. 'job:' .. ref) == 0 or redis.call('EXISTS', c.p .. 'result:' .. ref) == 1) then
      finding(found, 'entry_without_job', index .. ' ' .. member)
      if args[1] == '1' then redis.call(is_set and 'SREM' or 'ZREM', c.p .. index, member) end
    end
  end
  return found
end

local function audit_batch(c, found, repair, bid)
  local batch, leased = read_batch(c.p, bid), redis.call('ZSCORE', c.p .. 'leases', bid)
  local refs = redis.call('SMEMBERS', c.p .. 'members:' .. bid)
  if batch.id == '' then
    if leased then
      finding(found, 'lease_without_batch', bid)
      if repair then redis.call('ZREM', c.p .. 'leases', bid) end
    end
    if #refs > 0 then
      finding(found, 'members_without_batch', bid)
      if repair then redis.call('DEL', c.p .. 'members:' .. bid) end -- its jobs are found in no place, and queued again
    end
    return
  end
  for i, value in ipairs(read_all(c.p .. 'run:', refs)) do
    if parse_run(value).batch ~= bid then
      finding(found, 'member_of_no_or_another_batch', bid .. ' ' .. refs[i])
      if repair then redis.call('SREM', c.p .. 'members:' .. bid, refs[i]) end
    end
  end
  if not leased then
    finding(found, 'batch_without_lease', bid)
    if repair then redis.call('ZADD', c.p .. 'leases', c.at, bid) end -- it has lapsed
  end
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
  return found
end

-- ly_audit_worker P | repair worker... -> {kind, worker batch}... Batches counted as outstanding that are not there.
local function audit_worker(keys, args)
  local c, found = begin(keys), {}
  for i = 2, #args do
    for _, bid in ipairs(redis.call('SMEMBERS', c.p .. 'outstanding:' .. args[i])) do
      if redis.call('HGET', c.p .. 'batch:' .. bid, 'w') ~= args[i] then
        finding(found, 'outstanding_without_batch', args[i] .. ' ' .. bid)
        if args[1] == '1' then redis.call('SREM', c.p .. 'outstanding:' .. args[i], bid) end
      end
    end
  end
  return found
end

-- ly_audit_totals P | repair group... -> {kind, name}... The index of groups, the count of queued jobs, and whether the totals add up.
local function audit_totals(keys, args)
  local c, found, repair = begin(keys), {}, args[1] == '1'
  local p, queued, seen = c.p, 0, {}
  local groups_ = all_groups(p)
  for i = 2, #args do groups_[#groups_ + 1] = args[i] end
  for _, group in ipairs(groups_) do
    if not seen[group] then
      seen[group] = true
      local jobs, listed = redis.call('ZCARD', p .. 'queue:' .. group), redis.call('SISMEMBER', p .. 'groups', group) == 1
      queued = queued + jobs
      if (jobs > 0) ~= listed then
        finding(found, listed and 'group_without_jobs' or 'group_not_indexed', group)
        if repair then redis.call(listed and 'SREM' or 'SADD', p .. 'groups', group) end
        c.groups[group] = true
      end
    end
  end
  local totals = {}
  local raw = redis.call('HGETALL', p .. 'counts')
  for i = 1, #raw, 2 do totals[raw[i]] = tonumber(raw[i + 1]) end
  local function total(name) return totals[name] or 0 end
  if queued ~= total('queued') then
    finding(found, 'count_of_queued', total('queued') .. ' instead of ' .. queued)
    if repair then redis.call('HSET', p .. 'counts', 'queued', queued) end
  end
  local live = queued + redis.call('ZCARD', p .. 'delayed')
  for _, bid in ipairs(redis.call('ZRANGE', p .. 'leases', 0, -1)) do live = live + redis.call('SCARD', p .. 'members:' .. bid) end
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
  { 'ly_resign', resign, 'allow-oom' }, { 'ly_lift', lift, 'allow-oom' }, { 'ly_pause', pause, 'allow-oom' }, { 'ly_forget', forget, 'allow-oom' },
  { 'ly_audit_jobs', audit_jobs, 'allow-oom' }, { 'ly_audit_entries', audit_entries, 'allow-oom' },
  { 'ly_audit_batches', audit_batches, 'allow-oom' }, { 'ly_audit_worker', audit_worker, 'allow-oom' },
  { 'ly_audit_totals', audit_totals, 'allow-oom' },
  { 'ly_groups', groups, 'no-writes' }, { 'ly_snapshot', snapshot, 'no-writes' }, { 'ly_show', show, 'no-writes' },
}
for i = 1, #library do
  redis.register_function({ function_name = library[i][1], callback = library[i][2], flags = { library[i][3] } })
end
