"""Checkpoint ranks: all ranks in one step of saving or loading, in which an error is raised on all.

A step costs a message to rank 0 and one back from each rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch.distributed as distributed

from moesaic.core.errors import CheckpointError, UserError
from moesaic.distributed.world import World

COLLECTIVE_TIMEOUT_S = 1800.0  # how long ranks wait for the slowest disk
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What was returned, or what was raised."""

    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class CheckpointRanks:
    """All ranks with a gloo group of their own (none for a single process).

    So checkpoints are saved in the background, independent of training's collectives and of the
    GPU. Every rank makes the same calls in the same order.
    """

    world: World
    group: Any

    @classmethod
    def open(cls, world: World, *, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> Self:
        """Make the group. Collective."""
        if world.size == 1:
            return cls(world, None)
        timeout = timedelta(seconds=timeout_s)
        return cls(world, distributed.new_group(backend="gloo", timeout=timeout))

    def close(self) -> None:
        """Destroy the group. Collective."""
        if self.group is not None:
            distributed.destroy_process_group(self.group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, action: Callable[[], Value]) -> Value:
        """Return what ``action`` returns on this rank, once it has ended on all. Collective."""
        returned: list[Value] = []
        self.exchange(lambda: returned.append(action()), at_rank0=lambda values: values)
        return returned[0]

    def exchange(
        self, action: Callable[[], Any], at_rank0: Callable[[list[Any]], Sequence[Any]]
    ) -> Any:
        """Run ``action`` on every rank, then ``at_rank0`` with the values of all. Collective.

        It returns a value for each rank. Errors are raised on every rank: those of users as one
        CheckpointError, another one as RuntimeError.
        """
        own = _attempt(action)
        decided = _Outcome()
        answers: list[_Outcome] = []
        found = self._gather(_sent(own))
        if self.world.rank == 0:
            decided = _attempt(lambda: at_rank0(_values(found)))
            values = decided.value or [None] * len(found)
            answers = [_sent(_Outcome(value, decided.error)) for value in values]
        answer = self._scatter(answers)
        if answer.error is not None:
            raise answer.error from own.error or decided.error
        return answer.value

    def _gather(self, own: _Outcome) -> list[_Outcome]:
        """Return the outcomes of all ranks on rank 0."""
        if self.group is None:
            return [own]
        found = [own] * self.world.size
        to = found if self.world.rank == 0 else None
        distributed.gather_object(own, to, dst=0, group=self.group)
        return found

    def _scatter(self, answers: list[_Outcome]) -> _Outcome:
        """Return the answer of rank 0 for this rank."""
        if self.group is None:
            return answers[0]
        received = [_Outcome()]
        distributed.scatter_object_list(received, answers or None, src=0, group=self.group)
        return received[0]


def _attempt(action: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(action())
    except Exception as error:
        return _Outcome(error=error)


def _sent(outcome: _Outcome) -> _Outcome:
    """Return an outcome as other ranks get it: of an error, its text."""
    error = outcome.error
    if error is None:
        return outcome
    if isinstance(error, UserError | OSError):
        return _Outcome(error=CheckpointError(str(error)))
    return _Outcome(error=RuntimeError(f"{type(error).__name__}: {error}"))


def _values(found: Sequence[_Outcome]) -> list[Any]:
    """Return the values of all ranks. Raises the errors of ranks as one."""
    errors = [outcome.error for outcome in found if outcome.error is not None]
    for error in errors:
        if not isinstance(error, CheckpointError):
            raise error
    if errors:
        raise CheckpointError(" | ".join(dict.fromkeys(map(str, errors))))
    return [outcome.value for outcome in found]
