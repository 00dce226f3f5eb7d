"""One job on its way to a hosted service: what it asks for, what it was granted, what it took."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from lorayard.jobs import BASE_DIGEST
from lorayard.ledger.organisation import Grant, Settled, Want
from lorayard_workers.groq.client import Reply
from lorayard_workers.runner import WorkItem


class Call:
    """`digest` and `model` are the adapter's here and at the service. `over`: ended, or cancelled. `sent`: the service may have seen it.
    Times are monotonic seconds."""

    __slots__ = (
        "batch",
        "body",
        "cancelled",
        "digest",
        "grant",
        "item",
        "lane",
        "model",
        "notes",
        "over",
        "received",
        "sent",
        "size",
        "started",
        "task",
        "want",
    )

    def __init__(self, batch: str, item: WorkItem, model: str, digest: str, lane: str) -> None:
        self.batch, self.item, self.model, self.digest, self.lane = batch, item, model, digest, lane
        self.received = time.monotonic()
        self.started = 0.0
        self.cancelled = self.over = self.sent = False
        self.body: dict[str, Any] = {}
        self.notes: list[str] = []
        self.size = 0  # bytes of the prompt
        self.want: Want | None = None
        self.grant: Grant | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.batch, self.item.ref

    def settled(self, tokens: int, nano: int) -> Settled:
        """What it took in the end, of what it was granted."""
        assert self.want is not None
        assert self.grant is not None
        return Settled(self.grant, self.want, self.digest, tokens, nano)

    def used(self, answer: dict[str, Any], price: tuple[float, float]) -> tuple[int, int, int]:
        """Tokens of the prompt (0: not told), tokens in all and nano-dollars, by the service's own count; else what was reserved."""
        usage = answer.get("usage")
        prompt, made = (usage.get("prompt_tokens"), usage.get("completion_tokens")) if isinstance(usage, dict) else (None, None)
        if not isinstance(prompt, int) or not isinstance(made, int):
            assert self.want is not None
            return 0, self.want.tokens, self.want.nano
        return prompt, prompt + made, round(prompt * price[0] + made * price[1])

    def is_cold(self, idle_s: float) -> bool:
        """Whether nobody of the organisation had called this model for so long."""
        idle_ms = self.grant.idle_ms if self.grant else None
        return idle_ms is None or idle_ms > idle_s * 1000

    def timings(self, reply: Reply, cold: bool) -> dict[str, float]:
        """Milliseconds. What of a call the service does not account for is the network's; of an adapter's first in a while, its loading."""
        usage = reply.body.get("usage")
        usage = usage if isinstance(usage, dict) else {}

        def told(name: str) -> float:
            value = usage.get(name)
            return max(0.0, value * 1000) if isinstance(value, int | float) else 0.0

        queue, prefill, decode = told("queue_time"), told("prompt_time"), told("completion_time")
        rest = max(0.0, reply.seconds * 1000 - queue - prefill - decode)
        loading = cold and self.digest != BASE_DIGEST
        stages = {"on_deck": (self.started - self.received) * 1000, "remote_queue": queue, "prefill": prefill, "decode": decode}
        return stages | {"adapter_load" if loading else "network": rest}
