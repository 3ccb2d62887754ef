"""Launcher: a job of several machines, as the file that starts it somewhere.

Every file runs the same torchrun command on each machine, with a c10d rendezvous at the first: it
starts the ranks anew after a fault, and ``--resume auto`` goes on from the last checkpoint.

Slurm: an ``sbatch`` script that saves before its time is over and puts itself back in line.

Kubernetes: an Indexed Job and a headless Service, which every cluster has.

PyTorchJob would need the Kubeflow operator; all it adds for us is the first pod's name, and in an
Indexed Job that is known (``NAME-0.NAME``).

SkyPilot: a managed job that is started again elsewhere when its machines are taken away.
"""

import json
import re
import shlex
import string
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from torch.distributed.run import get_args_parser

from moesaic.core.config import Choice, Config
from moesaic.core.errors import ConfigError

TEMPLATES = Path(__file__).parent / "templates"


Positive = Annotated[int, Field(ge=1)]


Seconds = Annotated[int, Field(ge=1)]


class LaunchJob(Config):
    """What is started: ``command`` (words after torchrun's own) on ``nodes`` machines.

    ``about`` is said at the top of the file. torchrun starts all ranks again up to ``max_restarts``
    times, and they meet at ``port`` of the first machine. With ``min_nodes`` the run goes on
    with so few machines, if the others are gone for good.
    """

    name: str
    command: tuple[str, ...]
    description: str = ""
    nodes: Positive
    gpus_per_node: Positive
    max_restarts: Annotated[int, Field(ge=0)] = 3
    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    min_nodes: Positive | None = None

    @model_validator(mode="after")
    def _check_min_nodes(self) -> Self:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ConfigError([f"fewest_nodes={self.min_nodes} must be at most nodes={self.nodes}"])
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether it may go on with fewer machines."""
        return self.min_nodes is not None and self.min_nodes < self.nodes

    @property
    def world_size(self) -> int:
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
    def render(self, job: LaunchJob) -> str:
        """Return the whole launch file of ``job``."""

    @property
    @abstractmethod
    def suffix(self) -> str:
        """What the file's name ends in."""

    @property
    @abstractmethod
    def submit_command(self) -> str:
        """Return the command that starts it; ``FILE`` is the file."""


class Torchrun(Launcher):
    """A shell script to run by hand on each machine; nothing but torchrun is needed."""

    @property
    def suffix(self) -> str:
        return ".sh"

    @property
    def submit_command(self) -> str:
        return "on every machine: HEAD=<name of the first machine> bash FILE"

    def render(self, job: LaunchJob) -> str:
        meeting = f"${{HEAD:?set HEAD to the name of the first machine}}:{job.port}"
        words = shell_command(job, rdzv_endpoint=meeting, rdzv_id=job.label)
        alone = "HEAD=localhost\n" if job.nodes == 1 else ""
        return fill_template("torchrun.sh", job, torchrun=words, alone=alone)


@dataclass(frozen=True, slots=True)
class TorchrunCommand:
    """torchrun's ``own`` words, and those of what it ``starts``."""

    torchrun_args: list[str]
    script_args: list[str]

    @property
    def words(self) -> list[str]:
        """All of them."""
        return ["torchrun", *self.torchrun_args, *self.script_args]


def torchrun_command(
    job: LaunchJob, *, rdzv_endpoint: str, rdzv_id: str, shutdown_timeout_s: int = 30
) -> "TorchrunCommand":
    """Return the torchrun command line of a job.

    ``endpoint`` is ``host:port`` of the first machine, ``identity`` a name that no other job there
    has. After a signal the ranks have ``stop_s`` seconds to save, where this torch can be told.
    """
    own = {
        "nnodes": f"{job.min_nodes}:{job.nodes}" if job.is_elastic else str(job.nodes),
        "nproc-per-node": str(job.gpus_per_node),
        "max-restarts": str(job.max_restarts),
        "rdzv-backend": "c10d",
        "rdzv-endpoint": rdzv_endpoint,
        "rdzv-id": rdzv_id,
    }
    if "--shutdown-timeout" in get_args_parser().format_help():  # not before torch 2.12
        own["shutdown-timeout"] = str(shutdown_timeout_s)
    return TorchrunCommand([f"--{name}={value}" for name, value in own.items()], list(job.command))


def shell_command(
    job: LaunchJob, *, rdzv_endpoint: str, rdzv_id: str, shutdown_timeout_s: int = 30
) -> str:
    """Return the command for a shell, a word a line; its variables stay variables."""
    command = torchrun_command(
        job, rdzv_endpoint=rdzv_endpoint, rdzv_id=rdzv_id, shutdown_timeout_s=shutdown_timeout_s
    )
    lines = [
        "torchrun",
        *(_quote_for_shell(word) for word in command.torchrun_args),
        shlex.join(command.script_args),
    ]
    return " \\\n    ".join(lines)


