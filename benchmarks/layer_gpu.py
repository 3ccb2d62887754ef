"""MoE layer on one GPU: correctness, speed and memory of the kernels, and tuning of the tiles.

    python benchmarks/layer_gpu.py --out runs/layer_gpu [--seconds 480] [--scattermoe FOLDER]
    python benchmarks/layer_gpu.py --out /tmp/dry_run --dry-run    tiny, on a CPU, nothing timed

Writes ``layer_gpu.json`` after every section, so that a run cut short leaves what it found, a
``log``, and ``tuned.json``: the tile table (``ops/triton/tiles.json``) with what the tuner found
best. Sections for which no time is left say so. ScatterMoE is no dependency: name the folder that
holds its package, or it is reported as absent.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import machine_info

SECTIONS = (  # name, seconds below which it is not begun
    ("compile", 60), ("kernels", 20), ("moe_kernel", 20), ("no_wait", 5), ("graph", 10),
    ("same_bits", 5), ("table", 30), ("decode", 15), ("memory", 10), ("tune", 40),
    ("table_tuned", 25), ("decode_tuned", 10),
)  # fmt: skip


class Run:
    """A clock, a log and the results so far, written after each section."""

    def __init__(self, out: Path, *, seconds: float, dry_run: bool) -> None:
        self.out, self.seconds, self.dry_run = out, seconds, dry_run
        self.began = time.monotonic()
        self.found: dict[str, Any] = {"machine": machine_info(), "dry_run": dry_run}
        out.mkdir(parents=True, exist_ok=True)
        (out / "log").write_text("")

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.began:6.1f}s] {text}"
        print(line, flush=True)
        with (self.out / "log").open("a") as log:
            log.write(line + "\n")

    def section(self, name: str, *, least: float, work: Callable[[], Any]) -> None:
        """Run one section; an exception is recorded as its result."""
        began = time.monotonic()
        if self.left < least and not self.dry_run:
            self.found[name] = {"skipped": f"{self.left:.0f} s left, {least} s needed"}
        else:
            self.say(f"== {name}")
            try:
                self.found[name] = work()
            except Exception as error:
                self.say(traceback.format_exc())
                self.found[name] = {"error": f"{type(error).__name__}: {error}"}
        self.found.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        self.write()

    def write(self) -> None:
        part = self.out / ".part"
        part.write_text(json.dumps(self.found, indent=1) + "\n")
        part.replace(self.out / "layer_gpu.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/layer_gpu"))
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--scattermoe", type=Path, help="the folder that holds its package")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], choices=[name for name, _ in SECTIONS])
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sections = importlib.import_module("gpu_sections")
    if not (options.dry_run or sections.has_gpu()):
        print("layer_gpu: there is no GPU here; --dry-run tries the script itself on a CPU")
        return 0
    run = Run(options.out, seconds=options.seconds, dry_run=options.dry_run)
    works = sections.prepare(run, scattermoe=options.scattermoe)
    for name, least in SECTIONS:
        if not options.only or name in options.only:
            run.section(name, least=least, work=works[name])
    verdict = sections.summary(run.found)
    run.found["summary"] = verdict
    run.write()
    run.say(json.dumps(verdict, indent=1))
    return 0 if verdict["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
