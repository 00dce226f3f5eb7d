"""What an API process begins with: its listening socket, the operator's key."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from lorayard.errors import SetupError, Unauthorized
from lorayard.ledger.registry import KeyRing
from lorayard.settings import Settings
from lorayard_scheduler.api.server import listen


def test_answers_are_not_held_back_for_an_acknowledgement() -> None:
    """Head and body are written one after the other: without TCP_NODELAY the body waits for the client's delayed acknowledgement, 40 ms."""

    async def nodelay() -> int:
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            found = await seen
            writer.close()
        return found

    assert asyncio.run(nodelay())


def revoke(ring: KeyRing, key: str) -> None:
    (name,) = [row["key"] for row in ring.entries() if row["tail"] == key[-4:]]
    assert ring.revoke(name)
    assert not ring.revoke(name)


def test_the_first_key_stays_until_it_is_revoked_and_another_takes_its_place(store: redis.Redis, tmp_path: Path) -> None:
    ring, settings, path = KeyRing(store), Settings(state_dir=tmp_path / "state"), tmp_path / "state" / "api_key"

    def start(_: int = 0) -> str:
        return ring.ensure_first(settings)

    with ThreadPoolExecutor(8) as pool:
        (first,) = set(pool.map(start, range(8)))
    assert path.read_text() == f"{first}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert ring.caller(first).operator
    revoke(ring, first)
    with ThreadPoolExecutor(8) as pool:
        (second,) = set(pool.map(start, range(8)))
    assert second != first
    assert path.read_text() == f"{second}\n"
    assert [file.name for file in path.parent.iterdir()] == ["api_key"]
    assert ring.caller(second).operator
    with pytest.raises(Unauthorized):
        ring.caller(first)


def test_a_revoked_key_in_the_settings_is_told_and_stays_revoked(store: redis.Redis, tmp_path: Path) -> None:
    ring, settings = KeyRing(store), Settings(state_dir=tmp_path, api_key="ly-chosen-by-the-operator")
    key = ring.ensure_first(settings)
    assert key == settings.api_key
    assert ring.caller(key).operator
    revoke(ring, key)
    with pytest.raises(SetupError, match="LORAYARD_API_KEY is a key that was revoked"):
        ring.ensure_first(settings)
    with pytest.raises(Unauthorized):
        ring.caller(key)
