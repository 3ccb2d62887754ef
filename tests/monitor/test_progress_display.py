import io

import pytest
from rich.console import Console

from moesaic.monitor.progress_display import (
    LineDisplay,
    LiveDisplay,
    NotesOnlyDisplay,
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


def test_the_line_says_the_same_in_one_row():
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


def test_plain_lines_come_at_their_interval_and_the_last_row_is_never_lost():
    stream, clock = io.StringIO(), Clock()
    board = LineDisplay(Console(file=stream), status=RunStatus(steps=100), every_s=10, clock=clock)
    for step in range(1, 36):
        board.advance(step)
        board.update_metrics({"train/loss": float(step)})
        clock.now += 1
    board.close()
    said = [text.split(" |")[0] for text in stream.getvalue().splitlines()]
    assert said == ["step 1/100", "step 11/100", "step 21/100", "step 31/100", "step 35/100"]
    assert "1m09s left" in stream.getvalue().splitlines()[3]


def test_the_live_table_is_drawn_at_most_four_times_a_second():
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=110)
    board = LiveDisplay(console, status=RunStatus(steps=100), clock=clock)
    draws = []
    board._live.update = lambda renderable, **_: draws.append(renderable)
    board.open()
    for step in range(1, 101):
        board.advance(step)
        clock.now += 0.01
    board.close()
    assert 4 <= len(draws) <= 6
    assert "step 100/100" in screen(draws[-1])


def test_a_slow_terminal_is_drawn_less_often():
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=110)
    board = LiveDisplay(console, status=RunStatus(steps=100), clock=clock)
    draws = []

    def slow(renderable, **_):
        draws.append(renderable)
        clock.now += 0.02

    board._live.update = slow
    for step in range(1, 401):
        board.advance(step)
        clock.now += 0.01
    assert len(draws) == 2


def test_notes_stay_whatever_the_board(capsys):
    for board in (
        NotesOnlyDisplay(Console(file=io.StringIO())),
        LineDisplay(Console(file=io.StringIO()), status=RunStatus(steps=1)),
    ):
        board.open()
        board.note("step 7 skipped: [not] finite")
        assert board._console.file.getvalue() == "step 7 skipped: [not] finite\n"


def test_a_quiet_board_says_nothing_else():
    stream = io.StringIO()
    board = NotesOnlyDisplay(Console(file=stream))
    board.open()
    board.advance(1)
    board.update_metrics(VALUES, health="healthy")
    board.close()
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "quiet", "term", "expected"),
    [
        (Terminal(), False, "xterm-256color", LiveDisplay),
        (Terminal(), False, "dumb", LineDisplay),
        (io.StringIO(), False, "xterm-256color", LineDisplay),
        (Terminal(), True, "xterm-256color", NotesOnlyDisplay),
    ],
    ids=["terminal", "dumb terminal", "pipe", "quiet"],
)
def test_the_board_suits_the_stream(stream, quiet, term, expected, monkeypatch):
    monkeypatch.setenv("TERM", term)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    board = make_display(status=RunStatus(steps=1), quiet=quiet, stream=stream)
    assert type(board) is expected


def test_everything_goes_to_standard_error(capsys):
    board = make_display(status=RunStatus(steps=10))
    board.open()
    board.advance(1)
    board.update_metrics(VALUES)
    board.note("a note")
    board.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a note" in captured.err


def test_no_color_leaves_no_colour(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    board = make_display(status=status(health="healthy"), stream=stream)
    board.open()
    board.close()
    assert "healthy" in stream.getvalue()
    assert "\x1b[3" not in stream.getvalue()
