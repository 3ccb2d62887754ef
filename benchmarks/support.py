"""What every benchmark writes beside its numbers: machine, versions, commit, command."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores, memory and library versions."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory": memory[0].partition(":")[2].strip() if memory else "",
        "python": platform.python_version(),
        "torch": version("torch"),
        "load_before": os.getloadavg()[0],
    }


def stamped(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result with what is needed to repeat it."""
    return {
        **result,
        "machine": machine(),
        "commit": _commit(),
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON with what is needed to repeat it, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stamped(result), indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
