#!lua name=lorayard
-- The ledger: every transition of a job, each one call that may carry many jobs. The only writer of what is listed here.
--
-- KEYS[1] of every function is the pool's prefix `ly:{POOL}:`; all keys are derived from it, so all lie in one hash slot.
-- A job is named by its ref, TENANT/ID: one tenant's ids can therefore never reach another tenant's jobs.
--
--   job:REF              STRING  header \n meta \n request                       from enqueue to its end (dead letters keep it)
--   run:REF              HASH    b batch, a attempts, s started ms, c claimed ms  from first claim to its end
--   result:REF           STRING  header \n meta \n outcome, with a TTL           from its end on
--   queue:DIGEST:TENANT  ZSET    id -> due ms
--   groups               SET     DIGEST:TENANT of every queue that is not empty
--   delayed              ZSET    ref -> ms when it goes to its queue
--   deadlines            ZSET    ref -> ms when it expires unless it was started
--   batch:BID            HASH    w worker, i incarnation, d digest, f fence, c claimed ms, t taken ms, n jobs, by tenants, y why
--   members:BID          SET     refs not ended yet
--   stop:BID             SET     refs cancelled while at a worker, until the worker has heard of it
--   leases               ZSET    batch -> expiry ms (of the delivery until it is taken, of the lease from then on)
--   outstanding:WORKER   SET     batches
--   dead                 ZSET    ref -> ms; failed at the attempt cap
--   idem:TENANT:KEY      STRING  id \t digest of the body
--   by_tenant:TENANT     ZSET    id -> enqueued ms
--   served               HASH    tenant -> tokens
--   counts               HASH    queued (exact), and totals since the pool was made
--   leader               HASH    id, epoch, until
--   fence                STRING  counter
--   events               STREAM  k kind, v value; capped: a hint, never the truth
--
-- job header:    due \t enqueued \t deadline \t digest \t tenant \t max attempts \t via \t idem
-- result header: status \t fence \t ended \t enqueued \t claimed \t taken \t attempts \t worker \t batch \t batch size \t via \t why

local EVENTS_KEPT = 20000

