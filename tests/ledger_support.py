"""A ledger by the clock of the test, a server that can be killed, and a whole ledger read at once, with what must hold of it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import redis

from lorayard import embedded
from lorayard.ledger.ledger import LIBRARY, Ledger
from lorayard.ledger.records import Entry
from lorayard.settings import Settings

POOL = "t"
PREFIX = f"ly:{{{POOL}}}:"
CLOCK = PREFIX + "clock"
START_MS = 1_800_000_000_000
TTL_S = 3600

_NOW = re.search(r"local function now\(\).*?\nend", LIBRARY, re.DOTALL)
assert _NOW is not None
CLOCKED = LIBRARY.replace(_NOW.group(), f"local function now() return tonumber(redis.call('GET', '{CLOCK}')) end")
"""The library with its one clock replaced by a key that a test sets."""


class ClockedLedger(Ledger):
    """The real ledger, by the clock of the test."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__(client, POOL, result_ttl_s=TTL_S, library=CLOCKED)

    def set_clock(self, ms: int) -> None:
        self.client.set(CLOCK, ms)

    def _time(self) -> tuple[int, int]:
        ms = int(str(self.client.get(CLOCK), "ascii"))  # type: ignore[arg-type]
        return ms // 1000, ms % 1000 * 1000


def make_entry(job_id: str, **changes: Any) -> Entry:
    """A job of the tenant acme for the base model, due in a second, with what is to differ."""
    once = {"coalesce": changes["once"]} if changes.get("once") else {}
    meta = json.dumps(once | {"adapter": changes.get("digest", "base"), "pool": POOL}, separators=(",", ":")).encode()
    entry: Entry = Entry(job_id, "acme", "base", 1000, 0, 0, 3, "http", "", "", meta, b'{"messages":[]}')
    return entry._replace(**changes)


class Server:
    """A server of our own, with the settings we ship, that can be killed and started again on what it had written."""

    def __init__(self, folder: Path) -> None:
        self._settings = Settings(state_dir=folder)
        self._process: subprocess.Popen[bytes] | None = None
        self.kills_left = 0
        self.start()
        self.url = embedded.redis_url(self._settings)

    def start(self) -> None:
        command = embedded.prepare(self._settings, restart=True)
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        embedded.wait_until_up(embedded.redis_url(self._settings))

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(10)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.kill(signal.SIGTERM)


# -- the whole ledger at once -------------------------------------------------------------------------------------------------------------

_DUMP = """
local reply = {}
local read = {
  string = function(key) return redis.call('GET', key) end,
  hash = function(key) return redis.call('HGETALL', key) end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
  local kind = redis.call('TYPE', key).ok
  if read[kind] then reply[#reply + 1] = { string.sub(key, #ARGV[1] + 1), kind, redis.call('PTTL', key), read[kind](key) } end
end
return reply
"""

Value = str | dict[str, str] | dict[str, int] | set[str]
Dump = dict[str, tuple[Value, bool]]
"""Name without the prefix -> value, and whether it has a time to live. Sorted sets are dicts of scores."""


def dump(client: redis.Redis) -> Dump:
    """All that a ledger keeps but the stream of hints, read at one moment.

    Left out is what might as well be absent: counts of nothing, and a batch's token, which is anyone's guess.
    """
    rows: Any = client.eval(_DUMP, 0, PREFIX)
    out: Dump = {}
    for name_bytes, kind, ttl, raw in rows:
        name = name_bytes.decode()
        if name != "clock":
            out[name] = _value(kind.decode(), raw), ttl > 0
    for name, (value, mortal) in list(out.items()):
        if name == "counts" and isinstance(value, dict):
            out[name] = {what: n for what, n in value.items() if n != "0"}, mortal  # type: ignore[assignment]
        elif name.startswith("batch:") and isinstance(value, dict):
            value.pop("k", None)
            value.pop("x", None)
    return {name: (value, mortal) for name, (value, mortal) in out.items() if value}


def outlive(client: redis.Redis) -> None:
    """As if so much time had passed that all that has a time to live is gone."""
    if gone := [PREFIX + name for name, (_, mortal) in dump(client).items() if mortal]:
        client.delete(*gone)


def _value(kind: str, raw: Any) -> Value:
    if kind == "string":
        return str(raw, "utf-8")
    words = [str(word, "utf-8") for word in raw]
    if kind == "set":
        return set(words)
    pairs = zip(words[::2], words[1::2], strict=True)
    return {field: int(float(score)) for field, score in pairs} if kind == "zset" else dict(pairs)


class Living(NamedTuple):
    """A living job as `job:REF` has it."""

    flag: str
    due: str
    deadline: str
    digest: str
    tenant: str
    most: str
    idem: str
    enqueued: str
    via: str


