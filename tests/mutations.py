"""The list of what is broken on purpose: `mutants.py` runs the tests on each. Here are ledger and workers; `mutations_scheduler.py` and
`mutations_hosted.py` have the rest."""

from __future__ import annotations

from typing import NamedTuple

LEDGER = "lorayard/ledger/functions.lua"


class Mutant(NamedTuple):
    """`old`, which is in the function `within` exactly once, becomes `new`. `suite`: whose tests must notice (`mutants.SUITES`)."""

    kind: str
    name: str
    within: str
    old: str
    new: str
    suite: str = "ledger"
    file: str = LEDGER


def of(kind: str, *rows: tuple[str, str, str, str], suite: str = "ledger", file: str = LEDGER) -> list[Mutant]:
    """Mutants of one file, as (name, within, old, new)."""
    return [Mutant(kind, *row, suite, file) for row in rows]


FENCING = of(
    "fencing",
    ("every fence is current", "current", "return redis.call('HGET', p .. 'batch:' .. bid, 'f') == fence", "return true"),
    ("finish asks for the batch, not for its fence", "finish", "local valid = batch.fence == fence", "local valid = batch.id ~= ''"),
    ("finish does not ask whose job it is", "finish", "if mine[k] ~= 1 or done[ref]", "if not valid or done[ref]"),
    ("renew ignores the fence", "renew", "if current(p, bid, args[i + 1]) and", "if redis.call('EXISTS', p .. 'batch:' .. bid) == 1 and"),
    ("start ignores the fence", "start", "current(p, bid, args[2]) and gather(", "gather("),
    ("give_back ignores the fence", "give_back", "if batch.fence ~= args[2] then", "if batch.id == '' then"),
    (
        "all batches have one fence",
        "claim",
        "redis.call('INCR', p .. 'fence')",
        "tonumber(redis.call('GET', p .. 'fence') or redis.call('INCR', p .. 'fence'))",
    ),
    ("a stale result is not counted", "refuse", "count(c, 'stale', 1)", ""),
    ("any end counts as stored by this fence", "refuse", " and string.match(value, '^%a+\\t(%d+)\\t') == fence", ""),
    ("a repeated finish is called stale", "refuse", "then return 'a' end", "then end"),
    ("a job named twice in one call ends twice", "finish", " or done[ref] or not", " or not"),
)

LEASES = of(
    "leases",
    ("no lease ever runs out", "reap", "p .. 'leases', '-inf', c.at_text", "p .. 'leases', '-inf', '-inf'"),
    ("every lease has run out", "reap", "p .. 'leases', '-inf', c.at_text", "p .. 'leases', '-inf', '+inf'"),
    ("leases run out while nobody could renew them", "reap", "if before and c.at - before > tonumber(args[4]) then", "if false then"),
    ("the grace after an outage never ends", "reap", "if before and c.at - before > tonumber(args[4]) then", "if before then"),
    ("the grace after an outage shortens leases", "reap", "p .. 'leases', '-inf', digits(c.at + args[3])", "p .. 'leases', '-inf', '+inf'"),
    ("taking begins no lease", "take", "redis.call('ZADD', c.p .. 'leases', digits(c.at + args[4]), bid)", ""),
    ("renewing renews nothing", "renew", "redis.call('ZADD', p .. 'leases', 'XX', digits(at + args[1]), bid)", ""),
    (
        "a batch can be taken twice",
        "take",
        "if batch.token and (batch.token ~= args[5] or batch.incarnation ~= args[3]) then return {} end",
        "",
    ),
    ("any worker can take a batch", "take", "if batch.worker ~= args[2] or batch.id == ''", "if batch.id == ''"),
    ("a restarted worker's batches stay with it", "hello", "if by and by ~= args[2] then", "if by and by == args[2] then"),
    ("a restarted worker loses what is on its way to it", "hello", "if by and by ~= args[2] then", "if by ~= args[2] then"),
    ("a batch whose jobs were queued again stays open", "requeue_batch", "close_if_empty(c, bid)", ""),
    ("a closed batch counts against its worker", "close_if_empty", "redis.call('SREM', c.p .. 'outstanding:' .. worker, bid)", ""),
    ("a closed batch keeps its lease", "close_if_empty", "redis.call('ZREM', c.p .. 'leases', bid)", ""),
    (
        "what a lost batch had is queued and still its own",
        "requeue",
        "redis.call('SREM', c.p .. 'members:'",
        "redis.call('SISMEMBER', c.p .. 'members:'",
    ),
)

