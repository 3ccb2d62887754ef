"""SkyPilot: a managed job that is started again elsewhere when its machines are taken away."""

import json

from moesaic.dist.launchers.launcher import Job, Launcher, fill, shell_words


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
    def how(self) -> str:
        return "sky jobs launch FILE"

    def file(self, job: Job) -> str:
        words = shell_words(
            job,
            endpoint=f'$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{job.port}',
            identity="$SKYPILOT_TASK_ID",
        )
        volumes = f"volumes:\n  {json.dumps(self.shared)}: {json.dumps(self.volume)}\n"
        return fill(
            "skypilot.yaml",
            job,
            torchrun=words.replace("\n", "\n  "),
            accelerators=json.dumps(f"{self.accelerator}:{job.gpus_per_node}"),
            shared=json.dumps(self.shared),
            volumes=volumes if self.volume else "",
            setup=self.setup.replace("\n", "\n  "),
        )
