"""A wire with a length: forwards connections to a port of this machine, each byte some milliseconds late, until it is killed with what it
holds. `python -m benchmarks.relay LISTEN TARGET DELAY_MS`."""

from __future__ import annotations

import asyncio
import contextlib
import sys


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def let_go() -> None:
        while True:
            due, data = await held.get()
            await asyncio.sleep(due - loop.time())
            writer.write(data)
            if not data:
                writer.close()
                return

    sending = asyncio.create_task(let_go())
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            held.put_nowait((loop.time() + delay_s, data))
    held.put_nowait((loop.time() + delay_s, b""))
    await sending


async def _serve(listen: int, target: int, delay_s: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(_forward(reader, back, delay_s), _forward(there, writer, delay_s))

    async with await asyncio.start_server(connected, "127.0.0.1", listen) as serving:
        await serving.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1000))