IDEMPOTENCY = of(
    "idempotency",
    ("the key is not stored", "enqueue", "redis.call('SET', p .. 'idem:' .. sort.tenant .. ':' .. idem, id .. '\\t' .. sort.hash)", ""),
    ("the body is not compared", "enqueue", "answer = body == sort.hash and 'e' .. first or 'c'", "answer = 'e' .. first"),
    (
        "the key outlives its job for ever",
        "clean",
        "if job.idem ~= '' then redis.call('EXPIRE', c.p .. 'idem:' .. job.tenant .. ':' .. job.idem, ttl) end",
        "",
    ),
    ("the key dies before its job", "enqueue", "id .. '\\t' .. sort.hash)", "id .. '\\t' .. sort.hash, 'EX', 3600)"),
    ("one id twice in a call", "enqueue", "elseif fresh[ref] or (", "elseif ("),
    ("a known id is written over", "enqueue", "(known_ids > 0 and redis.call('EXISTS', names[k]) == 1)", "false"),
    ("the key of a dead letter that lives again dies", "revive", "redis.call('PERSIST', c.p .. 'idem:' .. tenant .. ':' .. job.idem)", ""),
    ("a call repeated without keys is refused", "enqueue", "answer = idem == '' and 'e' .. id or 'c'", "answer = 'c'"),
    ("a repeated claim claims more", "claim", "if before.id ~= '' then", "if false then"),
)

TIME = of(
    "time",
    ("deadlines are not watched", "enqueue", "redis.call('ZADD', p .. 'deadlines', sort.expiry, ref)", ""),
    ("a job expires while it runs", "reap", "if begun == 1 then", "if false then"),
    ("the deadline of a running job is forgotten", "reap", "redis.call('ZADD', p .. 'deadlines', digits(c.at + 1000), ref)", ""),
    ("what waits at a worker does not expire", "reap", "elseif job then", "elseif job and batch_of(p, ref).id == '' then"),
    ("an ended job's deadline stays", "clean", "redis.call('ZREM', c.p .. 'deadlines', job.ref)", ""),
    ("not_before is ignored", "sort_of", "tonumber(deadline), tonumber(not_before)", "tonumber(deadline), 0"),
    ("what is delayed wakes at once", "reap", "p .. 'delayed', '-inf', c.at_text", "p .. 'delayed', '-inf', '+inf'"),
    ("what is delayed never wakes", "reap", "p .. 'delayed', '-inf', c.at_text", "p .. 'delayed', '-inf', '-inf'"),
    ("a retry does not wait", "come_back", "if delay > 0 then", "if false then"),
    ("a deadline does not make due", "sort_of", "deadline > 0 and deadline or not_before + wait", "not_before + wait"),
    ("priorities are ignored", "sort_of", "not_before + wait", "not_before"),
    ("a result stays for ever (the plain case)", "finish", ".. outcome, 'EX', ttl)", ".. outcome)"),
    ("a result stays for ever (the others)", "store", "value .. (rest or ''), 'EX', ttl)", "value .. (rest or ''))"),
)

