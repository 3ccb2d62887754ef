"""Slurm: an ``sbatch`` script that saves before its time is over and puts itself back in line."""

from typing import Annotated

from pydantic import Field, field_validator

from moesaic.core.errors import ConfigError
from moesaic.dist.launchers.launcher import LaunchJob, Launcher, Seconds, fill_template, shell_command


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

    @field_validator("more")
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
