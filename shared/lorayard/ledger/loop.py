"""Calls of the ledger from an event loop, with no thread between: what waits for the reply is the loop, not a thread that is then to be
woken, and then to wake the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import redis

from lorayard.ledger.connection import is_plain

T = TypeVar("T")


class LoopCaller:
    """One connection of a client's pool, used by one event loop. A client with TLS, or that waits for replicas, is called in `executor`."""

    def __init__(self, client: redis.Redis, executor: Executor) -> None:
        self._client = client
        self._executor = executor
        self._plain = is_plain(client)
        self._connection: Any = None  # of redis-py, whose stubs do not know what its pools hold
        self._one_at_a_time = asyncio.Lock()

    async def fcall(self, function: str, numkeys: int, *keys_and_args: Any) -> Any:
        """As `redis.Redis.fcall`, with its errors."""
        (reply,) = await self.call(("FCALL", function, numkeys, *keys_and_args))
        return reply

    async def call(self, *commands: Sequence[Any]) -> list[Any]:
        """The replies to commands that are sent together and run in this order. Raises redis' errors: of several, the first one's."""
        if not self._plain:
            return await self.in_thread(lambda: [self._called(*command) for command in commands])
        async with self._one_at_a_time:
            connection: Any = self._connection or await self._connect()
            try:
                connection.send_packed_command(connection.pack_commands(commands), check_health=False)
                await self._until_readable(connection)
                replies = [_reply(connection) for _ in commands]
            except BaseException:  # also where nobody waits any more: a reply that is still to come would be taken for the next one's
                self.close()
                raise
        for reply in replies:
            if isinstance(reply, redis.ResponseError):
                raise reply
        return replies

    def _called(self, name: str, *args: Any) -> Any:
        return self._client.fcall(*args) if name == "FCALL" else self._client.execute_command(name, *args)  # type: ignore[no-untyped-call]

    def in_thread(self, what: Callable[[], T]) -> asyncio.Future[T]:
        """What cannot be done without one."""
        return asyncio.get_running_loop().run_in_executor(self._executor, what)

    async def _connect(self) -> Any:
        """In a thread: it may have to ask Sentinels, or wait for an address that does not answer."""
        pool: Any = self._client.connection_pool
        self._connection = await self.in_thread(pool.get_connection)
        return self._connection

    async def _until_readable(self, connection: Any) -> None:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(connection.fileno(), readable.set)
        try:
            async with asyncio.timeout(connection.socket_timeout):
                await readable.wait()
        except TimeoutError:
            raise redis.TimeoutError("no reply in time") from None
        finally:
            loop.remove_reader(connection.fileno())

    def close(self) -> None:
        """Give the connection back; the next call makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()
            self._client.connection_pool.release(connection)


def _reply(connection: Any) -> Any:
    """The next one; an error of the server's as a value, for others may follow."""
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error