ATTEMPTS = of(
    "attempts",
    ("starting does not count", "start", "redis.call('SADD', p .. 'begun:' .. bid, ...)", ""),
    ("a lost worker costs two attempts", "requeue", "attempts = attempts + begun", "attempts = attempts + 2 * begun"),
    ("a lost worker costs none", "requeue", "attempts = attempts + begun", ""),
    ("a lost worker costs its unstarted jobs one", "requeue_batch", "begun[i]", "1"),
    ("one attempt too many, by loss", "requeue", "attempts >= job.max", "attempts > job.max"),
    ("one attempt too few, by loss", "requeue", "attempts >= job.max", "attempts + 1 >= job.max"),
    ("one attempt too many, by retry", "come_back", "attempts >= job.max", "attempts > job.max"),
    (
        "a retry of what never started is free",
        "come_back",
        "attempts = attempts + 1",
        "attempts = attempts + redis.call('SISMEMBER', c.p .. 'begun:' .. batch.id, job.ref)",
    ),
    ("giving back costs an attempt", "give_back", "requeue(c, ref, batch, 0, args[3])", "requeue(c, ref, batch, 1, args[3])"),
    (
        "what has started can be given back",
        "give_back",
        "if mine and redis.call('SISMEMBER', c.p .. 'begun:' .. batch.id, ref) == 0 then",
        "if mine then",
    ),
    ("later costs an attempt", "come_back", "laters = laters + 1", "laters, attempts = laters + 1, attempts + 1"),
    ("later is not counted", "come_back", "laters = laters + 1", ""),
    ("attempts are forgotten", "write_tries", "if attempts + laters > 0 then", "if false then"),
    ("a result tells one attempt too few", "finish", ".. attempts + 1 .. back", ".. attempts .. back"),
    ("an ended job leaves its tries (the plain case)", "finish", "redis.call('HDEL', p .. 'tries', ref)", ""),
    ("a dead letter lives again with its old attempts", "conclude", "redis.call('HDEL', c.p .. 'tries', job.ref)", ""),
    ("why it was put off is forgotten when it is put off again", "come_back", "why == '' and before or why", "why"),
    ("why it was put off is forgotten when its worker is lost", "requeue", "attempts, laters, why)", "attempts, laters, '')"),
    ("why it was put off is not told in the end (the plain case)", "finish", "outcome = with_tries(tries[k], outcome)", ""),
    ("why it was put off is not told in the end", "conclude", "outcome = with_tries(tries, outcome)", ""),
    ("half a character of why is kept", "why_of", "string.byte(message, last + 1) >= 128 and", "false and"),
    ("a dead letter has lost its request", "bury", "'\\n' .. head_of(job) .. '\\n' .. job.request", "nil"),
    ("dead letters are not listed", "bury", "redis.call('ZADD', c.p .. 'dead:' .. job.tenant, c.at_text, job.id)", ""),
)

WITHDRAWAL = of(
    "cancel, delete, retry",
    ("a cancelled job's late result is stored", "withdraw", "redis.call('SREM', c.p .. 'members:' .. batch.id, job.ref)", ""),
    ("a cancelled job stays queued", "withdraw", "if leave_queue(c, job) or redis.call", "if redis.call"),
    (
        "a cancelled job stays delayed",
        "withdraw",
        "redis.call('ZREM', c.p .. 'delayed', job.ref) == 1",
        "redis.call('ZSCORE', c.p .. 'delayed', job.ref)",
    ),
    ("a queue that is empty stays in the index", "leave_queue", "redis.call('SREM', c.p .. 'groups', group)", ""),
    ("the worker never hears of a cancel", "withdraw", "redis.call('SADD', c.p .. 'stop:' .. batch.id, job.ref)", ""),
    ("a cancel is told at every renewal", "renew", "redis.call('DEL', p .. 'stop:' .. bid)", ""),
    ("what was to be told stays for ever", "close_if_empty", "redis.call('PEXPIRE', c.p .. 'stop:' .. bid, 60000)", ""),
    ("the last job of a batch is cancelled, and it stays open", "withdraw", "close_if_empty(c, batch.id)", ""),
    ("delete leaves the key", "delete", "if idem ~= '' then redis.call('DEL', c.p .. 'idem:' .. tenant .. ':' .. idem) end", ""),
    ("delete leaves the listing", "delete", "redis.call('ZREM', c.p .. 'by_tenant:' .. tenant, id)", ""),
    ("delete leaves the deadline", "delete", "redis.call('ZREM', c.p .. 'deadlines', ref)", ""),
    ("delete leaves the tries", "delete", "redis.call('HDEL', c.p .. 'tries', ref)", ""),
    ("delete leaves the dead letter", "delete", "redis.call('ZREM', c.p .. 'dead:' .. tenant, id)", ""),
    ("delete takes only what has ended", "delete", "withdraw(c, job)", ""),
    ("a deleted job counts as living", "delete", "count(c, 'deleted_live', 1)", ""),
    ("a retried dead letter keeps its deadline", "revive", "job.deadline = 0", ""),
    ("a retried dead letter is due when it was", "revive", "job.due = digits(", "local _ = digits("),
    ("a retried dead letter is not counted", "revive", "count(c, 'revived', 1)", ""),
    ("a dead letter outlives its result and an id used again", "enqueue", "redis.call('ZREM', p .. 'dead:' .. sort.tenant, id)", ""),
    ("listings of living jobs are forgotten", "forget", "if redis.call('EXISTS', p .. 'job:'", "if 0 * redis.call('EXISTS', p .. 'job:'"),
)

