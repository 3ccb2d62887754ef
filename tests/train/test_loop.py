"""Stop requests: the first signal sets a flag, a later one has its default effect."""

import os
import signal
from collections.abc import Iterator
from threading import Thread

import pytest

from moesaic.distributed.forked_ranks import run_cases_on_ranks
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.testing.tiny_models import tiny_run, tiny_trainer
from moesaic.train import loop as stop_module
from moesaic.train.loop import StopRequest, training_loop
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook


@pytest.fixture(autouse=True)
def usual_ctrl_c() -> Iterator[None]:
    """A shell's background job inherits an ignored SIGINT: these tests want Python's own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_requests_a_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.stop_reason == number.name
    assert signal.getsignal(number) is before


def test_a_later_signal_has_its_default_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_module, "REPEAT_S", 0.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.requested


def test_a_signal_forwarded_by_torchrun_is_a_duplicate() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process
    assert stop.signal == signal.SIGINT


def test_no_signal_is_handled_outside_the_main_thread() -> None:
    seen: list[bool] = []

    def inside() -> None:
        with StopRequest() as stop:
            seen.append(stop.requested)

    thread = Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [False]


class _SignalOnLastRank(Hook):
    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if report.step == 2 and trainer.world.rank == trainer.world.size - 1:
            signal.raise_signal(signal.SIGTERM)


def _stopped_at(_: object) -> tuple[str, int]:
    trainer = tiny_trainer(tiny_run(), world=ProcessGroupWorld())
    reason = training_loop(trainer, hooks=[_SignalOnLastRank()], until=9)
    return reason, trainer.step


def test_all_ranks_stop_at_the_same_step_where_one_gets_a_signal() -> None:
    (found,) = run_cases_on_ranks(2, _stopped_at, [None])
    assert found == [("SIGINT", 3), ("SIGTERM", 3)]
