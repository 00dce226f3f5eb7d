"""Calls of the ledger from an event loop: the same answers and errors as from a thread, and no reply is ever taken for another's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import redis

from lorayard.ledger.connection import connect
from lorayard.ledger.loop import LoopCaller
from lorayard.ledger.organisation import Grant, Organisation, Rates, Want

T = TypeVar("T")
LIBRARY = """#!lua name=echo
redis.register_function('echo', function(keys, args) redis.call('SET', keys[1], args[1]) return args[1] end)
"""
WANT = Want("m", 100, "acme", 500)


@pytest.fixture
def client(redis_url: str, store: redis.Redis) -> Iterator[redis.Redis]:
    """With a patience of its own: the caller's connections come from its pool."""
    store.function_load(LIBRARY, replace=True)
    with connect(redis_url, timeout_s=0.5) as one:
        yield one
    store.function_delete("echo")


def within(client: redis.Redis, what: Callable[[LoopCaller], Awaitable[T]]) -> T:
    async def run() -> T:
        with ThreadPoolExecutor(1) as executor:
            caller = LoopCaller(client, executor)
            try:
                return await what(caller)
            finally:
                caller.close()

    return asyncio.run(run())


def test_many_calls_at_once_each_have_their_own_reply_over_one_connection(client: redis.Redis, store: redis.Redis, redis_url: str) -> None:
    async def ask(caller: LoopCaller) -> list[Any]:
        replies = await asyncio.gather(*(caller.fcall("echo", 1, "k", n) for n in range(100)))
        names.extend(one["name"] for one in store.client_list())
        return replies

    names: list[str] = []
    with connect(redis_url + "?client_name=many-calls") as named:
        assert within(named, ask) == [str(n).encode() for n in range(100)]
    assert names.count("many-calls") == 1


def test_an_error_of_the_function_leaves_the_connection_as_it_was(client: redis.Redis, store: redis.Redis) -> None:
    store.rpush("list", 1)

    async def ask(caller: LoopCaller) -> Any:
        with pytest.raises(redis.ResponseError, match="Function not found"):
            await caller.fcall("no_such", 1, "k")
        connection = caller._connection
        assert await caller.fcall("echo", 1, "k", "x") == b"x"
        assert caller._connection is connection

    within(client, ask)


def test_a_connection_that_was_cut_is_told_and_replaced(client: redis.Redis, store: redis.Redis) -> None:
    async def ask(caller: LoopCaller) -> Any:
        await caller.fcall("echo", 1, "k", "x")
        store.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(redis.ConnectionError):
            await caller.fcall("echo", 1, "k", "y")
        return await caller.fcall("echo", 1, "k", "z")

    assert within(client, ask) == b"z"


def test_a_reply_that_comes_too_late_is_nobody_s(client: redis.Redis, store: redis.Redis) -> None:
    async def ask(caller: LoopCaller) -> Any:
        await caller.fcall("echo", 1, "k", "x")
        store.client_pause(800, all=True)
        with pytest.raises(redis.TimeoutError):
            await caller.fcall("echo", 1, "k", "late")
        await asyncio.sleep(0.5)
        waiting = asyncio.create_task(caller.fcall("echo", 1, "k", "given up"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return [await caller.fcall("echo", 1, "k", n) for n in range(3)]

    assert within(client, ask) == [b"0", b"1", b"2"]


def test_commands_sent_together_run_in_order_and_an_error_of_one_is_no_other_s_reply(client: redis.Redis, store: redis.Redis) -> None:
    async def ask(caller: LoopCaller) -> Any:
        first = await caller.call(("FCALL", "echo", 1, "k", "x"), ("GET", "k"))
        for commands in ((("FCALL", "no_such", 1, "k"), ("GET", "k")), (("GET", "k"), ("FCALL", "no_such", 1, "k"))):
            with pytest.raises(redis.ResponseError, match="Function not found"):
                await caller.call(*commands)
        return [*first, await caller.fcall("echo", 1, "k", "y")]

    assert within(client, ask) == [b"x", b"x", b"y"]


def test_a_reservation_whose_reply_was_lost_counts_once(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    org = Organisation(client, "lost", rates=Rates(rpm=10))
    org.install()

    async def ask(caller: LoopCaller) -> Any:
        call, calls = caller.call, 0

        async def unheard(*commands: Any) -> Any:
            nonlocal calls
            calls += 1
            replies = await call(*commands)
            if calls == 1:
                raise redis.ConnectionError("cut")
            return replies

        monkeypatch.setattr(caller, "call", unheard)
        reserved, _ = await org.reserve_in(caller, "b", [WANT] * 2, ["ECHO", "x"])
        return [type(answer) for answer in reserved.answers]

    assert within(client, ask) == [Grant, Grant]
    state = org.state("b")
    assert state.numbers["used_requests"] == 2
    assert org.spent(state.day)["acme"] == 2 * WANT.nano


def test_the_loop_goes_on_while_a_reply_is_awaited(client: redis.Redis, store: redis.Redis) -> None:
    async def ask(caller: LoopCaller) -> Any:
        await caller.fcall("echo", 1, "k", "x")
        store.client_pause(10_000, all=False)  # what writes gets no reply
        try:
            waiting = asyncio.create_task(caller.fcall("echo", 1, "k", "y"))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not waiting.done()
        finally:
            store.client_unpause()
        return await waiting

    assert within(client, ask) == b"y"


def test_where_a_reply_is_more_than_one_it_is_asked_for_in_a_thread(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorayard.ledger.loop.is_plain", lambda _: False)

    async def ask(caller: LoopCaller) -> Any:
        assert await caller.fcall("echo", 1, "k", "x") == b"x"
        return caller._connection

    assert within(client, ask) is None


def test_limits_are_asked_for_as_from_a_thread(client: redis.Redis, store: redis.Redis) -> None:
    org = Organisation(client, "x", rates=Rates(rpm=3))

    async def ask(caller: LoopCaller) -> Any:
        first, seen = await org.reserve_in(caller, "b", [WANT], ["ECHO", "x"])  # the server has the library by this
        assert seen == b"x"
        second, _ = await org.reserve_in(caller, "b", [WANT] * 5, ["ECHO", "x"])
        return [*first.answers, *second.answers]

    if store.function_list("lorayard_limits"):
        store.function_delete("lorayard_limits")
    answers = within(client, ask)
    assert [type(answer) for answer in answers] == [Grant] * 3
    assert org.reserve("b", [WANT]).why == "rpm"