SCHEDULING = of(
    "scheduling",
    (
        "a scheduler that was replaced claims",
        "claim",
        "if redis.call('HGET', p .. 'leader', 'epoch') ~= epoch then return { 'epoch' } end",
        "",
    ),
    ("two schedulers lead", "lead", "if held[1] and held[1] ~= args[1] and tonumber(held[2]) > at then return 0 end", ""),
    ("a new leader has the old epoch", "lead", "if held[1] ~= args[1] then epoch = epoch + 1 end", "if not held[1] then epoch = 1 end"),
    ("a resigned leader leads on", "resign", "'until', 0)", "'id', args[1])"),
    (
        "a worker gets as many batches as there are",
        "claim",
        "if redis.call('SCARD', p .. 'outstanding:' .. worker) >= most then return { 'busy' } end",
        "",
    ),
    ("a worker gets one batch too many", "claim", ">= most then", "> most then"),
    ("the least due goes first", "claim", "ZPOPMIN", "ZPOPMAX"),
    (
        "a lost worker's jobs go behind what has not had its turn",
        "requeue",
        "push(c, job, digits(math.min(tonumber(job.due), tonumber(batch.claimed))))",
        "push(c, job)",
    ),
    ("one tenant's jobs go as another's", "claim", "tenant .. '/' .. popped[k]", "args[8] .. '/' .. popped[k]"),
    ("claimed jobs count as queued", "claim", "count(c, 'queued', -#refs)", "count(c, 'queued', -1)"),
    ("jobs queued again are not counted", "push", "count(c, 'queued', 1)", ""),
    ("jobs queued again are not planned", "push", "redis.call('SADD', c.p .. 'groups', group)", ""),
    ("a queue that was emptied stays in the index", "claim", "redis.call('SREM', p .. 'groups', group)", ""),
    ("a pause is ignored", "is_paused", "return paused['pool'] and 'the pool' or", "return"),
    ("a tenant's pause is ignored", "claim", "is_paused(paused, digest, tenant) and {} or", ""),
    ("what is paused is shown to the planner", "measure", "if is_paused(paused, digest, tenant) then", "if false then"),
    ("a full backlog takes more", "enqueue", "elseif room <= 0 then", "elseif false then"),
    ("delayed jobs take no room", "enqueue", " - redis.call('ZCARD', p .. 'delayed')", ""),
    ("tokens are not charged", "finish", "if tokens > 0 then", "if false then"),
    ("a newcomer's lift takes from who has more", "lift", "if served < tonumber(args[2]) then", "if true then"),
)

RECALL = of(
    "recall",
    ("what has begun is recalled", "recall", "begun[i] == 0 and read_job", "read_job"),
    ("a scheduler that was replaced recalls", "recall", "if redis.call('HGET', p .. 'leader', 'epoch') ~= args[1] then return 0 end", ""),
    ("recalled jobs go behind their due time", "recall", "push(c, job)", "push(c, job, digits(job.due + 1000))"),
    ("recalled jobs are still their batch's", "recall", "redis.call('SREM', p .. 'members:' .. bid, ...)", ""),
    ("a batch that was recalled whole stays open", "recall", "close_if_empty(c, bid)", ""),
    ("nobody is told that recalled jobs are queued", "recall", "commit(c)", ""),
    ("a worker that missed the word goes on with what was recalled", "recall", "redis.call('SADD', p .. 'stop:' .. bid, ...)", ""),
    ("what has begun looks as if it could be recalled", "in_flight", "math.max(0, left - begun)", "left"),
    ("what was cancelled counts as begun", "withdraw", "redis.call('SREM', c.p .. 'begun:' .. batch.id, job.ref)", ""),
    ("who had begun is known of a batch that is over", "close_if_empty", "bid, c.p .. 'begun:' .. bid)", "bid)"),
    ("what has begun looks as if it waited for its turn", "show", "batch.submitted and 2 or begun", "batch.submitted and 2 or 0"),
    ("what has ended counts as begun", "finish", "redis.call('SREM', p .. 'begun:' .. bid, ...)", ""),
)

