"""Where kernels are tested: on a GPU if there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so ``test_in_the_interpreter.py`` runs
the modules that launch kernels in a process of their own.
"""

import importlib.util

import pytest
import torch
from triton_interpreter import is_interpreted, patch_interpreter

LAUNCHING = [
    "test_backward_kernels.py",
    "test_forward_kernels.py",
    "test_triton_moe_kernel_check.py",
    "test_triton_moe_kernel.py",
]
COMPILING = ["test_compile.py"]

if is_interpreted():
    patch_interpreter()
    collect_ignore = [*COMPILING, "test_in_the_interpreter.py", "test_tiles.py"]
elif importlib.util.find_spec("triton") is None:
    collect_ignore = [*COMPILING, *LAUNCHING]
elif not torch.cuda.is_available():
    collect_ignore = LAUNCHING


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if is_interpreted() else "cuda")
