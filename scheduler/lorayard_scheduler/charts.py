"""Results of a replay as a picture: an SVG or PNG file. Needs matplotlib (the extra `chart`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorayard.errors import SetupError
from lorayard_scheduler.what_if import Result

KINDS = (".svg", ".png")


def check(path: Path) -> None:
    """Raise `SetupError` where a chart could not be drawn there: before anything is computed."""
    if path.suffix.lower() not in KINDS:
        raise SetupError(f"--chart {path}: give a file that ends in {' or '.join(KINDS)}")
    if not path.parent.is_dir():
        raise SetupError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise SetupError("--chart needs matplotlib: pip install 'lorayard[chart]', or leave the option out") from None


def draw(results: Mapping[str, Result], path: Path) -> None:
    """Two panels, a line each: which part of the jobs had been begun after how long, and how many waited over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    waits, backlog = figure.subplots(1, 2)
    for number, (name, result) in enumerate(results.items()):
        style = {"label": name, "color": f"C{number % 10}", "linestyle": "--" if result.scenario is None else "-", "linewidth": 1.5}
        size = len(result.waits)
        waits.plot([max(wait, 0.001) for wait in result.waits], [100 * (i + 1) / size for i in range(size)], **style)
        backlog.plot([at / 60 for at, _ in result.waiting], [jobs for _, jobs in result.waiting], **style)
    waits.set(xscale="log", xlabel="seconds from arrival to start", ylabel="% of jobs", title="Waiting", ylim=(0, 101))
    backlog.set(xlabel="minutes", ylabel="jobs", title="Jobs waiting", ylim=(0, None))
    for panel in (waits, backlog):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*waits.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}") from None
