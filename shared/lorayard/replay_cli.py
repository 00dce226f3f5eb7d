"""The options of `lorayard replay`. What it does needs the scheduler, which answers to the entry point of that name."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from lorayard.settings import Settings
from lorayard.terminal import AsJson


def replay(
    policy: Annotated[list[str] | None, typer.Option(help="Who plans; may be given more than once, as the next four may.")] = None,
    workers: Annotated[list[int] | None, typer.Option(min=1, max=10_000, help="So many workers, like those there are.")] = None,
    adapters_cached: Annotated[list[int] | None, typer.Option(min=2, help="So many adapters in each worker's memory.")] = None,
    contexts: Annotated[list[int] | None, typer.Option(min=1, max=64, help="So many adapters computed in turn in each worker.")] = None,
    speed: Annotated[list[float] | None, typer.Option(min=0.001, max=1000.0, help="Jobs come so many times as fast.")] = None,
    hours: Annotated[float, typer.Option(min=0.01, help="Jobs of the last so many hours, as far as results are kept.")] = 24.0,
    most: Annotated[int, typer.Option(min=1, max=10_000_000, help="So many jobs at most, the newest.")] = 100_000,
    trace: Annotated[Path | None, typer.Option(help="Jobs of this CSV instead of the fleet's.")] = None,
    adapters: Annotated[int, typer.Option(min=1, help="Adapters to draw, where the CSV names none.")] = 64,
    tenants: Annotated[int, typer.Option(min=1, help="Tenants to draw, where the CSV names no adapters.")] = 4,
    costs: Annotated[Path | None, typer.Option(help="Workers as 'lorayard bench costs' wrote them, instead of the fleet's.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="No worker has any adapter on its disk at first.")] = False,
    record: Annotated[Path | None, typer.Option(help="Write the jobs to this CSV: lengths and times, no prompts.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw waits and backlog to this .svg or .png file.")] = None,
    as_json: AsJson = False,
) -> None:
    """What if? Run the fleet's recent jobs through the simulator: with another policy, more workers, a bigger cache, more jobs.

    Options that may be given more than once are combined; without any, it shows how it ran and how it should have run. Policies:
    lorayard, fcfs (first come first served), round-robin, lorax, s-lora, sglang, llm-d, dlora, shortest-queue, all.
    Talks to Redis, so only where the fleet runs; with --trace and --costs no fleet is needed.
    """
    (entry,) = entry_points(group="lorayard.commands", name="replay")
    entry.load()(
        Settings.load(),
        policy=policy or [],
        workers=workers or [],
        adapters_cached=adapters_cached or [],
        contexts=contexts or [],
        speed=speed or [],
        hours=hours,
        most=most,
        trace=trace,
        adapters=adapters,
        tenants=tenants,
        costs=costs,
        cold=cold,
        record=record,
        chart=chart,
        as_json=as_json,
    )
