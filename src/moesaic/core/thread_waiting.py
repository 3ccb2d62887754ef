"""How idle threads of OpenMP wait: asleep, so that other programs of the machine get the cores.

Threads that spin make a training step several times slower where another program uses the cores
(docs/log.md). OpenMP reads the setting once, when torch is first imported.
"""

import os
import sys

_VARIABLE = "OMP_WAIT_POLICY"
_TORCH_CAME_FIRST = "torch" in sys.modules and _VARIABLE not in os.environ


def wait_asleep() -> None:
    """Let idle threads sleep, unless the user chose. Called when moesaic is first imported."""
    os.environ.setdefault(_VARIABLE, "PASSIVE")  # of this process, or of those that it starts


def waiting_advice() -> str:
    """Return what to do where threads spin because torch was imported before moesaic, or ""."""
    if not _TORCH_CAME_FIRST:
        return ""
    return (
        "torch was imported before moesaic, so idle threads spin: where other programs use the "
        f"cores, training is several times faster with `import moesaic` first, or with {_VARIABLE}="
        "PASSIVE in the environment"
    )