def fill_template(template: str, job: LaunchJob, **values: object) -> str:
    """Return the template with ``@{name}`` replaced: those of the job, and ``values``."""
    own = {
        "name": job.label,
        "about": job.description or job.name,
        "nodes": job.nodes,
        "gpus": job.gpus_per_node,
        "world": job.world_size,
        "restarts": job.max_restarts,
    }
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    return _Template(text).substitute(own | values)


class _Template(string.Template):
    delimiter = "@"  # $ is the shell's


def _quote_for_shell(word: str) -> str:
    name, _, value = word.partition("=")
    return f'{name}="{value}"' if "$" in value else word


class Slurm(Launcher):
    """``sbatch FILE``. ``save_s`` seconds before ``time`` is over the run is told to save.

    Then the job is put back in line and goes on from there, until the run is done. ``more`` holds
    further ``#SBATCH`` words, e.g. ``["--constraint=h100"]``.
    """

    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){1,2}$")] = "24:00:00"
    save_s: Seconds = 300
    partition: str = ""
    account: str = ""
    extra_options: tuple[str, ...] = ()

    @field_validator("extra_options")
    @classmethod
    def _check_extra_options(cls, more: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [word for word in more if not word.startswith("-") or "\n" in word]
        if wrong:
            raise ConfigError([f'"{wrong[0]}" is no option of sbatch: expected e.g. "--qos=long"'])
        return more

    @property
    def suffix(self) -> str:
        return ".sbatch"

    @property
    def submit_command(self) -> str:
        return "sbatch FILE"

    def render(self, job: LaunchJob) -> str:
        words = shell_command(
            job,
            rdzv_endpoint=f"$head:{job.port}",
            rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}",
            shutdown_timeout_s=max(self.save_s - 30, 1),
        )
        named = {"partition": self.partition, "account": self.account}
        options = [f"--{name}={value}" for name, value in named.items() if value]
        options += ["--no-kill"] * job.is_elastic
        more = "".join(f"#SBATCH {option}\n" for option in [*options, *self.extra_options])
        return fill_template(
            "slurm.sh",
            job,
            torchrun=words,
            time=self.time,
            save_s=self.save_s,
            more=more,
            kill=int(not job.is_elastic),
        )


class Kubernetes(Launcher):
    """``kubectl apply -f FILE``. Runs and corpora are kept on the volume claim ``claim``.

    ``image`` holds moesaic and torch. All pods must be able to mount the claim: ReadWriteMany, if
    there is more than one. A pod that is told to go has ``save_s`` seconds to save.
    """

    image: str
    claim: str
    namespace: str = "default"
    save_s: Seconds = 300
    gpu: str = "nvidia.com/gpu"

    @property
    def suffix(self) -> str:
        return ".yaml"

    @property
    def submit_command(self) -> str:
        return "kubectl apply -f FILE"

    def render(self, job: LaunchJob) -> str:
        command = torchrun_command(
            job,
            rdzv_endpoint=f"{job.label}-0.{job.label}:{job.port}",
            rdzv_id=job.label,
            shutdown_timeout_s=max(self.save_s - 30, 1),
        )
        words = [word.replace("$(", "$$(") for word in command.words]
        return fill_template(
            "kubernetes.yaml",
            job,
            words="".join(f"\n            - {json.dumps(word)}" for word in words),
            image=json.dumps(self.image),
            claim=json.dumps(self.claim),
            namespace=json.dumps(self.namespace),
            gpu=json.dumps(self.gpu),
            save_s=self.save_s,
            pod_restarts=job.nodes * max(job.max_restarts, 1),
        )


class SkyPilot(Launcher):
    """``sky jobs launch FILE``. Runs and corpora are kept in the directory ``shared``.

    It must be a file system that all machines see and that can rename (a bucket cannot): name a
    SkyPilot ``volume`` to have it mounted there. ``accelerator`` is SkyPilot's name of the GPU.
    """

    accelerator: str
    shared: str = "/shared"
    volume: str = ""
    setup: str = "pip install moesaic"

    @property
    def suffix(self) -> str:
        return ".yaml"

    @property
    def submit_command(self) -> str:
        return "sky jobs launch FILE"

    def render(self, job: LaunchJob) -> str:
        words = shell_command(
            job,
            rdzv_endpoint=f'$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{job.port}',
            rdzv_id="$SKYPILOT_TASK_ID",
        )
        volumes = f"volumes:\n  {json.dumps(self.shared)}: {json.dumps(self.volume)}\n"
        return fill_template(
            "skypilot.yaml",
            job,
            torchrun=words.replace("\n", "\n  "),
            accelerators=json.dumps(f"{self.accelerator}:{job.gpus_per_node}"),
            shared=json.dumps(self.shared),
            volumes=volumes if self.volume else "",
            setup=self.setup.replace("\n", "\n  "),
        )