COALESCE = of(
    "computed once",
    ("those behind what has failed are lost", "pass_on", "push(c, follower)", ""),
    ("those behind end however it ends", "pass_on", "if follower and status == 'succeeded' then", "if follower then"),
    ("who takes its place leaves the others behind", "pass_on", "redis.call('HSET', p .. 'follows', ref, next_id)", ""),
    ("who takes its place is not known", "pass_on", "redis.call('SET', once, next_id)", ""),
    ("what has failed counts as computed", "pass_on", "redis.call('DEL', once)", ""),
    ("what was computed is known for ever", "pass_on", "redis.call('EXPIRE', once, ttl)", ""),
    ("who has the answer still waits for it", "pass_on", "redis.call('HDEL', p .. 'follows', ref)\n      store", "store"),
    ("nobody hears of the end", "conclude", "pass_on(c, job, status, outcome, ttl)", ""),
    ("what is deleted takes those behind it along", "delete", "if job.flag == 'x' then pass_on(c, job, 'deleted') end", ""),
    ("what was deleted is still known as who computed it", "delete", "redis.call('DEL', c.p .. 'once:' .. tenant .. ':' .. once)", ""),
    ("who waits and is cancelled waits on", "withdraw", "stop_following(c, job.ref, job.tenant .. '/' .. leader)", ""),
    ("who waits makes nothing urgent", "enqueue", "redis.call('ZADD', p .. 'queue:' .. group, 'XX', 'LT', sort.due, leader)", ""),
    ("it is urgent only until it comes back", "push", "then place = first end", "then end"),
    ("who waits takes no room", "enqueue", "room = room - redis.call('HLEN', p .. 'follows')", ""),
    ("who waits expires while it is computed", "reap", "leader and job.tenant .. '/' .. leader or ref", "ref"),
    ("a copy outlives what it is a copy of", "enqueue", "redis.call('PEXPIRE', p .. 'job:' .. ref, ttl)", ""),
    ("what was computed is computed again", "leader_of", "return leader, value end", "return nil end"),
    ("who waits for what is gone is not found", "audit_job", "if elsewhere or not waits then", "if elsewhere then"),
    suite="coalesce",
)

MEMORY = of(
    "memory and messages",
    (
        "a worker hears of a recall when it renews",
        "recall",
        "redis.call('PUBLISH', p .. 'to:' .. worker, 'stop ' .. bid .. ' ' .. table.concat(back, ' '))",
        "",
    ),
    ("jobs are taken in until memory runs out", "enqueue", "elseif bytes < #payload + OVERHEAD then", "elseif false then"),
    (
        "a worker hears of a cancel only when it renews",
        "withdraw",
        "redis.call('PUBLISH', c.p .. 'to:' .. batch.worker, 'stop ' .. batch.id .. ' ' .. job.ref)",
        "",
    ),
    ("a worker hears of its batch from Celery only", "claim", "redis.call('PUBLISH', p .. 'to:' .. worker, 'take ' .. bid)", ""),
    ("nobody hears of ends", "commit", "tell(c.p, 'ended', c.ended)", ""),
    ("nobody hears of queued jobs", "commit", "tell(c.p, 'queued', names)", ""),
    ("ends cannot be stored once memory is full", "", "{ 'ly_finish', finish, 'allow-oom' }", "{ 'ly_finish', finish }"),
    suite="messages",
)

PYTHON = [
    *of(
        "ledger.py",
        ("a batch is computed in no order", "read_jobs", "jobs.sort(key=lambda job: (job.due, job.ref))", ""),
        file="lorayard/ledger/records.py",
    ),
    *of(
        "ledger.py",
        ("a server that lost the library is not given it", "_call", 'if "Function not found" not in str(error):', "if True:"),
        ("only the oldest listings are looked at", "forget", "while looked == page:", "for _ in range(1):"),
        ("a page of a listing has its first job again", "list_ids", "end - 1) if end else []", "end) if end else []"),
        file="lorayard/ledger/ledger.py",
    ),
]

LEASES_HELD = of(
    "the worker's control process",
    ("leases are not renewed", "renew", "self._ledger.renew([(b.batch, b.fence) for b in held.values()], self._lease_ms)", "[], []"),
    ("only what has begun is renewed", "renew", "for b in held.values()]", "for b in held.values() if b.begun]"),
    ("a lost lease is not noticed", "renew", "for name in lost:", "for name in []:"),
    ("what begins while its worker leaves costs an attempt", "give_back", "for ref in refs if ref in held.begun", "for ref in []"),
    ("a cancelled job goes on", "stop", "self.drop(held, mine)", "pass"),
    (
        "a cancel stops a namesake in another batch",
        "stop",
        "held = self.held.get(batch)",
        "held = next((h for h in self.held.values() if set(refs) & h.jobs.keys()), None)",
    ),
    ("leaving costs what is computed an attempt", "put_off", 'End(ref, "later")', 'End(ref, "retry")'),
    suite="control",
    file="lorayard_workers/leases.py",
)

