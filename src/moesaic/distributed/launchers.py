"""Job launchers: the file that starts a multi-node run under torchrun, Slurm, Kubernetes or
SkyPilot.

Every file runs the same torchrun command on each node, with a c10d rendezvous at the first:
torchrun restarts the ranks after a fault, and ``--resume auto`` continues from the last checkpoint.
"""

import json
import re
import shlex
import string
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from torch.distributed.run import get_args_parser

from moesaic.core.config import Choice, Config
from moesaic.core.errors import ConfigError

TEMPLATES = Path(__file__).parent / "launch_templates"
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[int, Field(ge=1)]


class LaunchJob(Config):
    """A multi-node job: ``command`` (the arguments after torchrun's own) on ``nodes`` nodes.

    ``description`` is the comment at the top of the file. torchrun restarts all ranks up to
    ``max_restarts`` times; their rendezvous is ``port`` of the first node. With ``min_nodes`` the
    run continues on as few nodes, if the others do not come back.
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
            raise ConfigError([f"min_nodes={self.min_nodes} must be at most nodes={self.nodes}"])
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether it may continue on fewer nodes."""
        return self.min_nodes is not None and self.min_nodes < self.nodes

    @property
    def world_size(self) -> int:
        """The number of ranks: one per GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def label(self) -> str:
        """The name that every system accepts: lower-case letters, digits, hyphens, at most 40."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower())[:40].strip("-")
        return plain if plain[:1].isalpha() else f"run-{plain}".strip("-")


class Launcher(Choice):
    """Family: the system that runs a job (``Torchrun``, ``Slurm``, ``Kubernetes``, ``SkyPilot``).

    ``suffix`` is that of the file's name, ``submit_command`` starts it (``FILE`` is the file).
    """

    suffix: ClassVar[str]
    submit_command: ClassVar[str]

    @abstractmethod
    def render(self, job: LaunchJob) -> str:
        """Return the launch file of ``job``."""


class Torchrun(Launcher):
    """``bash FILE`` on every node, by hand; it needs nothing but torchrun."""

    suffix: ClassVar[str] = ".sh"
    submit_command: ClassVar[str] = "on every node: HEAD=<name of the first node> bash FILE"

    def render(self, job: LaunchJob) -> str:
        endpoint = f"${{HEAD:?set HEAD to the name of the first node}}:{job.port}"
        command = torchrun_command(job, rdzv_endpoint=endpoint, rdzv_id=job.label)
        head = "HEAD=localhost\n" if job.nodes == 1 else ""
        return fill_template("torchrun.sh", job, torchrun=command.to_shell(), alone=head)


@dataclass(frozen=True, slots=True)
class TorchrunCommand:
    """A torchrun command line: torchrun's arguments, and those of the script that it starts."""

    torchrun_args: list[str]
    script_args: list[str]

    @property
    def words(self) -> list[str]:
        return ["torchrun", *self.torchrun_args, *self.script_args]

    def to_shell(self) -> str:
        """Return the command for a shell, one argument a line; its variables are expanded there."""
        arguments = (_quote_for_shell(word) for word in self.torchrun_args)
        return " \\\n    ".join(["torchrun", *arguments, shlex.join(self.script_args)])


def torchrun_command(
    job: LaunchJob, *, rdzv_endpoint: str, rdzv_id: str, shutdown_timeout_s: int = 30
) -> "TorchrunCommand":
    """Return the torchrun command line of a job.

    ``rdzv_endpoint`` is ``host:port`` of the first node, ``rdzv_id`` unique among jobs there. After
    a signal the ranks have ``shutdown_timeout_s`` seconds to save, where this torch has the option.
    """
    arguments = {
        "nnodes": f"{job.min_nodes}:{job.nodes}" if job.is_elastic else str(job.nodes),
        "nproc-per-node": str(job.gpus_per_node),
        "max-restarts": str(job.max_restarts),
        "rdzv-backend": "c10d",
        "rdzv-endpoint": rdzv_endpoint,
        "rdzv-id": rdzv_id,
    }
    if "--shutdown-timeout" in get_args_parser().format_help():  # not before torch 2.12
        arguments["shutdown-timeout"] = str(shutdown_timeout_s)
    return TorchrunCommand(
        [f"--{name}={value}" for name, value in arguments.items()], list(job.command)
    )


