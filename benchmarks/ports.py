"""Ports for servers that are started some time after their port was chosen, and that may be stopped and started again."""

from __future__ import annotations

import atexit
import random
import socket

_RANGE = range(15_000, 32_000)
"""Below what systems take the ports of outgoing connections from (Linux 32768, others 49152): such a connection, made between choice and
start or while the server is down, would have the port."""

_kept: list[socket.socket] = []
"""A datagram socket on each port that was chosen: nobody uses it, and no other process finds the port free, until this one ends."""


@atexit.register
def _release() -> None:
    for mark in _kept:
        mark.close()


def free_port() -> int:
    """A port of this machine that nothing listens on and no other call was given, whichever process of ours made it."""
    for port in random.SystemRandom().sample(_RANGE, 1000):
        mark = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            mark.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            mark.close()
            continue
        _kept.append(mark)
        return port
    raise RuntimeError(f"no free port in {_RANGE}")