COMMITS = of(
    "the worker's control process",
    ("starts are not told", "_starts", "self._ledger.start(batch, held.fence, running) if running else []", "[]"),
    ("what starts after its lease was lost goes on", "_starts", "self._runner.cancel(batch, started)", ""),
    ("every error is final", "_end", "if outcome.retryable:", "if False:"),
    ("every error is tried again", "_end", "if outcome.retryable:", "if True:"),
    ("what was not to blame has used an attempt", "_end", "if outcome.later or (", "if ("),
    ("tokens are not told", "_end", "tokens=_tokens(outcome)", "tokens=0"),
    ("results are dropped while the ledger is away", "_until_stored", "if self._leaving.is_set() and waited > AWAY_S:", "if True:"),
    ("a dead process costs all its batch an attempt", "died", "if ref in running]", "]"),
    ("what a dead process had not begun stays with it", "died", "self._leases.give_back(held, list(held.jobs))", "pass"),
    ("a process that dies of loading costs nothing, for ever", "died", "if not running and first is not None:", "if False:"),
    ("who runs beside what crashed the reader is to blame", "died", "if event.reading:", "if False:"),
    suite="control",
    file="lorayard_workers/commits.py",
)

CONTROL = of(
    "the worker's control process",
    ("a hang is not noticed", "_renew", "if computing and silent > self._settings.hang_s:", "if False:"),
    ("a worker without a model keeps what it is sent", "_take", "if not self.info.ready:", "if False:"),
    ("an adapter out of reach costs an attempt", "_run", "later=isinstance(error, Unavailable)", "later=False"),
    ("an adapter that is wrong is tried for ever", "_run", "later=isinstance(error, Unavailable)", "later=True"),
    (
        "an adapter not fetched for any other reason holds its batch",
        "_adapter",
        "except Exception as error:",
        "except ZeroDivisionError as error:",
    ),
    (
        "an earlier process's batches are left to lapse",
        "start",
        "requeued = self._ledger.hello(self.info.name, self.info.incarnation)",
        "requeued = 0",
    ),
    (
        "leaving keeps what has not begun",
        "close",
        "self._leases.give_back(batch, [ref for ref in list(batch.jobs) if ref not in batch.begun])",
        "pass",
    ),
    ("a wake-up that is lost is waited for", "_beat_loop", "self._take_unheard()", "pass"),
    ("two processes share a name", "start", "self._refuse_twin()", "pass"),
    ("leaving waits for nothing", "close", "while self._leases.held and time.monotonic() < give_up:", "while False:"),
    ("leaving lets what is computed lapse", "close", "self._leases.put_off(batch, list(batch.jobs))", "pass"),
    suite="control",
    file="lorayard_workers/control.py",
)

SUBMITTED = of(
    "submitted",
    ("a submitted batch keeps its lease", "submit", "redis.call('ZREM', p .. 'leases', bid)", ""),
    ("a submitted batch stays its worker's", "submit", "redis.call('SREM', p .. 'outstanding:' .. batch.worker, bid)", ""),
    ("a batch can be submitted before it is taken", "submit", " or not batch.was_taken then", " then"),
    ("anybody can submit", "submit", "batch.fence ~= args[2] or", ""),
    ("submitting counts no attempt", "submit", "redis.call('SUNIONSTORE', p .. 'begun:' .. bid, p .. 'members:' .. bid)", ""),
    ("two keepers get the same batch", "tend", "redis.call('ZADD', p .. 'submitted', digits(at + args[2]), bid)", ""),
    ("a keeper who was taken for dead still writes", "tended_by", "return b[1] and b[2] == token", "return b[1]"),
    ("a batch is closed with jobs in it", "settle", " or redis.call('EXISTS', p .. 'members:' .. bid) == 1 then", " then"),
    ("the last end closes what is still at the service", "close_if_empty", "if submitted then return end", ""),
    ("its worker still renews what was submitted", "renew", " and redis.call('HEXISTS', p .. 'batch:' .. bid, 's') == 0 then", " then"),
    ("a submitted job is found nowhere", "all_batches", "do names[#names + 1] = bid end", "do end"),
)

MUTANTS = [
    *FENCING,
    *LEASES,
    *IDEMPOTENCY,
    *TIME,
    *ATTEMPTS,
    *WITHDRAWAL,
    *SCHEDULING,
    *RECALL,
    *COALESCE,
    *MEMORY,
    *PYTHON,
    *LEASES_HELD,
    *COMMITS,
    *CONTROL,
    *SUBMITTED,
]
