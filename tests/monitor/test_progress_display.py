import io

import pytest
from rich.console import Console

from moesaic.monitor.progress_display import (
    LineDisplay,
    LiveDisplay,
    RunStatus,
    format_status_line,
    make_display,
    render_status,
)

VALUES = {
    "train/loss": 3.21,
    "train/loss/translation": 3.5,
    "train/loss/denoising": 2.75,
    "train/loss/deu_Latn": 9.9,
    "valid/loss": 3.0,
    "perf/tokens_per_s": 7512.0,
    "train/lr": 0.002,
    "moe/max_vio": 0.31,
}
TASKS = ("train/loss/translation", "train/loss/denoising")


def status(**changes):
    fields = {"steps": 1200, "losses": TASKS, "step": 300, "values": VALUES, "seconds_left": 75.0}
    return RunStatus(**fields | changes)


def screen(renderable):
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    console.print(renderable)
    return console.export_text()


def test_the_table_shows_progress_speed_losses_and_health():
    text = screen(render_status(status(health="layer encoder.3 collapsed to 2/8 experts")))
    for part in (
        "step 300/1,200", "7.51k tokens/s", "1m15s left", "loss 3.210", "translation 3.500",
        "denoising 2.750", "valid/loss 3.000", "lr 0.002", "max vio 0.31",
        "layer encoder.3 collapsed to 2/8 experts",
    ):  # fmt: skip
        assert part in text
    assert "9.9" not in text  # a language's loss is in the file, not on the screen


def test_an_empty_status_draws_too():
    assert "step 0/5" in screen(render_status(RunStatus(steps=5)))
    assert format_status_line(RunStatus(steps=5)) == "step 0/5"


def test_the_line_has_the_same_values_in_one_row():
    text = format_status_line(status(health="healthy"))
    assert text == (
        "step 300/1200 | loss 3.210 | translation 3.500 | denoising 2.750 | valid/loss 3.000"
        " | 7.51k tokens/s | 1m15s left | healthy"
    )


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_plain_lines_come_at_their_interval_and_the_last_row_is_always_printed():
    stream, clock = io.StringIO(), Clock()
    display = LineDisplay(Console(file=stream), status=RunStatus(steps=100), clock=clock)
    for step in range(1, 36):
        display.advance(step)
        display.update_metrics({"train/loss": float(step)})
        clock.now += 1
    display.close()
    printed = [text.split(" |")[0] for text in stream.getvalue().splitlines()]
    assert printed == ["step 1/100", "step 11/100", "step 21/100", "step 31/100", "step 35/100"]
    assert "1m09s left" in stream.getvalue().splitlines()[3]


def test_the_live_table_is_drawn_at_most_four_times_a_second():
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=110)
    display = LiveDisplay(console, status=RunStatus(steps=100), clock=clock)
    draws = []
    display._live.update = lambda renderable, **_: draws.append(renderable)
    display.open()
    for step in range(1, 101):
        display.advance(step)
        clock.now += 0.01
    display.close()
    assert 4 <= len(draws) <= 6
    assert "step 100/100" in screen(draws[-1])


def test_a_slow_terminal_is_drawn_less_often():
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=110)
    display = LiveDisplay(console, status=RunStatus(steps=100), clock=clock)
    draws = []

    def slow(renderable, **_):
        draws.append(renderable)
        clock.now += 0.02

    display._live.update = slow
    for step in range(1, 401):
        display.advance(step)
        clock.now += 0.01
    assert len(draws) == 2


def test_notes_are_printed_as_they_are():
    display = LineDisplay(Console(file=io.StringIO()), status=RunStatus(steps=1))
    display.note("step 7 skipped: [not] finite")
    assert display._console.file.getvalue() == "step 7 skipped: [not] finite\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "term", "expected"),
    [
        (Terminal(), "xterm-256color", LiveDisplay),
        (Terminal(), "dumb", LineDisplay),
        (io.StringIO(), "xterm-256color", LineDisplay),
    ],
    ids=["terminal", "dumb terminal", "pipe"],
)
def test_the_display_suits_the_stream(stream, term, expected, monkeypatch):
    monkeypatch.setenv("TERM", term)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    display = make_display(status=RunStatus(steps=1), stream=stream)
    assert type(display) is expected


def test_everything_goes_to_standard_error(capsys):
    display = make_display(status=RunStatus(steps=10))
    display.open()
    display.advance(1)
    display.update_metrics(VALUES)
    display.note("a note")
    display.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a note" in captured.err


def test_no_color_leaves_no_colour(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    display = make_display(status=status(health="healthy"), stream=stream)
    display.open()
    display.close()
    assert "healthy" in stream.getvalue()
    assert "\x1b[3" not in stream.getvalue()