class Census:
    """What a dump says, by name; and `faults`, what is wrong with it by itself, whatever led to it."""

    def __init__(self, of: Dump) -> None:
        self.of = of
        values: dict[str, str] = self._part("job:")
        self.living = {ref: Living(*re.split("[\t\n]", text, maxsplit=9)[:9]) for ref, text in values.items() if text[0] in "-x"}
        self.ended = {ref: text for ref, text in values.items() if ref not in self.living}
        self.queues = self._part("queue:")
        self.members = self._part("members:")
        self.batches = self._part("batch:")
        self.dead = {f"{tenant}/{job_id}" for tenant, ids in self._part("dead:").items() for job_id in ids}
        self.counts = Counter({name: int(n) for name, n in self._one("counts").items()})

    def _part(self, kind: str) -> dict[str, Any]:
        return {name.removeprefix(kind): value for name, (value, _) in self.of.items() if name.startswith(kind)}

    def _one(self, name: str) -> dict[str, Any]:
        value = self.of.get(name, ({}, False))[0]
        assert isinstance(value, dict)
        return value

    def faults(self) -> list[str]:
        return [*self._places(), *self._followers(), *self._ended(), *self._batches(), *self._indexes(), *self._sums()]

    def _places(self) -> Iterator[str]:
        """Each living job is in exactly one place, and nothing else is in any."""
        places: dict[str, list[str]] = {ref: [] for ref in self.living}
        for group, queue in self.queues.items():
            digest, _, tenant = group.partition(":")
            for job_id in queue:
                places.setdefault(f"{tenant}/{job_id}", []).append(f"queue of {group}")
                job = self.living.get(f"{tenant}/{job_id}")
                if job and (job.digest, job.tenant) != (digest, tenant):
                    yield f"{tenant}/{job_id} is in the queue of {group}, which is not its own"
        for ref in self._one("delayed"):
            places.setdefault(ref, []).append("delayed")
        for batch, refs in self.members.items():
            for ref in refs:
                places.setdefault(ref, []).append(f"batch {batch}")
        for ref, leader in self._behind().items():
            places.setdefault(ref, []).append(f"behind {leader}")
        for ref, where in places.items():
            if ref not in self.living:
                yield f"{ref} is not there, or has ended, and is in {where}"
            elif len(where) != 1:
                yield f"{ref} is in {where}: not one place"

    def _behind(self) -> dict[str, str]:
        """The job that each waits for."""
        return {f"{leader.partition('/')[0]}/{i}": leader for leader, ids in self._part("behind:").items() for i in ids}

    def _followers(self) -> Iterator[str]:
        behind, follows = self._behind(), self._one("follows")
        for ref, leader in behind.items():
            if leader not in self.living or leader in behind:
                yield f"{ref} waits for {leader}, which computes nothing"
        if {ref: leader.partition("/")[2] for ref, leader in behind.items()} != follows:
            yield f"behind jobs are {behind}, these follow: {follows}"

    def _ended(self) -> Iterator[str]:
        for ref, text in self.ended.items():
            if text.partition("\t")[0] not in ("succeeded", "failed", "cancelled", "expired"):
                yield f"{ref} ended as {text[:20]!r}"
            if (text.count("\n") == 5) != (ref in self.dead):
                yield f"{ref} has ended, and its request is kept without a dead letter, or the other way round"
            if not self.of["job:" + ref][1]:
                yield f"the result of {ref} stays for ever"
        for ref in self.living:
            if self.of["job:" + ref][1]:
                yield f"{ref} goes away by itself"
            if ref in self.dead:
                yield f"{ref} lives and is listed as a dead letter"
        for name, (value, mortal) in self.of.items():
            if name.startswith("idem:"):
                tenant, job_id = name.split(":")[1], str(value).split("\t")[0]
                if mortal != (f"{tenant}/{job_id}" not in self.living):
                    yield f"{name} lives longer or shorter than its job"

    def _batches(self) -> Iterator[str]:
        leases = self._one("leases")
        outstanding = Counter(batch for batches in self._part("outstanding:").values() for batch in batches)
        submitted = {batch for batch, fields in self.batches.items() if "s" in fields}
        mine = self.batches.keys() - submitted
        if not self.members.keys() - submitted == mine == leases.keys() == outstanding.keys() or set(outstanding.values()) > {1}:
            yield f"batches {[*self.batches]}, members of {[*self.members]}, leases of {[*leases]}, outstanding {outstanding}"
        if submitted != self._one("submitted").keys():
            yield f"{submitted} are submitted, {self._one('submitted')} are looked after"
        for batch, fields in self.batches.items():
            if batch not in submitted and batch not in self._part("outstanding:").get(fields["w"], ()):
                yield f"{batch} is not outstanding at its worker"
        for batch in self._part("begun:").keys() - self.batches.keys():
            yield f"jobs have begun in {batch}, which is not there"
        fences = [fields["f"] for fields in self.batches.values()]
        if len(fences) != len(set(fences)):
            yield f"one fence, two batches: {fences}"

    def _indexes(self) -> Iterator[str]:
        groups = self.of.get("groups", (set[str](), False))[0]
        if groups != self.queues.keys():
            yield f"groups say {groups}, queues are {[*self.queues]}"
        tries, deadlines = self._one("tries"), self._one("deadlines")
        for ref in (tries.keys() | deadlines.keys()) - self.living.keys():
            yield f"a deadline or tries of {ref}, which is gone"
        for ref, job in self.living.items():
            if (job.deadline != "0") != (ref in deadlines):
                yield f"{ref} and its deadline {job.deadline} are not in step"
            begun = any(ref in refs for refs in self._part("begun:").values())
            attempts = int(tries.get(ref, "0").partition("\t")[0]) + begun
            if attempts > int(job.most) or int(job.due) < int(job.enqueued):
                yield f"{ref}: {attempts} of {job.most} attempts, due {job.due}, enqueued {job.enqueued}"
            if ref.removeprefix(job.tenant + "/") not in self._one(f"by_tenant:{job.tenant}"):
                yield f"{ref} is not listed"

    def _sums(self) -> Iterator[str]:
        queued = sum(map(len, self.queues.values()))
        if self.counts["queued"] != queued:
            yield f"{self.counts['queued']} counted as queued, {queued} are"
        ended = sum(self.counts[end] for end in ("succeeded", "failed", "cancelled", "expired", "deleted_live"))
        if self.counts["enqueued"] + self.counts["revived"] != ended + len(self.living):
            yield f"counts do not add up with {len(self.living)} living jobs: {dict(self.counts)}"
