"""SkyPilot: a managed job that is started again elsewhere when its machines are taken away."""

import json

from moesaic.dist.launchers.launcher import LaunchJob, Launcher, fill_template, shell_command


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
