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
kernels = "moesaic.ops.triton."  # written in Triton; ops/choose.py brings them in, for a GPU
for found in pkgutil.walk_packages(moesaic.__path__, "moesaic."):
    if not found.name.endswith("__main__") and not found.name.startswith(kernels):
        importlib.import_module(found.name)
assert "triton" not in sys.modules, "an import brought triton in"
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
