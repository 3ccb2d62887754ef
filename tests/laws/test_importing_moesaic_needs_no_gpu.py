"""Law: every module imports on a machine without a GPU, and none starts CUDA or Triton."""

import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil, sys
import torch

def refuse(*_, **__):
    raise RuntimeError("CUDA was started by an import")

torch.cuda._lazy_init = refuse
import moesaic
kernels = "moesaic.ops.triton."  # needs Triton; ops/kernel_selection.py imports it for a GPU
names = [found.name for found in pkgutil.walk_packages(moesaic.__path__, "moesaic.")]
names = [n for n in names if not n.endswith("__main__") and not n.startswith(kernels)]
harness = [n for n in names if n.startswith("moesaic.testing")]  # brings torch._dynamo, that Triton
for name in names:
    if name not in harness:
        importlib.import_module(name)
assert "triton" not in sys.modules, "an import brought triton in"
for name in harness:
    importlib.import_module(name)
"""


def test_importing_moesaic_needs_no_gpu():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
