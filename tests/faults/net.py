"""Connections that fail in the ways networks do: a proxy of our own, and a network namespace whose packets are dropped."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Proxy:
    """TCP from a port of its own to another, until told otherwise.

    `frozen`: nothing is forwarded and nothing closed, as when packets are dropped. `cut_replies(n)`: the next `n` requests that have
    `mark` in them reach the server, and their connections are closed once it has answered; the answers are lost.
    """

    def __init__(self, port: int) -> None:
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.frozen = threading.Event()
        self.cut = 0  # replies cut so far
        self._lock = threading.Lock()
        self._to_cut = 0
        self._mark = b""
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._go(self._accept)

    def cut_replies(self, count: int, mark: bytes) -> None:
        with self._lock:
            self._to_cut, self._mark = count, mark

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _go(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        self._listener.settimeout(0.05)
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                self._go(self._forward, client)

    def _forward(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._to, 5) as server:
            doomed = False
            while not self._closing.is_set():
                if self.frozen.is_set():
                    self._closing.wait(0.02)
                    continue
                readable, _, _ = select.select([client, server], [], [], 0.05)
                for end in readable:
                    if self.frozen.is_set():
                        break
                    data = end.recv(1 << 16)
                    if not data or (end is server and doomed):
                        self.cut += doomed and bool(data)
                        return
                    if end is client:
                        doomed = doomed or self._to_be_cut(data)
                    (server if end is client else client).sendall(data)

    def _to_be_cut(self, data: bytes) -> bool:
        with self._lock:
            if self._to_cut and self._mark in data:
                self._to_cut -= 1
                return True
        return False


class Namespace:
    """A network namespace joined to this machine by a pair of interfaces. Needs root, `ip` and `iptables`; else `OSError`."""

    def __init__(self) -> None:
        tag = f"{os.getpid() % 0xFFFF:x}"
        self.name = f"lyf{tag}"
        self._ours, self._theirs = f"lyo{tag}", f"lyt{tag}"
        self.host = f"10.213.{os.getpid() % 250 + 1}.1"
        self._inside = self.host[:-1] + "2"

    def __enter__(self) -> Namespace:
        try:
            _do("ip", "netns", "add", self.name)
            _do("ip", "link", "add", self._ours, "type", "veth", "peer", "name", self._theirs, "netns", self.name)
            _do("ip", "addr", "add", f"{self.host}/30", "dev", self._ours)
            _do("ip", "link", "set", self._ours, "up")
            self._in("ip", "addr", "add", f"{self._inside}/30", "dev", self._theirs)
            self._in("ip", "link", "set", self._theirs, "up")
            self._in("ip", "link", "set", "lo", "up")
            self._in("iptables", "-L", "-n")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for command in (["ip", "netns", "del", self.name], ["ip", "link", "del", self._ours]):
            subprocess.run(command, capture_output=True, check=False)

    @property
    def command(self) -> list[str]:
        """What goes before a command that is to run inside."""
        return ["ip", "netns", "exec", self.name]

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """No packet passes: nobody is told, no connection is closed."""
        for chain in ("INPUT", "OUTPUT"):
            self._in("iptables", "-I", chain, "-i" if chain == "INPUT" else "-o", self._theirs, "-j", "DROP")
        try:
            yield
        finally:
            self._in("iptables", "-F")

    def _in(self, *command: str) -> None:
        _do(*self.command, *command)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
