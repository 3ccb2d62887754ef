"""Import and export of a large checkpoint: seconds, and the peak of memory under a limit.

A directory of transformers is generated (``sparse_checkpoint.py``), imported and exported again,
each in a process whose data may take 2 GiB (RLIMIT_DATA). The gauge is RssAnon, memory that no file
backs, sampled every 5 ms; what the process has before it begins is taken off. Holes are read
as zeros, so that reading costs no disk; writing does. The 20 GB of the default need 42 GB free:

    python benchmarks/import_large.py --folder /tmp/large
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sparse_checkpoint import write_sparse_checkpoint
from support import write_result

from moesaic.exchange.export_model import export_model
from moesaic.exchange.import_model import import_model

GIB = 2**30
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
SMALL = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 4096}


class Gauge(threading.Thread):
    """Samples the anonymous memory of this process, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = anonymous_bytes()
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def stop(self) -> int:
        self._end.set()
        return self.peak - self.start_bytes


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def child(what: str, source: Path, out: Path, layout: str, limit: int) -> None:
    """Import or export in this process, with its data limited, and print the measures."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    gauge = Gauge()
    gauge.start()
    start = time.perf_counter()
    if what == "import":
        import_model(source, out=out)
    else:
        export_model(source, out=out, layout=layout)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_bytes": gauge.stop()}))


def measure(what: str, source: Path, out: Path, *, layout: str, limit: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, str(source), str(out), layout, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def import_and_export(
    folder: Path, config: dict[str, Any], *, layout: str, limit: int
) -> dict[str, Any]:
    """Return what the checkpoint is, and seconds and peaks; nothing stays on the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        about = write_sparse_checkpoint(folder / "theirs", config, layout=layout)
        found = {
            "import": measure(
                "import", folder / "theirs", folder / "ours", layout=layout, limit=limit
            ),
            "export": measure(
                "export", folder / "ours", folder / "again", layout=layout, limit=limit
            ),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for part in found.values():
        part["peak_over_largest_tensor"] = part["peak_bytes"] / about["largest_tensor"]
    return {"layout": layout, "limit_bytes": limit, **about, **found}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        what, source, out, layout, limit = sys.argv[2:]
        child(what, Path(source), Path(out), layout, int(limit))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="is emptied and removed")
    parser.add_argument("--layers", type=int, default=7, help="of Mixtral's 32: 2.8 GB each")
    parser.add_argument("--layouts", nargs="+", default=["per-expert", "fused"])
    parser.add_argument("--small", action="store_true", help="of narrow layers: 50 MB each")
    default = Path(__file__).parent / "results" / "import_large.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    config = MIXTRAL | (SMALL if options.small else {}) | {"num_hidden_layers": options.layers}
    rows = [
        import_and_export(options.folder, config, layout=layout, limit=2 * GIB)
        for layout in options.layouts
    ]
    result = {"question": "seconds and peak memory of import and export", "measured": rows}
    write_result(options.out, result)


if __name__ == "__main__":
    main()
