"""``moesaic doctor``: what this machine has, and which implementation each op takes and why."""

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moesaic.cli.shared_options import JsonOption, command_app, print_result
from moesaic.core.units import show_bytes
from moesaic.corpus.data_home import data_home
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
def doctor(*, as_json: JsonOption = False) -> None:
    """Look at the machine: cores, memory, devices, versions, and the picks of every op.

    Example: [cyan]moesaic doctor[/]
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found: dict[str, Any] = {
        "machine": _machine(),
        "versions": {name: _version(name) for name in REQUIRED_PACKAGES},
        "extras": {name: _version(name) for name in OPTIONAL_PACKAGES},
        "picks": [
            {"device": d, "op": p.operation, "takes": p.implementation, "why": p.reason}
            for d in devices
            for p in selected_kernels(d)
        ],
    }
    print_result(found, as_json=as_json, show=lambda console: _show(found, console))


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "threads wait": os.environ.get("OMP_WAIT_POLICY", "ACTIVE"),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "memory": _memory_bytes(),
        "free disk": shutil.disk_usage(".").free,
        "gpus": gpus,
        "data home": str(data_home()),
    }


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError, OSError):  # not every system tells
        return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(found: dict[str, Any], console: Console) -> None:
    machine = Table(box=None, show_header=False, title="machine", title_justify="left")
    for name, value in found["machine"].items():
        sized = name in ("memory", "free disk")
        text = show_bytes(value) if sized else ", ".join(value) if name == "gpus" else str(value)
        machine.add_row(f"[cyan]{name}[/]", text or "none")
    console.print(machine)
    versions = Table(box=None, show_header=False, title="\nversions", title_justify="left")
    for name, version in found["versions"].items():
        versions.add_row(f"[cyan]{name}[/]", version or "[red]missing[/]")
    for name, version in found["extras"].items():
        versions.add_row(
            f"[cyan]{name}[/]", version or f"[dim]not installed ({OPTIONAL_PACKAGES[name]})[/]"
        )
    console.print(versions)
    table = Table(box=None, title="\nwhat each op takes here", title_justify="left")
    for column in ("device", "op", "takes", "why"):
        table.add_column(column, style="cyan" if column == "op" else None)
    for pick in found["picks"]:
        table.add_row(pick["device"], pick["op"], pick["takes"], pick["why"])
    console.print(table)
