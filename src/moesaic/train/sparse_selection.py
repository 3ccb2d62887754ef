"""Selection of SpIEL: the hook that moves trained values to the places of large gradients.

See ``SpIEL`` for the rule. The gradient of a whole matrix is looked at inside its backward pass;
what is kept has as many values as are trained.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.distributed.world import World
from moesaic.nn.sparse_adapter import SparseValues
from moesaic.optim.group_update import UpdateRule
from moesaic.optim.update_rules import AdamWRule
from moesaic.parallel.sparse_adaptation import SpIEL
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook


@dataclass(slots=True)
class _Window:
    """The candidates of one matrix, and the sums of their gradients [*E, K] over some steps.

    ``step_sum`` is of the present attempt at a step on this rank; ``begun``: a step is in the sums.
    """

    candidates: Int[Tensor, "*E K"]
    sums: Float[Tensor, "*E K"]
    squares: Float[Tensor, "*E K"]
    step_sum: Float[Tensor, "*E K"]
    begun: bool = False


def selection_hooks(trainer: Trainer) -> list[Hook]:
    """Return the hook that a run of SpIEL has."""
    choice = trainer.run.trainable
    return [SparseSelectionHook(trainer, choice)] if isinstance(choice, SpIEL) else []


class SparseSelectionHook(Hook):
    """Observes gradients in the steps of a window, then moves the values (``SpIEL``)."""

    def __init__(self, trainer: Trainer, choice: SpIEL) -> None:
        self._choice, self._world = choice, trainer.parallel_model.data_world
        self._sites = {
            f"{path}.{name}": (adapter, name)
            for path, adapter in trainer.model.named_modules()
            if isinstance(adapter, SparseValues)
            for name in adapter.kinds
        }
        self._windows: dict[str, _Window] = {}
        trainer.stateful_components["selection"] = self

    def before_run(self, trainer: Trainer) -> None:
        self._observe(trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        age = (report.step - 1) % self._choice.every + 1
        if age <= self._choice.select_steps:
            for window in self._windows.values():
                gradient = self._world.all_reduce(window.step_sum)
                window.sums += gradient
                window.squares += gradient.square()
                window.step_sum.zero_()
                window.begun = True
        if age == self._choice.select_steps:
            for site, window in self._windows.items():
                self._move(trainer, site, window, share=self._share(trainer))
            self._windows.clear()
        self._observe(trainer)

    def tensors(self, world: World) -> dict[str, Tensor]:
        """Return the candidates and sums of a window that has begun."""
        del world
        return {
            f"{part}/{site}": tensor
            for site, window in self._windows.items()
            for part, tensor in (
                ("candidates", window.candidates),
                ("sums", window.sums),
                ("squares", window.squares),
            )
        }

    def restore(self, tensors: Mapping[str, Tensor], *, world: World) -> None:
        """Continue a window."""
        del world
        self._windows = {}
        for site, (adapter, name) in self._sites.items():
            if f"sums/{site}" in tensors:
                device = adapter.get_parameter(f"{name}_delta").device
                parts = ("candidates", "sums", "squares")
                candidates, sums, squares = (tensors[f"{p}/{site}"].to(device) for p in parts)
                self._windows[site] = _Window(
                    candidates, sums, squares, torch.zeros_like(sums), begun=True
                )

    def discard_attempt(self) -> None:
        """Discard the gradients of a skipped attempt, and the windows that began in it."""
        self._windows = {site: window for site, window in self._windows.items() if window.begun}
        for window in self._windows.values():
            window.step_sum.zero_()

    def _observe(self, trainer: Trainer) -> None:
        """Observe the gradients of the coming step if it is in a window."""
        due = trainer.step % self._choice.every < self._choice.select_steps
        for site, (adapter, name) in self._sites.items():
            seen = {**adapter.observers, name: partial(self._see, site)}
            adapter.observers = seen if due else {}

    def _see(self, site: str, gradient: Float[Tensor, "*E M N"]) -> None:
        flat = gradient.flatten(-2)
        if site not in self._windows:  # of the first micro-batch, over all ranks
            adapter, name = self._sites[site]
            count = adapter.get_parameter(f"{name}_delta").shape[-1]
            candidates = self._world.all_reduce(flat).abs().topk(count).indices
            sums, squares, step_sum = flat.new_zeros(3, *candidates.shape, dtype=torch.float32)
            self._windows[site] = _Window(candidates, sums, squares, step_sum)
        window = self._windows[site]
        window.step_sum += flat.gather(-1, window.candidates)

    def _share(self, trainer: Trainer) -> float:
        """Return the share of the values that move: all of them the first time."""
        if trainer.step <= self._choice.every:
            return 1.0
        return self._choice.drop * (1 - trainer.step / trainer.run.steps)

    @torch.no_grad()
    def _move(self, trainer: Trainer, site: str, window: _Window, *, share: float) -> None:
        # of places that are not trained, so no norm has looked at them
        if not bool(window.squares.isfinite().all()):
            return
        adapter, name = self._sites[site]
        delta, index = adapter.get_parameter(f"{name}_delta"), adapter.get_buffer(f"{name}_index")
        state = trainer.optimizer.state[delta]
        means, squares = (
            part / self._choice.select_steps for part in (window.sums, window.squares)
        )
        groups = trainer.optimizer.param_groups
        (rule,) = (g["rule"] for g in groups if any(p is delta for p in g["params"]))
        moments = dict(_corrected(state, means=means, squares=squares, rule=rule))
        width = delta.shape[-1]
        for row in range(delta.numel() // width):
            own = tuple(t.view(-1, width)[row] for t in (delta, index, window.candidates, means))
            places, found = _exchange(*own, count=int(share * width))
            index.view(-1, width)[row, places] = window.candidates.view(-1, width)[row, found].int()
            delta.view(-1, width)[row, places] = 0.0
            for slot, tensor in state.items():
                if tensor.shape == delta.shape:
                    seeds = moments.get(slot, torch.zeros_like(means))
                    tensor.view(-1, width)[row, places] = seeds.view(-1, width)[row, found]


def _exchange(
    delta: Float[Tensor, "K"],
    index: Int[Tensor, "K"],
    candidates: Int[Tensor, "K"],
    means: Float[Tensor, "K"],
    *,
    count: int,
) -> tuple[Int[Tensor, "C"], Int[Tensor, "C"]]:
    """Return the positions of values that move, and those of the candidates that they move to.

    The smallest differences go first; the candidates with the largest gradients come first. A
    place that is trained already is no candidate, unless every value may move.
    """
    if count < len(index):
        free = ~torch.isin(candidates, index)
        best = torch.where(free, means.abs(), -1.0).argsort(descending=True, stable=True)
        count = min(count, int(free.sum()))
    else:
        best = means.abs().argsort(descending=True, stable=True)
    return delta.abs().argsort(stable=True)[:count], best[:count]


def _corrected(
    state: Mapping[str, Any], *, means: Tensor, squares: Tensor, rule: UpdateRule
) -> Iterator[tuple[str, Tensor]]:
    """Yield moments of AdamW that are ``means`` and ``squares`` once corrected for bias."""
    if not isinstance(rule, AdamWRule) or not state:
        return
    first, second = rule.betas
    steps = float(state["step"])
    yield "exp_avg", means * (1 - first**steps)
    yield "exp_avg_sq", squares * (1 - second**steps)
