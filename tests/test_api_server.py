"""The API's listening socket."""

from __future__ import annotations

import asyncio
import socket

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