def fill_template(template: str, job: LaunchJob, **values: object) -> str:
    """Return the template with ``@{name}`` replaced by values of the job and by ``values``."""
    job_values = {
        "name": job.label,
        "about": job.description or job.name,
        "nodes": job.nodes,
        "gpus": job.gpus_per_node,
        "world": job.world_size,
        "restarts": job.max_restarts,
    }
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    return _Template(text).substitute(job_values | values)


class _Template(string.Template):
    delimiter = "@"  # $ is the shell's


def _quote_for_shell(word: str) -> str:
    name, _, value = word.partition("=")
    return f'{name}="{value}"' if "$" in value else word


class Slurm(Launcher):
    """``sbatch FILE``. ``save_s`` seconds before ``time`` is over the run gets a signal to save.

    Then the job is requeued and continues from the checkpoint, until the run is finished.
    ``extra_options`` holds further ``#SBATCH`` options, e.g. ``["--constraint=h100"]``.
    """

    suffix: ClassVar[str] = ".sbatch"
    submit_command: ClassVar[str] = "sbatch FILE"
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){1,2}$")] = "24:00:00"
    save_s: Seconds = 300
    partition: str = ""
    account: str = ""
    extra_options: tuple[str, ...] = ()

    @field_validator("extra_options")
    @classmethod
    def _check_extra_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [option for option in options if not option.startswith("-") or "\n" in option]
        if wrong:
            raise ConfigError([f'"{wrong[0]}" is no option of sbatch: expected e.g. "--qos=long"'])
        return options

    def render(self, job: LaunchJob) -> str:
        command = torchrun_command(
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
            torchrun=command.to_shell(),
            time=self.time,
            save_s=self.save_s,
            more=more,
            kill=int(not job.is_elastic),
        )


class Kubernetes(Launcher):
    """``kubectl apply -f FILE``: an Indexed Job and a headless Service, which every cluster has.

    PyTorchJob would need the Kubeflow operator; all that it adds is the name of the first pod,
    which is known in an Indexed Job (``NAME-0.NAME``). Runs and corpora are stored on the volume
    claim ``claim``; all pods must be able to mount it (ReadWriteMany, if there is more than one).
    ``image`` contains moesaic and torch. A pod that is terminated has ``save_s`` seconds to save.
    """

    suffix: ClassVar[str] = ".yaml"
    submit_command: ClassVar[str] = "kubectl apply -f FILE"
    image: str
    claim: str
    namespace: str = "default"
    save_s: Seconds = 300
    gpu: str = "nvidia.com/gpu"

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
    """``sky jobs launch FILE``: a managed job, restarted elsewhere when its machines are preempted.

    Runs and corpora are stored in the directory ``shared``. It must be a file system that all nodes
    mount and that can rename (a bucket cannot): name a SkyPilot ``volume`` to have it mounted
    there. ``accelerator`` is SkyPilot's name of the GPU.
    """

    suffix: ClassVar[str] = ".yaml"
    submit_command: ClassVar[str] = "sky jobs launch FILE"
    accelerator: str
    shared: str = "/shared"
    volume: str = ""
    setup: str = "pip install moesaic"

    def render(self, job: LaunchJob) -> str:
        command = torchrun_command(
            job,
            rdzv_endpoint=f'$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{job.port}',
            rdzv_id="$SKYPILOT_TASK_ID",
        )
        volumes = f"volumes:\n  {json.dumps(self.shared)}: {json.dumps(self.volume)}\n"
        return fill_template(
            "skypilot.yaml",
            job,
            torchrun=command.to_shell().replace("\n", "\n  "),
            accelerators=json.dumps(f"{self.accelerator}:{job.gpus_per_node}"),
            shared=json.dumps(self.shared),
            volumes=volumes if self.volume else "",
            setup=self.setup.replace("\n", "\n  "),
        )
