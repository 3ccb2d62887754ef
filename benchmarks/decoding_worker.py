"""One side of ``decoding.py`` as a process of its own, which decodes when it is asked to."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decoding_shape import PAUSE

Prepare = Callable[[dict[str, Any]], Callable[[], object]]


def serve(prepare: Prepare, *, parameters: int) -> None:
    """Answer requests from stdin, one JSON line each, until it closes."""
    prepared: dict[str, Callable[[], object]] = {}
    print(json.dumps({"parameters": parameters}), flush=True)
    for line in sys.stdin:
        run = prepared.get(line) or prepared.setdefault(line, prepare(json.loads(line)))
        cpu = time.process_time()
        run()
        print(json.dumps({"cpu": time.process_time() - cpu}), flush=True)


class Worker:
    """A side: ``script`` under ``python`` with its arguments, with ``source`` on its path."""

    def __init__(self, script: str, *words: str, python: str, source: Path | None = None) -> None:
        path = str(Path(__file__).parent / script)
        environment = PAUSE | ({"PYTHONPATH": str(source)} if source else {})
        self._process = subprocess.Popen(
            [python, path, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.cpu: list[float] = []  # seconds of all threads, one number a run
        self.parameters: int = self._answer()["parameters"]

    def run(self, asked: dict[str, Any]) -> None:
        """Decode once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        self.cpu.append(self._answer()["cpu"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("a side ended without an answer; its message is above")
