"""Kubernetes: an Indexed Job and a headless Service, which every cluster has.

PyTorchJob would need the Kubeflow operator; all it adds for us is the first pod's name, and in an
Indexed Job that is known (``NAME-0.NAME``).
"""

import json

from moesaic.dist.launchers.launcher import LaunchJob, Launcher, Seconds, fill_template, torchrun_command


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
