"""Board: what a person sees of a run: a live table on a terminal, plain lines elsewhere.

Everything goes to standard error: standard output is for data. ``NO_COLOR`` is honoured.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TextIO, runtime_checkable

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
    """What a board shows. ``values`` is the newest row of metrics, ``losses`` the names to show."""

    steps: int
    losses: tuple[str, ...] = ()
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    health: str = ""
    seconds_left: float | None = None


@runtime_checkable
class ProgressDisplay(Protocol):
    """Told of every step; shows itself when it is time."""

    def open(self) -> None: ...

    def advance(self, step: int) -> None:
        """One more step is done. Costs microseconds."""
        ...

    def update_metrics(self, values: Mapping[str, float], *, health: str = "") -> None:
        """Take a new row of metrics and the router's health in words."""
        ...

    def note(self, text: str) -> None:
        """Say a sentence that stays."""
        ...

    def close(self) -> None: ...


class NotesOnlyDisplay:
    """Says only notes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def open(self) -> None: ...

    def advance(self, step: int) -> None: ...

    def update_metrics(self, values: Mapping[str, float], *, health: str = "") -> None: ...

    def note(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None: ...


class LineDisplay:
    """A line every ``every_s`` seconds, and one for the last row."""

    def __init__(
        self,
        console: Console,
        *,
        status: RunStatus,
        every_s: float = LINE_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._every_s, self._clock = console, every_s, clock
        self._eta = EtaEstimator(status, clock=clock)
        self._due, self._printed_step = clock(), -1

    def open(self) -> None: ...

    def advance(self, step: int) -> None:
        self._eta.record_step(step)

    def update_metrics(self, values: Mapping[str, float], *, health: str = "") -> None:
        self._eta.update_metrics(values, health=health)
        if self._clock() >= self._due:
            self._print_status()
            self._due = self._clock() + self._every_s

    def note(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        if self._eta.status.values and self._printed_step != self._eta.status.step:
            self._print_status()

    def _print_status(self) -> None:
        self._printed_step = self._eta.status.step
        self._console.print(Text(format_status_line(self._eta.current_status())), soft_wrap=True)


class LiveDisplay:
    """A table that redraws itself at most four times a second, from the training thread.

    A slow terminal is redrawn less often, so that drawing takes one percent of the time at most.
    """

    def __init__(
        self, console: Console, *, status: RunStatus, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._eta = EtaEstimator(status, clock=clock)
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False)
        self._due = clock()

    def open(self) -> None:
        self._live.start()

    def advance(self, step: int) -> None:
        self._eta.record_step(step)
        if self._clock() >= self._due:
            self._draw()

    def update_metrics(self, values: Mapping[str, float], *, health: str = "") -> None:
        self._eta.update_metrics(values, health=health)

    def note(self, text: str) -> None:
        self._live.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        started = self._clock()
        self._live.update(render_status(self._eta.current_status()), refresh=True)
        ended = self._clock()
        self._due = ended + max(REFRESH_INTERVAL_S, 100 * (ended - started))


class EtaEstimator:
    """Keeps a status and estimates the time left from the steps this process made."""

    def __init__(self, status: RunStatus, *, clock: Callable[[], float]) -> None:
        self.status = status
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def record_step(self, step: int) -> None:
        self.status.step = step
        if self._first is None:  # the first step warms up, so the clock starts after it
            self._first = (step, self._clock())

    def update_metrics(self, values: Mapping[str, float], *, health: str) -> None:
        self.status.values.update(values)
        self.status.health = health or self.status.health

    def current_status(self) -> RunStatus:
        """Return the status with the time left filled in."""
        if self._first is not None and self.status.step > self._first[0]:
            per_step = (self._clock() - self._first[1]) / (self.status.step - self._first[0])
            self.status.seconds_left = per_step * (self.status.steps - self.status.step)
        return self.status


def make_display(
    *, status: RunStatus, quiet: bool = False, stream: TextIO | None = None
) -> NotesOnlyDisplay | LineDisplay | LiveDisplay:
    """Return the board that suits the stream (standard error unless given). Call its ``open``."""
    console = Console(file=stream or sys.stderr, highlight=False)
    if quiet:
        return NotesOnlyDisplay(console)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console, status=status)
    return LineDisplay(console, status=status)


def render_status(status: RunStatus) -> RenderableType:
    """Draw a status as the live table."""
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
    """Say a status in one line, for logs."""
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
