"""What every benchmark writes beside its numbers: machine, versions, commit, command."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from moesaic.bench.machine import commit, machine


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON with what is needed to repeat it, and print it."""
    whole = {
        **result,
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))
