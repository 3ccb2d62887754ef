"""What every benchmark writes beside its numbers: machine, versions, commit, command."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from moesaic.bench.machine_info import git_commit, machine_info


def stamped(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result with what is needed to repeat it."""
    return {
        **result,
        "machine": machine_info(),
        "commit": git_commit(),
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON with what is needed to repeat it, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stamped(result), indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))
