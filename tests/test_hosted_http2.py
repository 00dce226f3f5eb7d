"""HTTP/2, where a service has it: many calls over one connection, and what is lost with a stream or a connection. The server is of h2."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded
from hosted_service import BASE, KEY
from hosted_state import Service, completion

from lorayard.settings import Settings
from lorayard_workers.groq.answers import Failure
from lorayard_workers.groq.client import ChatClient, Reply

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the server's certificate: install it")


class Http2:
    """Answers as the stand-in does, 50 ms after `together` calls were there at once; a call whose text is `reset` or `goaway` loses its
    stream, or everybody the connection."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self.connections = self.most_streams = self._streams = 0
        self.together = 1
        self._come = asyncio.Condition()
        self._tls = tls
        self._service = Service()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: list[asyncio.Task[Any]] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._tls)
        try:
            yield f"https://localhost:{server.sockets[0].getsockname()[1]}/openai/v1"
        finally:
            for writer in self._writers:
                writer.close()
            server.close()
            await asyncio.gather(*self._tasks)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)
        wire = H2Connection(H2Configuration(client_side=False))
        wire.initiate_connection()
        bodies: dict[int, bytes] = {}
        async with asyncio.TaskGroup() as answers:
            writer.write(wire.data_to_send())
            while data := await self._read(reader):
                for event in wire.receive_data(data):
                    if isinstance(event, RequestReceived):
                        assert dict(event.headers)[b"authorization"].decode() == f"Bearer {KEY}"
                        bodies[event.stream_id] = b""
                    elif isinstance(event, DataReceived):
                        bodies[event.stream_id] += event.data
                        wire.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    elif isinstance(event, StreamEnded):
                        answers.create_task(self._answer(wire, writer, event.stream_id, json.loads(bodies.pop(event.stream_id))))
                writer.write(wire.data_to_send())

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> bytes:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            return await reader.read(65536)
        return b""

    async def _answer(self, wire: H2Connection, writer: asyncio.StreamWriter, stream: int, body: dict[str, Any]) -> None:
        self._streams += 1
        self.most_streams = max(self.most_streams, self._streams)
        async with self._come:
            self._come.notify_all()
            await self._come.wait_for(lambda: self.most_streams >= self.together)
        await asyncio.sleep(0.05)
        self._streams -= 1
        text = body["messages"][-1]["content"]
        if wire.state_machine.state == ConnectionState.CLOSED:
            return
        if text == "goaway":
            wire.close_connection()
        elif text == "reset":
            wire.reset_stream(stream)
        else:
            wire.send_headers(stream, [(":status", "200"), ("content-type", "application/json")])
            wire.send_data(stream, json.dumps(completion(self._service, body)).encode(), end_stream=True)
        writer.write(wire.data_to_send())
        if text == "goaway":
            writer.close()


@pytest.fixture
def http2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Http2:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    tls.set_alpn_protocols(["h2"])
    return Http2(tls)


async def ask(client: ChatClient, text: str) -> Reply | Failure:
    return await client.chat(msgspec.json.encode({"model": BASE, "messages": [{"role": "user", "content": text}], "max_tokens": 8}))


async def with_client(http2: Http2, calls: list[list[str]]) -> list[list[Reply | Failure]]:
    """Each list of texts at once, one list after the other."""
    async with http2.running() as url:
        client = ChatClient(Settings(hosted_model=BASE, hosted_url=url, hosted_key=KEY))
        found = []
        for texts in calls:
            http2.together = len(texts)
            found.append(await asyncio.gather(*(ask(client, text) for text in texts)))
        await client.close()
    return found


def test_many_calls_at_once_share_few_connections(http2: Http2) -> None:
    texts = [f"j{n}" for n in range(150)]
    _, answers = asyncio.run(with_client(http2, [["first"], texts]))
    for text, answer in zip(texts, answers, strict=True):
        assert isinstance(answer, Reply)
        assert answer.body["choices"][0]["message"]["content"] == f"{BASE} says: {text}"
    assert http2.most_streams == 150
    assert http2.connections == 2, "a hundred calls each"


def test_what_is_lost_on_the_way_is_told_and_the_next_call_goes_on(http2: Http2) -> None:
    reset, goaway, after = asyncio.run(with_client(http2, [["reset", "a"], ["goaway", "b"], ["c"]]))
    assert isinstance(reset[0], Failure)
    assert (reset[0].code, reset[0].how) == ("connection_lost", "patience")
    assert isinstance(reset[1], Reply), "another stream of the same connection is not touched"
    assert isinstance(goaway[0], Failure)
    assert goaway[0].unknown, "it may have been computed, and charged"
    assert isinstance(after[0], Reply)
