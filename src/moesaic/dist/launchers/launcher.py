"""Launcher: a job of several machines, as the file that starts it somewhere.

Every file runs the same torchrun command on each machine, with a c10d rendezvous at the first: it
starts the ranks anew after a fault, and ``--resume auto`` goes on from the last checkpoint.
"""

import re
import shlex
import string
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from torch.distributed.run import get_args_parser

from moesaic.core.config import Choice, Config
from moesaic.core.errors import ConfigError

TEMPLATES = Path(__file__).parent / "templates"
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[int, Field(ge=1)]


class Job(Config):
    """What is started: ``command`` (words after torchrun's own) on ``nodes`` machines.

    ``about`` is said at the top of the file. torchrun starts all ranks again up to ``restarts``
    times, and they meet at ``port`` of the first machine. With ``fewest_nodes`` the run goes on
    with so few machines, if the others are gone for good.
    """

    name: str
    command: tuple[str, ...]
    about: str = ""
    nodes: Positive
    gpus_per_node: Positive
    restarts: Annotated[int, Field(ge=0)] = 3
    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    fewest_nodes: Positive | None = None

    @model_validator(mode="after")
    def _fewest_are_fewer(self) -> Self:
        if self.fewest_nodes is not None and self.fewest_nodes > self.nodes:
            raise ConfigError(
                [f"fewest_nodes={self.fewest_nodes} must be at most nodes={self.nodes}"]
            )
        return self

    @property
    def shrinks(self) -> bool:
        """Whether it may go on with fewer machines."""
        return self.fewest_nodes is not None and self.fewest_nodes < self.nodes

    @property
    def world(self) -> int:
        """The number of ranks: one per GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def label(self) -> str:
        """The name as every system takes it: small letters, digits and hyphens, at most 40."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower())[:40].strip("-")
        return plain if plain[:1].isalpha() else f"run-{plain}".strip("-")


class Launcher(Choice):
    """Family: where a job runs (``Torchrun``, ``Slurm``, ``Kubernetes``, ``SkyPilot``)."""

    @abstractmethod
    def file(self, job: Job) -> str:
        """Return the whole launch file of ``job``."""

    @property
    @abstractmethod
    def suffix(self) -> str:
        """What the file's name ends in."""

    @property
    @abstractmethod
    def how(self) -> str:
        """Return the command that starts it; ``FILE`` is the file."""


class Torchrun(Launcher):
    """A shell script to run by hand on each machine; nothing but torchrun is needed."""

    @property
    def suffix(self) -> str:
        return ".sh"

    @property
    def how(self) -> str:
        return "on every machine: HEAD=<name of the first machine> bash FILE"

    def file(self, job: Job) -> str:
        meeting = f"${{HEAD:?set HEAD to the name of the first machine}}:{job.port}"
        words = shell_words(job, endpoint=meeting, identity=job.label)
        alone = "HEAD=localhost\n" if job.nodes == 1 else ""
        return fill("torchrun.sh", job, torchrun=words, alone=alone)


@dataclass(frozen=True, slots=True)
class Command:
    """torchrun's ``own`` words, and those of what it ``starts``."""

    own: list[str]
    starts: list[str]

    @property
    def words(self) -> list[str]:
        """All of them."""
        return ["torchrun", *self.own, *self.starts]


def torchrun(job: Job, *, endpoint: str, identity: str, stop_s: int = 30) -> "Command":
    """Return the torchrun command line of a job.

    ``endpoint`` is ``host:port`` of the first machine, ``identity`` a name that no other job there
    has. After a signal the ranks have ``stop_s`` seconds to save, where this torch can be told.
    """
    own = {
        "nnodes": f"{job.fewest_nodes}:{job.nodes}" if job.shrinks else str(job.nodes),
        "nproc-per-node": str(job.gpus_per_node),
        "max-restarts": str(job.restarts),
        "rdzv-backend": "c10d",
        "rdzv-endpoint": endpoint,
        "rdzv-id": identity,
    }
    if "--shutdown-timeout" in get_args_parser().format_help():  # not before torch 2.12
        own["shutdown-timeout"] = str(stop_s)
    return Command([f"--{name}={value}" for name, value in own.items()], list(job.command))


def shell_words(job: Job, *, endpoint: str, identity: str, stop_s: int = 30) -> str:
    """Return the command for a shell, a word a line; its variables stay variables."""
    command = torchrun(job, endpoint=endpoint, identity=identity, stop_s=stop_s)
    lines = ["torchrun", *(_in_shell(word) for word in command.own), shlex.join(command.starts)]
    return " \\\n    ".join(lines)


def fill(template: str, job: Job, **values: object) -> str:
    """Return the template with ``@{name}`` replaced: those of the job, and ``values``."""
    own = {
        "name": job.label,
        "about": job.about or job.name,
        "nodes": job.nodes,
        "gpus": job.gpus_per_node,
        "world": job.world,
        "restarts": job.restarts,
    }
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    return _Template(text).substitute(own | values)


class _Template(string.Template):
    delimiter = "@"  # $ is the shell's


def _in_shell(word: str) -> str:
    name, _, value = word.partition("=")
    return f'{name}="{value}"' if "$" in value else word
