"""The small systems: their claims, their variants (the system first) and what is measured."""

from collections.abc import Callable
from dataclasses import dataclass

from small_systems_measures import diffusion, forecasting, loss_by_task, retrieval, rewards

from moesaic.data.mixture import MixtureConfig
from moesaic.recipes.dit_moe_recipe import dit_moe, dit_moe_dense
from moesaic.recipes.dmoerm_recipe import dmoerm, dmoerm_single
from moesaic.recipes.jiuzhang_recipe import TASKS, jiuzhang, jiuzhang_plain_gate
from moesaic.recipes.time_moe_recipe import time_moe, time_moe_dense
from moesaic.recipes.vlm2vec_recipe import vlm2vec, vlm2vec_dense
from moesaic.train.run import Run
from moesaic.train.text_data import require_text
from moesaic.train.trainer import Trainer


@dataclass(frozen=True)
class System:
    """A claim, the runs that test it, and their measure."""

    claim: str
    recipes: tuple[Callable[[], Run], ...]
    measure: Callable[[Trainer], dict[str, float]]

    def variants(self) -> dict[str, Run]:
        return {run.name: run for run in (recipe() for recipe in self.recipes)}


def jiuzhang_single(task: int) -> Run:
    """The control of ``jiuzhang`` for one task alone, with its share of the rows."""
    run = jiuzhang()
    data = require_text(run.data, what="jiuzhang")
    mixture = MixtureConfig(tasks=(data.mixture.tasks[task],))
    name = f"jiuzhang-{TASKS[task].name}"
    return run.replace(name=name, data=data.replace(mixture=mixture), steps=run.steps // len(TASKS))


SYSTEMS = {
    "time-moe": System(
        "experts forecast better than a dense model of equal active parameters, and a schedule of "
        "the heads makes any horizon.",
        (time_moe, time_moe_dense),
        forecasting,
    ),
    "dit-moe": System(
        "experts denoise better than a dense model of equal active parameters, and their choice "
        "depends on position and time more than on the class.",
        (dit_moe, dit_moe_dense),
        diffusion,
    ),
    "dmoerm": System(
        "with 30 % of the labels reversed, experts by task and capability agree with the gold "
        "reward more often than one reward model, and best-of-n rises for longer.",
        (dmoerm, dmoerm_single),
        rewards,
    ),
    "vlm2vec": System(
        "a contrastive head on any backbone retrieves better than without training.",
        (vlm2vec, vlm2vec_dense),
        retrieval,
    ),
    "jiuzhang": System(
        "one model with the task in the gate is at least as good as one model for each task.",
        (
            jiuzhang,
            jiuzhang_plain_gate,
            *(lambda t=t: jiuzhang_single(t) for t in range(len(TASKS))),
        ),
        loss_by_task,
    ),
}
