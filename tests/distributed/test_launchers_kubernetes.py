"""The Kubernetes Job and its Service have the same names, and run torchrun."""

import pytest
import yaml

from distributed.launch_jobs import JOB, assert_starts_the_job, parsed
from moesaic.core.errors import ConfigError
from moesaic.distributed.launchers import Kubernetes

HERE = Kubernetes(image='registry/"odd":1', claim="runs", namespace="train", save_s=120)


def test_the_job_and_the_service_have_the_same_names() -> None:
    service, job = yaml.safe_load_all(HERE.render(JOB))
    pod = job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["metadata"] == job["metadata"] == {"name": "my-run-1", "namespace": "train"}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == JOB.nodes
    assert pod["terminationGracePeriodSeconds"] == 120


def test_torchrun_parses_the_container_command() -> None:
    _, job = yaml.safe_load_all(HERE.render(JOB))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == HERE.image
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    arguments = parsed(container["command"])
    assert_starts_the_job(arguments, identity="my-run-1", endpoint="my-run-1-0.my-run-1:29500")
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}


def test_kubernetes_expands_no_argument_of_the_command() -> None:
    odd = JOB.replace(command=("-m", "moesaic", "train", "$(HOME)"))
    _, job = yaml.safe_load_all(HERE.render(odd))
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][-1] == "$$(HOME)"


def test_it_needs_an_image_and_a_claim() -> None:
    with pytest.raises(ConfigError, match="image: missing"):
        Kubernetes.from_dict({"kind": "Kubernetes", "claim": "runs"})
