"""Trainable parameters: all of a model, or those whose names match patterns; the rest is frozen.

A frozen parameter has no gradient and no optimizer state under any plan, and weight decay does not
change it. The state of routing rules (an expert bias) is no parameter: it follows the load.
"""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.distributed.world import World
from moesaic.parallel.parallel_model import ParallelModel

MAX_SHOWN_NAMES = 3


class TrainableParameters(Choice):
    """Which parameters a run changes: ``AllParameters`` or ``MatchingParameters``."""

    def includes(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        raise NotImplementedError

    def problems(self, names: Iterable[str]) -> Iterator[str]:
        """Yield a sentence for each part of the choice that fits no parameter of a model."""
        raise NotImplementedError


class AllParameters(TrainableParameters):
    """Every parameter."""

    def includes(self, name: str) -> bool:
        del name
        return True

    def problems(self, names: Iterable[str]) -> Iterator[str]:
        del names
        yield from ()


class MatchingParameters(TrainableParameters):
    """The parameters whose names match one of ``patterns``, where ``*`` is any text.

    ``*.experts.*`` are the experts, ``*.router.*`` the routers, ``*attention.*`` attention and its
    norm, ``decoder.*`` the decoder. The names are those of ``moesaic ckpt inspect``.
    """

    patterns: Annotated[tuple[str, ...], Field(min_length=1)]

    def includes(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def problems(self, names: Iterable[str]) -> Iterator[str]:
        known = list(names)
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                near = get_close_matches(pattern, known, n=MAX_SHOWN_NAMES, cutoff=0.0)
                yield (
                    f"trainable.patterns: no parameter matches {pattern!r}; expected names such as "
                    f"{', '.join(near)}, with * for any text"
                )


def freeze_others(
    parallel_model: ParallelModel, *, trainable: TrainableParameters, world: World
) -> None:
    """Freeze the parameters of this rank that are not trained. Collective.

    Raises ConfigError on every rank if one of them has nothing to train.
    """
    parameters = dict(parallel_model.model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(trainable.includes(name))
    if world.any_rank(not any(p.requires_grad for p in parameters.values())):
        raise ConfigError(
            [
                f"trainable={trainable}: a stage of the pipeline has none of these parameters; "
                "choose some in every stage, or set parallel.plan.pipe=1"
            ]
        )
