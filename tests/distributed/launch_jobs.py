"""The job of the launch files in these tests, and torchrun's own parser."""

import re
import shlex
from argparse import Namespace

from torch.distributed.run import get_args_parser

from moesaic.distributed.launchers import LaunchJob

COMMAND = ("-m", "moesaic", "train", "tiny", "--set", "model.moe.select=TopK(k=2)", "--set", "a=$b")
JOB = LaunchJob(name="My run_1", command=COMMAND, description="16 ranks", nodes=2, gpus_per_node=8)


def parsed(words: list[str]) -> Namespace:
    """Parse a torchrun command line with torchrun's parser; unknown options raise SystemExit."""
    assert words[0] == "torchrun"
    return get_args_parser().parse_args(words[1:])


def shell_command(text: str) -> list[str]:
    """Return the words of the torchrun command in a script, variables unchanged."""
    lines = text.replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if re.search(r"torchrun +--", line)]
    words = shlex.split(line.strip().removesuffix("&"))
    return words[words.index("torchrun") :]


def assert_starts_the_job(arguments: Namespace, *, identity: str, endpoint: str) -> None:
    """Check nodes, restarts, rendezvous and the arguments of the script."""
    assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
    assert arguments.max_restarts == 3
    assert arguments.rdzv_backend == "c10d"
    assert arguments.rdzv_endpoint == endpoint
    assert arguments.rdzv_id == identity
    assert arguments.module
    assert (arguments.training_script, *arguments.training_script_args) == COMMAND[1:]
