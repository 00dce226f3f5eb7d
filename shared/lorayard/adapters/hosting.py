"""Which adapters an organisation's hosted service has: by content digest and hosted base, with the service's ids for file and model.

What is wanted is written first, then done by a hosted worker (`lorayard_workers.groq.adapters`), so that whoever is interrupted knows what
to look for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import msgspec
import redis
from redis.lock import Lock

from lorayard.errors import Conflict
from lorayard.ledger import keys

PublicationState = Literal["wanted", "ready", "refused", "unwanted"]


class Publication(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An adapter's place at a hosted service.

    wanted: to be made there, or given up by `error` so far (tried again) · ready: `model` answers · refused: cannot be, see `error` ·
    unwanted: to be removed there. `asked_ms` and `checked_ms` are the ledger's time, of the last wish and of when it was last looked at.
    """

    digest: str
    base: str  # the hosted base model
    state: PublicationState
    asked_ms: int
    titles: list[str] = []  # TENANT/NAME, by which it was asked for
    file_id: str = ""
    tuning_id: str = ""
    model: str = ""
    error: str = ""
    code: str = ""
    checked_ms: int = 0
    given: bool = False  # the model was there already under this id: nothing of it is ours to make or remove


class Publications:
    """The publications of one organisation for one hosted base. Writers hold `lock`."""

    def __init__(self, client: redis.Redis, organisation: str, base: str) -> None:
        self._client = client
        self._base = base
        self._prefix = keys.organisation(organisation)
        self._key = f"{self._prefix}models"
        self._marks = f"{self._prefix}marked"

    def _field(self, digest: str) -> str:
        return f"{digest} {self._base}"

    def now(self) -> int:
        seconds, micros = self._client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def get(self, digest: str) -> Publication | None:
        raw: Any = self._client.hget(self._key, self._field(digest))
        return msgspec.json.decode(raw, type=Publication) if raw else None

    def all(self) -> dict[str, Publication]:
        """By digest."""
        rows: Any = self._client.hvals(self._key)
        found = (msgspec.json.decode(row, type=Publication) for row in rows)
        return {one.digest: one for one in found if one.base == self._base}

    def ask(self, digest: str, title: str, *, model: str = "") -> Publication:
        """Want it there, under a name (TENANT/NAME) more; what is there is looked at again. With `model`, another hand has brought it there
        under that id.

        The content is one for all who have it, and so is its model: raises `Conflict` where `model` would change it for others, or leave
        behind what we have brought there.
        """

        def wish(old: Publication | None, now: int) -> Publication:
            titles = sorted({title, *(old.titles if old else [])})
            if model and old is not None and not (old.given and old.model == model):
                _check_alone(old, title)
                old = None
            if old is None or (old.given and old.state == "unwanted"):
                return Publication(
                    digest=digest, base=self._base, state="wanted", asked_ms=now, titles=titles, model=model, given=bool(model)
                )
            return msgspec.structs.replace(old, state="wanted", asked_ms=now, titles=titles, error="", code="")

        written = self._change(digest, wish)
        assert written is not None
        return written

    def unask(self, digest: str, title: str) -> Publication | None:
        """Under this name it is wanted no more; under none, it is to be removed. None if it was not."""

        def wish(old: Publication | None, now: int) -> Publication | None:
            if old is None:
                return None
            titles = [one for one in old.titles if one != title]
            if titles:
                return msgspec.structs.replace(old, titles=titles)
            return msgspec.structs.replace(old, state="unwanted", asked_ms=now, titles=[], error="", code="")

        return self._change(digest, wish)

    def tell(self, seen: Publication, **changes: Any) -> bool:
        """What has become of it, by whoever works on it; False, and nothing, where another wish was written since `seen`."""
        done = False

        def write(old: Publication | None, now: int) -> Publication | None:
            nonlocal done
            done = old is not None and old.asked_ms == seen.asked_ms and old.state != "unwanted"
            return msgspec.structs.replace(old, **{"checked_ms": now} | changes) if done and old is not None else old

        self._change(seen.digest, write)
        return done

    def forget(self, seen: Publication) -> bool:
        """It is gone from the service; False where it was asked for again meanwhile."""
        done = False

        def write(old: Publication | None, _: int) -> Publication | None:
            nonlocal done
            done = old is not None and old.state == "unwanted"
            return None if done else old

        self._change(seen.digest, write)
        return done

    def _change(self, digest: str, change: Callable[[Publication | None, int], Publication | None]) -> Publication | None:
        field = self._field(digest)
        now = self.now()

        def write(pipe: Any) -> Publication | None:
            raw = pipe.hget(self._key, field)
            new = change(msgspec.json.decode(raw, type=Publication) if raw else None, now)
            pipe.multi()
            if new is None:
                pipe.hdel(self._key, field)
            else:
                pipe.hset(self._key, field, msgspec.json.encode(new))
            return new

        # The stubs of `transaction` know nothing of value_from_callable.
        return cast("Publication | None", self._client.transaction(cast("Any", write), self._key, value_from_callable=True))

    # -- names whose every new content is to be there -----------------------------------------------------------------------------------

    def mark(self, owner: str, name: str) -> None:
        self._client.sadd(self._marks, f"{owner}/{name}")

    def unmark(self, owner: str, name: str) -> None:
        self._client.srem(self._marks, f"{owner}/{name}")

    def marked(self, owner: str, name: str) -> bool:
        return bool(self._client.sismember(self._marks, f"{owner}/{name}"))

    # -- all that was asked for under a name, whatever content it has or had ------------------------------------------------------------

    def holds(self, owner: str, name: str) -> bool:
        return self.marked(owner, name) or any(f"{owner}/{name}" in one.titles for one in self.all().values())

    def drop(self, owner: str, name: str) -> bool:
        """Nothing is wanted there under this name any more; False if nothing was."""
        title = f"{owner}/{name}"
        self.unmark(owner, name)
        mine = [one.digest for one in self.all().values() if title in one.titles]
        for digest in mine:
            self.unask(digest, title)
        return bool(mine)

    def withdraw(self, owner: str) -> None:
        """As `drop`, under any name of one whose data may not leave (any more)."""
        marks: Any = self._client.smembers(self._marks)
        titles = {mark.decode() for mark in marks}.union(*(one.titles for one in self.all().values()))
        for title in sorted(titles):
            whose, _, name = title.partition("/")
            if whose == owner:
                self.drop(owner, name)

    # -- who works on one ---------------------------------------------------------------------------------------------------------------

    def lock(self, digest: str, hold_s: float) -> Lock:
        """To be acquired by whoever works on it, without waiting: another does so otherwise."""
        return Lock(self._client, f"{self._prefix}work:{digest}", timeout=hold_s, blocking=False, thread_local=False)


def _check_alone(old: Publication, title: str) -> None:
    """That its model may become another one: nobody else has it there, and nothing of it is ours to remove."""
    if set(old.titles) - {title}:
        raise Conflict("this content is published under another name too, whose model would change with it", code="published_otherwise")
    if not old.given and (old.state != "refused" or old.file_id):
        raise Conflict(
            "it was brought there, or is being brought or removed, by this fleet: 'lorayard adapters unpublish' it first, and give the"
            " model when it is gone",
            code="published_otherwise",
        )