local function now() -- ms; the only clock of the ledger
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function chunks(list, size, call)
  for i = 1, #list, size do
    call(unpack(list, i, math.min(i + size - 1, #list)))
  end
end

local function event(p, kind, value)
  redis.call('XADD', p .. 'events', 'MAXLEN', '~', EVENTS_KEPT, '*', 'k', kind, 'v', value)
end

local function count(p, what, by)
  redis.call('HINCRBY', p .. 'counts', what, by)
end

-- header fields of job:REF and its meta line, or nil
local function read_job(p, ref)
  local value = redis.call('GET', p .. 'job:' .. ref)
  if not value then return nil end
  local header, meta = string.match(value, '^(.-)\n(.-)\n')
  local due, enqueued, deadline, digest, tenant, max, via, idem =
    string.match(header, '^(.-)\t(.-)\t(.-)\t(.-)\t(.-)\t(.-)\t(.-)\t(.*)$')
  return {
    due = due, enqueued = enqueued, deadline = tonumber(deadline), digest = digest, tenant = tenant,
    max = tonumber(max), via = via, idem = idem, meta = meta, id = string.sub(ref, #tenant + 2), value = value,
  }
end

local function push(p, job, touched) -- into its queue
  local group = job.digest .. ':' .. job.tenant
  redis.call('ZADD', p .. 'queue:' .. group, job.due, job.id)
  redis.call('SADD', p .. 'groups', group)
  count(p, 'queued', 1)
  touched[group] = true
end

local function tell_groups(p, touched)
  local names = {}
  for group in pairs(touched) do names[#names + 1] = group end
  if #names > 0 then
    table.sort(names)
    event(p, 'queued', table.concat(names, ' '))
  end
end

local function leave_queue(p, job) -- true if it was queued
  local group = job.digest .. ':' .. job.tenant
  if redis.call('ZREM', p .. 'queue:' .. group, job.id) == 0 then return false end
  if redis.call('EXISTS', p .. 'queue:' .. group) == 0 then redis.call('SREM', p .. 'groups', group) end
  count(p, 'queued', -1)
  return true
end

-- The one way into a terminal status. `outcome` is JSON.
local function store(p, ref, job, status, fence, outcome, ttl, ended)
  local run = redis.call('HMGET', p .. 'run:' .. ref, 'a', 'b', 'c')
  local batch = run[2] and redis.call('HMGET', p .. 'batch:' .. run[2], 't', 'w', 'n', 'y') or {}
  local header = table.concat({
    status, fence, ended, job.enqueued, run[3] or 0, batch[1] or 0, run[1] or 0, batch[2] or '', run[2] or '', batch[3] or 0, job.via, batch[4] or '',
  }, '\t')
  redis.call('SET', p .. 'result:' .. ref, header .. '\n' .. job.meta .. '\n' .. outcome, 'EX', ttl)
  redis.call('DEL', p .. 'run:' .. ref)
  if job.deadline > 0 then redis.call('ZREM', p .. 'deadlines', ref) end
  if job.idem ~= '' then redis.call('EXPIRE', p .. 'idem:' .. job.tenant .. ':' .. job.idem, ttl) end
  count(p, status, 1)
end

local function drop_request(p, ref)
  redis.call('DEL', p .. 'job:' .. ref)
end

local function close_if_empty(p, bid)
  if redis.call('EXISTS', p .. 'members:' .. bid) == 1 then return end
  local worker = redis.call('HGET', p .. 'batch:' .. bid, 'w')
  redis.call('DEL', p .. 'batch:' .. bid)
  redis.call('ZREM', p .. 'leases', bid)
  if redis.call('EXISTS', p .. 'stop:' .. bid) == 1 then redis.call('PEXPIRE', p .. 'stop:' .. bid, 60000) end
  if worker then
    redis.call('SREM', p .. 'outstanding:' .. worker, bid)
    event(p, 'batch', bid)
  end
end

-- Take an ended job out of a batch that a worker has; the worker hears of it when it renews, or when it would start the job.
local function stop_at_worker(p, ref, bid)
  redis.call('SADD', p .. 'stop:' .. bid, ref)
  redis.call('SREM', p .. 'members:' .. bid, ref)
  close_if_empty(p, bid)
end

-- A job at its attempt cap goes to the dead letters with its request, so that it can be retried by hand.
local function bury(p, ref, job, fence, outcome, ttl, at)
  store(p, ref, job, 'failed', fence, outcome, ttl, at)
  redis.call('ZADD', p .. 'dead', at, ref)
  redis.call('EXPIRE', p .. 'job:' .. ref, ttl)
  count(p, 'dead', 1)
end

local LOST = '{"error":{"message":"the worker was lost while it ran this job, as often as attempts are allowed","type":"server_error","code":"worker_lost","param":null}}'

-- Take one job out of a batch and queue it again. A job that had started has used an attempt already (ly_start counted it).
local function requeue(p, ref, bid, ttl, at, touched, ended)
  local run = redis.call('HMGET', p .. 'run:' .. ref, 'a', 's', 'b')
  local job = read_job(p, ref)
  if job and run[3] == bid then
    if run[2] and tonumber(run[1] or 0) >= job.max then
      bury(p, ref, job, redis.call('HGET', p .. 'batch:' .. bid, 'f'), LOST, ttl, at)
      ended[#ended + 1] = ref
    else
      redis.call('HDEL', p .. 'run:' .. ref, 'b', 's', 'c')
      push(p, job, touched)
      count(p, 'requeued', 1)
    end
  end
  redis.call('SREM', p .. 'members:' .. bid, ref)
end

local function requeue_batch(p, bid, ttl, at, touched, ended)
  for _, ref in ipairs(redis.call('SMEMBERS', p .. 'members:' .. bid)) do
    requeue(p, ref, bid, ttl, at, touched, ended)
  end
  close_if_empty(p, bid)
end

local function tell_ended(p, refs)
  if #refs > 0 then event(p, 'ended', table.concat(refs, ' ')) end
end

-- ly_enqueue P | max_queued, then per job: id tenant digest wait_ms deadline_ms not_before_ms max_attempts via idem hash payload
-- -> per job 'q' queued, 'd' delayed, 'e'..id the same key and body again, 'c' another body, 'f' full
local function enqueue(keys, args)
  local p, at = keys[1], now()
  local room = tonumber(args[1]) - tonumber(redis.call('HGET', p .. 'counts', 'queued') or 0)
  local reply, values, queues, tenants, queued = {}, {}, {}, {}, 0
  for i = 2, #args, 11 do
    local id, tenant, digest = args[i], args[i + 1], args[i + 2]
    local wait, deadline, not_before = tonumber(args[i + 3]), tonumber(args[i + 4]), tonumber(args[i + 5])
    local idem, hash = args[i + 8], args[i + 9]
    local ref = tenant .. '/' .. id
    local known = idem ~= '' and redis.call('GET', p .. 'idem:' .. tenant .. ':' .. idem)
    if known then
      local first, body = string.match(known, '^(.-)\t(.*)$')
      reply[#reply + 1] = body == hash and 'e' .. first or 'c'
    elseif room <= 0 then
      reply[#reply + 1] = 'f'
    elseif idem ~= '' and redis.call('EXISTS', p .. 'job:' .. ref, p .. 'result:' .. ref) > 0 then
      reply[#reply + 1] = 'c'
    else
      room = room - 1
      local due = deadline > 0 and at + deadline or at + not_before + wait
      local expiry = deadline > 0 and at + deadline or 0
      values[#values + 1] = p .. 'job:' .. ref
      values[#values + 1] = table.concat({ due, at, expiry, digest, tenant, args[i + 6], args[i + 7], idem }, '\t') .. '\n' .. args[i + 10]
      if idem ~= '' then redis.call('SET', p .. 'idem:' .. tenant .. ':' .. idem, id .. '\t' .. hash) end
      if expiry > 0 then redis.call('ZADD', p .. 'deadlines', expiry, ref) end
      tenants[tenant] = tenants[tenant] or {}
      table.insert(tenants[tenant], at)
      table.insert(tenants[tenant], id)
      if not_before > 0 then
        redis.call('ZADD', p .. 'delayed', at + not_before, ref)
        reply[#reply + 1] = 'd'
      else
        local group = digest .. ':' .. tenant
        queues[group] = queues[group] or {}
        table.insert(queues[group], due)
        table.insert(queues[group], id)
        queued = queued + 1
        reply[#reply + 1] = 'q'
      end
    end
  end
  chunks(values, 2000, function(...) redis.call('MSET', ...) end)
  local touched = {}
  for group, pairs_ in pairs(queues) do
    chunks(pairs_, 2000, function(...) redis.call('ZADD', p .. 'queue:' .. group, ...) end)
    redis.call('SADD', p .. 'groups', group)
    touched[group] = true
  end
  for tenant, pairs_ in pairs(tenants) do
    chunks(pairs_, 2000, function(...) redis.call('ZADD', p .. 'by_tenant:' .. tenant, ...) end)
  end
  if #values > 0 then
    count(p, 'queued', queued)
    count(p, 'enqueued', #values / 2)
    tell_groups(p, touched)
  end
  return reply
end

-- ly_claim P | epoch worker max_outstanding batch digest delivery_ms ttl_s why, then per tenant: tenant n
-- -> {'ok', fence, n} | {'epoch'} | {'busy'} | {'empty'}
local function claim(keys, args)
  local p, at = keys[1], now()
  local epoch, worker, most, bid, digest = args[1], args[2], tonumber(args[3]), args[4], args[5]
  if redis.call('HGET', p .. 'leader', 'epoch') ~= epoch then return { 'epoch' } end
  if redis.call('SCARD', p .. 'outstanding:' .. worker) >= most then return { 'busy' } end
  local refs, by = {}, {}
  for i = 9, #args, 2 do
    local tenant = args[i]
    local group = digest .. ':' .. tenant
    local popped = redis.call('ZPOPMIN', p .. 'queue:' .. group, args[i + 1])
    for k = 1, #popped, 2 do refs[#refs + 1] = tenant .. '/' .. popped[k] end
    if #popped > 0 then by[#by + 1] = tenant .. ' ' .. (#popped / 2) end
    if redis.call('EXISTS', p .. 'queue:' .. group) == 0 then redis.call('SREM', p .. 'groups', group) end
  end
  if #refs == 0 then return { 'empty' } end
  count(p, 'queued', -#refs)
  local fence = redis.call('INCR', p .. 'fence')
  for _, ref in ipairs(refs) do redis.call('HSET', p .. 'run:' .. ref, 'b', bid, 'c', at) end
  chunks(refs, 2000, function(...) redis.call('SADD', p .. 'members:' .. bid, ...) end)
  redis.call('HSET', p .. 'batch:' .. bid, 'w', worker, 'd', digest, 'f', fence, 'c', at, 'n', #refs, 'by', table.concat(by, ' '), 'y', args[8])
  redis.call('ZADD', p .. 'leases', at + args[6], bid)
  redis.call('SADD', p .. 'outstanding:' .. worker, bid)
  return { 'ok', fence, #refs }
end

-- ly_take P | batch worker incarnation lease_ms -> {} | {fence, digest, claimed, taken, then per job: ref attempts value}
local function take(keys, args)
  local p, at, bid = keys[1], now(), args[1]
  local batch = redis.call('HMGET', p .. 'batch:' .. bid, 'w', 't', 'f', 'd', 'c')
  if batch[1] ~= args[2] or batch[2] then return {} end
  redis.call('HSET', p .. 'batch:' .. bid, 't', at, 'i', args[3])
  redis.call('ZADD', p .. 'leases', at + args[4], bid)
  local reply = { tonumber(batch[3]), batch[4], tonumber(batch[5]), at }
  for _, ref in ipairs(redis.call('SMEMBERS', p .. 'members:' .. bid)) do
    local value = redis.call('GET', p .. 'job:' .. ref)
    if value then
      reply[#reply + 1] = ref
      reply[#reply + 1] = tonumber(redis.call('HGET', p .. 'run:' .. ref, 'a') or 0)
      reply[#reply + 1] = value
    end
  end
  return reply
end

local function current(p, bid, fence)
  return redis.call('HGET', p .. 'batch:' .. bid, 'f') == fence
end

-- ly_start P | batch fence ref... -> refs that must not go on. Counts the attempt.
local function start(keys, args)
  local p, at, bid, stop = keys[1], now(), args[1], {}
  local valid = current(p, bid, args[2])
  for i = 3, #args do
    local key = p .. 'run:' .. args[i]
    local run = redis.call('HMGET', key, 'b', 's')
    if not valid or run[1] ~= bid then
      stop[#stop + 1] = args[i]
    elseif not run[2] then
      redis.call('HINCRBY', key, 'a', 1)
      redis.call('HSET', key, 's', at)
    end
  end
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

-- ly_finish P | batch fence ttl_s, then per job: ref status delay_ms tokens outcome
-- status succeeded | failed | retry (an attempt was used) | later (none was)
-- -> per job 's' stored, 'r' will be retried, 'a' already stored by this fence, 'x' stale: refused
local function finish(keys, args)
  local p, at, bid, fence, ttl = keys[1], now(), args[1], args[2], args[3]
  local valid, reply, ended, touched = current(p, bid, fence), {}, {}, {}
  for i = 4, #args, 5 do
    local ref, status, delay, tokens, outcome = args[i], args[i + 1], tonumber(args[i + 2]), tonumber(args[i + 3]), args[i + 4]
    local job = valid and redis.call('HGET', p .. 'run:' .. ref, 'b') == bid and read_job(p, ref)
    if not job then
      local stored = redis.call('GETRANGE', p .. 'result:' .. ref, 0, 64)
      if string.match(stored, '^%a+\t(%d+)\t') == fence then
        reply[#reply + 1] = 'a'
      else
        count(p, 'stale', 1)
        reply[#reply + 1] = 'x'
      end
    else
      if tokens > 0 then redis.call('HINCRBY', p .. 'served', job.tenant, tokens) end
      local run = redis.call('HMGET', p .. 'run:' .. ref, 'a', 's')
      local attempts = tonumber(run[1] or 0)
      if status == 'retry' and not run[2] then -- it failed before it was started: without this it would be tried for ever
        attempts = redis.call('HINCRBY', p .. 'run:' .. ref, 'a', 1)
      end
      if status == 'later' or (status == 'retry' and attempts < job.max) then
        if status == 'later' and redis.call('HEXISTS', p .. 'run:' .. ref, 's') == 1 then
          redis.call('HINCRBY', p .. 'run:' .. ref, 'a', -1) -- ly_start counted it
        end
        redis.call('HDEL', p .. 'run:' .. ref, 'b', 's', 'c')
        if delay > 0 then redis.call('ZADD', p .. 'delayed', at + delay, ref) else push(p, job, touched) end
        count(p, 'retried', 1)
        reply[#reply + 1] = 'r'
      else
        if status == 'retry' then
          bury(p, ref, job, fence, outcome, ttl, at)
        else
          store(p, ref, job, status, fence, outcome, ttl, at)
          drop_request(p, ref)
        end
        ended[#ended + 1] = ref
        reply[#reply + 1] = 's'
      end
      redis.call('SREM', p .. 'members:' .. bid, ref)
    end
  end
  tell_ended(p, ended)
  tell_groups(p, touched)
  if valid then close_if_empty(p, bid) end
  return reply
end

-- ly_give_back P | batch fence ttl_s ref... -> number queued again. Only jobs that were not started; costs no attempt.
local function give_back(keys, args)
  local p, at, bid, touched, n = keys[1], now(), args[1], {}, 0
  if not current(p, bid, args[2]) then return 0 end
  for i = 4, #args do
    local run = redis.call('HMGET', p .. 'run:' .. args[i], 'b', 's')
    if run[1] == bid and not run[2] then
      requeue(p, args[i], bid, args[3], at, touched, {})
      n = n + 1
    end
  end
  tell_groups(p, touched)
  close_if_empty(p, bid)
  return n
end

-- ly_hello P | worker incarnation ttl_s -> batches taken by an earlier process of this name, queued again at once
local function hello(keys, args)
  local p, at, worker, touched, ended, n = keys[1], now(), args[1], {}, {}, 0
  for _, bid in ipairs(redis.call('SMEMBERS', p .. 'outstanding:' .. worker)) do
    local by = redis.call('HGET', p .. 'batch:' .. bid, 'i')
    if by and by ~= args[2] then
      requeue_batch(p, bid, args[3], at, touched, ended)
      n = n + 1
    end
  end
  tell_groups(p, touched)
  tell_ended(p, ended)
  event(p, 'worker', worker)
  return n
end

local CANCELLED = '{"error":{"message":"cancelled by request","type":"invalid_request_error","code":"cancelled","param":null}}'
local EXPIRED = '{"error":{"message":"its deadline passed before it was started","type":"server_error","code":"expired","param":null}}'

-- ly_cancel P | tenant ttl_s id... -> per job 'c' cancelled, 't' ended before, 'n' no such job
local function cancel(keys, args)
  local p, at, tenant, reply, ended = keys[1], now(), args[1], {}, {}
  for i = 3, #args do
    local ref = tenant .. '/' .. args[i]
    if redis.call('EXISTS', p .. 'result:' .. ref) == 1 then
      reply[#reply + 1] = 't'
    else
      local job = read_job(p, ref)
      if not job then
        reply[#reply + 1] = 'n'
      else
        local bid = redis.call('HGET', p .. 'run:' .. ref, 'b')
        if not leave_queue(p, job) then redis.call('ZREM', p .. 'delayed', ref) end
        store(p, ref, job, 'cancelled', 0, CANCELLED, args[2], at)
        drop_request(p, ref)
        if bid then stop_at_worker(p, ref, bid) end
        ended[#ended + 1] = ref
        reply[#reply + 1] = 'c'
      end
    end
  end
  tell_ended(p, ended)
  return reply
end

-- ly_reap P | limit ttl_s -> {batches whose lease ran out, delayed jobs woken, jobs expired}
local function reap(keys, args)
  local p, at, limit, ttl = keys[1], now(), args[1], args[2]
  local touched, ended = {}, {}
  local lapsed = redis.call('ZRANGEBYSCORE', p .. 'leases', '-inf', at, 'LIMIT', 0, limit)
  for _, bid in ipairs(lapsed) do
    count(p, redis.call('HEXISTS', p .. 'batch:' .. bid, 't') == 1 and 'leases_lapsed' or 'deliveries_lapsed', 1)
    requeue_batch(p, bid, ttl, at, touched, ended)
  end
  local woken = redis.call('ZRANGEBYSCORE', p .. 'delayed', '-inf', at, 'LIMIT', 0, limit)
  for _, ref in ipairs(woken) do
    redis.call('ZREM', p .. 'delayed', ref)
    local job = read_job(p, ref)
    if job then push(p, job, touched) end
  end
  local expired = 0
  for _, ref in ipairs(redis.call('ZRANGEBYSCORE', p .. 'deadlines', '-inf', at, 'LIMIT', 0, limit)) do
    redis.call('ZREM', p .. 'deadlines', ref)
    local job = read_job(p, ref)
    if job and (leave_queue(p, job) or redis.call('ZREM', p .. 'delayed', ref) == 1) then
      store(p, ref, job, 'expired', 0, EXPIRED, ttl, at)
      drop_request(p, ref)
      ended[#ended + 1] = ref
      expired = expired + 1
    elseif job then
      local run = redis.call('HMGET', p .. 'run:' .. ref, 'b', 's')
      if run[1] and not run[2] then -- it waits at a worker
        store(p, ref, job, 'expired', 0, EXPIRED, ttl, at)
        drop_request(p, ref)
        stop_at_worker(p, ref, run[1])
        ended[#ended + 1] = ref
        expired = expired + 1
      else -- it runs: let it finish; should it come back to its queue, the next sweep finds it again
        redis.call('ZADD', p .. 'deadlines', at + 1000, ref)
      end
    end
  end
  tell_groups(p, touched)
  tell_ended(p, ended)
  return { #lapsed, #woken, expired }
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

local function measure(p, groups)
  local reply = {}
  for _, group in ipairs(groups) do
    local head = redis.call('ZRANGE', p .. 'queue:' .. group, 0, 0, 'WITHSCORES')
    reply[#reply + 1] = { group, redis.call('ZCARD', p .. 'queue:' .. group), head[2] or '0' }
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
  local reply = { now(), measure(p, redis.call('SMEMBERS', p .. 'groups')), in_flight(p), redis.call('HGETALL', p .. 'served') }
  reply[5] = last[1] and last[1][1] or '0-0'
  return reply
end

-- ly_lift P | tenant to -> raises what a tenant counts as served to `to`: a newcomer has no claim on the past
local function lift(keys, args)
  local served = tonumber(redis.call('HGET', keys[1] .. 'served', args[1]) or 0)
  if served < tonumber(args[2]) then redis.call('HSET', keys[1] .. 'served', args[1], args[2]) end
  return 1
end

-- ly_show P | ref... -> per job {} | {result value} | {job value, batch, attempts, started, taken, delayed until}
local function show(keys, args)
  local p, reply = keys[1], {}
  for _, ref in ipairs(args) do
    local result = redis.call('GET', p .. 'result:' .. ref)
    if result then
      reply[#reply + 1] = { result }
    else
      local value = redis.call('GET', p .. 'job:' .. ref)
      if value then
        local run = redis.call('HMGET', p .. 'run:' .. ref, 'b', 'a', 's')
        local batch = run[1] and redis.call('HMGET', p .. 'batch:' .. run[1], 't', 'w', 'n', 'y') or {}
        reply[#reply + 1] = {
          value, run[1] or '', tonumber(run[2] or 0), tonumber(run[3] or 0), redis.call('ZSCORE', p .. 'delayed', ref) or '',
          batch[2] or '', tonumber(batch[3] or 0), batch[4] or '',
        }
      else
        reply[#reply + 1] = {}
      end
    end
  end
  return reply
end

-- ly_forget P | tenant before_ms limit -> listing entries dropped whose job is gone
local function forget(keys, args)
  local p, tenant, dropped = keys[1], args[1], 0
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', p .. 'by_tenant:' .. tenant, '-inf', args[2], 'LIMIT', 0, args[3])) do
    local ref = tenant .. '/' .. id
    if redis.call('EXISTS', p .. 'job:' .. ref, p .. 'result:' .. ref) == 0 then
      redis.call('ZREM', p .. 'by_tenant:' .. tenant, id)
      redis.call('ZREM', p .. 'dead', ref)
      dropped = dropped + 1
    end
  end
  return dropped
end

local writers = {
  { 'ly_enqueue', enqueue }, { 'ly_claim', claim }, { 'ly_take', take }, { 'ly_start', start }, { 'ly_renew', renew }, { 'ly_finish', finish },
  { 'ly_give_back', give_back }, { 'ly_hello', hello }, { 'ly_cancel', cancel }, { 'ly_reap', reap }, { 'ly_lead', lead }, { 'ly_resign', resign },
  { 'ly_lift', lift }, { 'ly_forget', forget },
}
for i = 1, #writers do redis.register_function(writers[i][1], writers[i][2]) end
local readers = { { 'ly_groups', groups }, { 'ly_snapshot', snapshot }, { 'ly_show', show } }
for i = 1, #readers do
  redis.register_function({ function_name = readers[i][1], callback = readers[i][2], flags = { 'no-writes' } })
end
