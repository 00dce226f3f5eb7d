"""The `lorayard api` process."""

from __future__ import annotations

import socket

import uvicorn
from celery import Celery

from lorayard.errors import SetupError
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import KeyRing
from lorayard.settings import Settings
from lorayard_scheduler.api.app import make_api


def serve(settings: Settings, ledger: Ledger, celery: Celery) -> None:
    """Serve until SIGTERM or SIGINT. Raises `SetupError` when the port is taken."""
    listener = listen(settings.api_host, settings.api_port)
    KeyRing(ledger.client).ensure_first(settings)
    config = uvicorn.Config(make_api(settings, ledger, celery), log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything else is started so that a busy port is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio sets no TCP_NODELAY
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise SetupError(f"cannot listen on {host}:{port} ({error.strerror}): set LORAYARD_API_PORT to a free port") from None
    return listener
