"""Trainable parameters: all of a model, or those whose names match patterns; the rest is frozen.

A frozen parameter has no gradient and no optimizer state under any plan, and weight decay does not
change it. The state of routing rules (an expert bias) is no parameter: it follows the load.
"""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Self

from pydantic import Field

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import World
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.model.transformer import Transformer
from moesaic.parallel.parallel_model import ParallelModel

MAX_SHOWN_NAMES = 3


PARTS: dict[str, tuple[str, ...]] = {
    "experts": ("*.experts.*", "*.shared_experts.*"),
    "router": ("*.router.*", "*_routing.*"),
    "attention": ("*attention.*",),
    "norms": ("*norm.*", "*norms.*"),
    "embeddings": ("embedding.*",),
}
Patterns = Annotated[tuple[str, ...], Field(min_length=1)]


class TrainableParameters(Choice):
    """Which parameters a run changes: all, some of them, or adapters beside frozen ones.

    ``keeps_base``: the parameters of the model stay as they are, so checkpoints leave them out.
    """

    keeps_base: ClassVar[bool] = False

    def attach(self, model: Transformer) -> None:
        """Add what is trained to a whole model, which may be without values."""

    def includes(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        raise NotImplementedError

    def problems(self, model: Transformer) -> Iterator[str]:
        """Yield a sentence for each part of the choice that fits no parameter of a model."""
        raise NotImplementedError

    def parallel_problems(self, plan: ParallelPlan, *, memory: MemoryPlan) -> Iterator[str]:
        """Yield a sentence for each part of a plan under which this cannot be trained."""
        del plan, memory
        yield from ()

    def resolved(self, start: RunDir | None) -> Self:
        """Return the choice with what it takes from the run that training starts from, if any."""
        del start
        return self


class AllParameters(TrainableParameters):
    """Every parameter."""

    def includes(self, name: str) -> bool:
        del name
        return True

    def problems(self, model: Transformer) -> Iterator[str]:
        del model
        yield from ()


class MatchingParameters(TrainableParameters):
    """The parameters whose names match one of ``patterns``, where ``*`` is any text.

    A pattern may also be the word for a part of the model: ``experts``, ``router``, ``attention``
    (with its norm), ``norms`` or ``embeddings``. ``decoder.*`` is the decoder. The names are those
    of ``moesaic ckpt inspect``.
    """

    patterns: Patterns

    def includes(self, name: str) -> bool:
        return matches(name, self.patterns)

    def problems(self, model: Transformer) -> Iterator[str]:
        names = [name for name, _ in model.named_parameters()]
        yield from unmatched_patterns(self.patterns, names, key="trainable.patterns")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns, or is in one of the parts that they name."""
    expanded = (each for pattern in patterns for each in PARTS.get(pattern, (pattern,)))
    return any(fnmatchcase(name, each) for each in expanded)


def unmatched_patterns(patterns: Iterable[str], names: Sequence[str], *, key: str) -> Iterator[str]:
    """Yield a sentence for each pattern that matches none of the names."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            near = get_close_matches(pattern, names, n=MAX_SHOWN_NAMES, cutoff=0.0)
            yield (
                f"{key}: no parameter matches {pattern!r}; expected names such as "
                f"{', '.join(near)}, with * for any text, or one of {', '.join(PARTS)}"
            )


def freeze_others(
    parallel_model: ParallelModel, *, trainable: TrainableParameters, world: World
) -> None:
    """Freeze the parameters of this rank that are not trained. Collective.

    If it keeps the base, checkpoints leave out what is frozen. Raises ConfigError on every rank if
    one of them has nothing to train.
    """
    parameters = dict(parallel_model.model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(trainable.includes(name))
    if trainable.keeps_base:
        parallel_model.unsaved = frozenset(
            name for name in parallel_model.sharding_plan if not trainable.includes(name)
        )
    if world.any_rank(not any(p.requires_grad for p in parameters.values())):
        raise ConfigError(
            [
                f"trainable={trainable}: a stage of the pipeline has none of these parameters; "
                "choose some in every stage, or set parallel.plan.pipe=1"
            ]
        )
