"""Progress displays of a training run: a live table on a terminal, lines elsewhere.

Output goes to standard error, as standard output is for data. ``NO_COLOR`` is honoured.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moesaic.core.units import show_count, show_seconds

REFRESH_INTERVAL_S = 0.25
LINE_INTERVAL_S = 10.0
METRIC_LABELS = (
    ("train/lr", "lr"),
    ("train/grad_norm", "grad norm"),
    ("train/loss_balance", "balance"),
    ("train/loss_z", "z"),
    ("moe/max_vio", "max vio"),
    ("moe/drop_frac", "dropped"),
)


@dataclass(slots=True)
class RunStatus:
    """The state of a run: ``values`` are its newest metrics, ``losses`` the names of losses."""

    steps: int
    losses: tuple[str, ...] = ()
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    health: str = ""
    seconds_left: float | None = None


class ProgressDisplay:
    """Base of progress displays. The base itself shows nothing: for other ranks and for tests."""

    def open(self) -> None: ...

    def advance(self, step: int) -> None:
        """Record that a step is done; takes microseconds."""

    def update_metrics(self, values: Mapping[str, float], *, health: str = "") -> None:
        """Take new metrics, and router health in a few words."""

    def note(self, text: str) -> None:
        """Print a sentence that stays on the screen."""

    def close(self) -> None: ...


class _StatusDisplay(ProgressDisplay):
    """Keeps the status of the run, and estimates the time left from the steps of this process."""

    def __init__(
        self, console: Console, *, status: RunStatus, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._status, self._clock = console, status, clock
        self._first: tuple[int, float] | None = None
        self._next_output = clock()

    def advance(self, step: int) -> None:
        self._status.step = step
        if self._first is None:  # the first step warms up: timing starts after it
            self._first = (step, self._clock())

    def update_metrics(self, values: Mapping[str, float], *, health: str = "") -> None:
        self._status.values.update(values)
        self._status.health = health or self._status.health

    def note(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _current_status(self) -> RunStatus:
        status = self._status
        if self._first is not None and status.step > self._first[0]:
            per_step = (self._clock() - self._first[1]) / (status.step - self._first[0])
            status.seconds_left = per_step * (status.steps - status.step)
        return status


class LineDisplay(_StatusDisplay):
    """Prints a line every ``LINE_INTERVAL_S`` seconds, and one for the last metrics."""

    _printed_step = -1

    def update_metrics(self, values: Mapping[str, float], *, health: str = "") -> None:
        super().update_metrics(values, health=health)
        if self._clock() >= self._next_output:
            self._print_status()
            self._next_output = self._clock() + LINE_INTERVAL_S

    def close(self) -> None:
        if self._status.values and self._printed_step != self._status.step:
            self._print_status()

    def _print_status(self) -> None:
        self._printed_step = self._status.step
        self.note(format_status_line(self._current_status()))


class LiveDisplay(_StatusDisplay):
    """A table that is redrawn at most four times a second, from the training thread.

    A slow terminal is redrawn less often, so that drawing takes at most one percent of the time.
    """

    def __init__(
        self, console: Console, *, status: RunStatus, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console, status=status, clock=clock)
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False)

    def open(self) -> None:
        self._live.start()

    def advance(self, step: int) -> None:
        super().advance(step)
        if self._clock() >= self._next_output:
            self._draw()

    def close(self) -> None:
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        started = self._clock()
        self._live.update(render_status(self._current_status()), refresh=True)
        ended = self._clock()
        self._next_output = ended + max(REFRESH_INTERVAL_S, 100 * (ended - started))


def make_display(*, status: RunStatus, stream: TextIO | None = None) -> LineDisplay | LiveDisplay:
    """Return the display for the stream, standard error by default: live on a terminal."""
    console = Console(file=stream or sys.stderr, highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    return (LiveDisplay if live else LineDisplay)(console, status=status)


def render_status(status: RunStatus) -> RenderableType:
    """Return a status as the live table."""
    head = Table.grid(padding=(0, 2))
    head.add_row(
        ProgressBar(total=max(status.steps, 1), completed=status.step, width=32),
        f"step {status.step:,}/{status.steps:,}",
        f"{show_count(status.values.get('perf/tokens_per_s', 0.0))} tokens/s",
        _time_left(status),
    )
    body = Table.grid(padding=(0, 2))
    losses = Text.assemble(*_styled_cells(_loss_cells(status), style="bold cyan"))
    numbers = Text.assemble(*_styled_cells(_metric_cells(status), style="cyan"))
    for name, cells in (("loss", losses), ("", numbers)):
        if cells.plain:
            body.add_row(Text(name, style="dim"), cells)
    if status.health:
        good = status.health == "healthy"
        body.add_row(
            Text("router", style="dim"), Text(status.health, style="green" if good else "yellow")
        )
    return Group(head, body)


def format_status_line(status: RunStatus) -> str:
    """Return a status as one line of a log."""
    parts = [f"step {status.step}/{status.steps}"]
    parts += [f"{name} {value}" for name, value in _loss_cells(status)]
    if "perf/tokens_per_s" in status.values:
        parts.append(f"{show_count(status.values['perf/tokens_per_s'])} tokens/s")
    parts += [part for part in (_time_left(status), status.health) if part]
    return " | ".join(parts)


def _loss_cells(status: RunStatus) -> list[tuple[str, str]]:
    names = ("train/loss", *status.losses, "valid/loss")
    return [
        (name.removeprefix("train/loss/").removeprefix("train/"), f"{status.values[name]:.3f}")
        for name in names
        if name in status.values
    ]


def _metric_cells(status: RunStatus) -> list[tuple[str, str]]:
    return [
        (word, f"{status.values[name]:.3g}")
        for name, word in METRIC_LABELS
        if name in status.values
    ]


def _styled_cells(cells: list[tuple[str, str]], *, style: str) -> list[tuple[str, str]]:
    return [part for name, value in cells for part in ((f"{name} ", "dim"), (f"{value}   ", style))]


def _time_left(status: RunStatus) -> str:
    return f"{show_seconds(status.seconds_left)} left" if status.seconds_left is not None else ""
