"""``moesaic doctor``: hardware, versions, and the selected implementation of each op."""

import importlib.metadata
import os
import platform
import shutil
from typing import Any

from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import Result, command_app, print_table
from moesaic.cli.styled_text import cyan, styled

with deferred():
    import torch

    from moesaic.core.thread_waiting import waiting_advice
    from moesaic.core.units import show_bytes
    from moesaic.corpus.data_home import find_data_home
    from moesaic.ops.kernel_selection import selected_kernels

app = command_app()
REQUIRED_PACKAGES = (
    "torch",
    "numpy",
    "tokenizers",
    "safetensors",
    "sacrebleu",
    "pydantic",
    "typer",
    "rich",
)
OPTIONAL_PACKAGES = {
    "tensorboard": "tb: metrics as TensorBoard files",
    "py3langid": "lid: off-target rate by language identification",
    "triton": "GPU kernels",
}


@app.command()
def doctor() -> Result:
    """Show cores, memory, devices, versions, and which kernel each op uses and why.

    Example: [cyan]moesaic doctor[/]
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found: dict[str, Any] = {
        "machine": _machine(),
        "versions": {name: _version(name) for name in REQUIRED_PACKAGES},
        "extras": {name: _version(name) for name in OPTIONAL_PACKAGES},
        "kernels": [
            {
                "device": device,
                "op": kernel.operation,
                "implementation": kernel.implementation,
                "reason": kernel.reason,
            }
            for device in devices
            for kernel in selected_kernels(device)
        ],
    }
    return Result(found, lambda console: _show(found, console))


def _machine() -> dict[str, Any]:
    home = find_data_home()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "threads wait": waiting_advice() or os.environ.get("OMP_WAIT_POLICY", "ACTIVE"),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "memory": _memory_bytes(),
        "free disk": shutil.disk_usage(".").free,
        "gpus": gpus,
        "data home": f"{home.path} ({home.reason})",
    }


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError, OSError):  # not available on every system
        return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(found: dict[str, Any], console: Console) -> None:
    sizes = ("memory", "free disk")
    print_table(
        console,
        ("", ""),
        (
            (
                cyan(name),
                show_bytes(value) if name in sizes else _join(value),
            )
            for name, value in found["machine"].items()
        ),
        title="machine",
        align="ll",
    )
    versions = [
        (n, version or styled("[red]missing[/]")) for n, version in found["versions"].items()
    ]
    versions += [
        (n, version or styled("[dim]not installed ({extra})[/]", extra=OPTIONAL_PACKAGES[n]))
        for n, version in found["extras"].items()
    ]
    rows = ((cyan(name), version) for name, version in versions)
    print_table(console, ("", ""), rows, title="\nversions", align="ll")
    print_table(
        console,
        ("device", "op", "implementation", "reason"),
        ((p["device"], cyan(p["op"]), p["implementation"], p["reason"]) for p in found["kernels"]),
        title="\nimplementation of each op",
        align="llll",
    )


def _join(value: Any) -> str:
    return (", ".join(value) if isinstance(value, list) else str(value)) or "none"
