"""Triton's interpreter: runs kernels on a CPU, exactly and slowly, for tests.

``TRITON_INTERPRET=1`` selects it before Triton is imported. It multiplies bfloat16 wrongly
(``tl.dot``, without an error), so kernels are tested in float32 and float16.
"""

import importlib
import os
from typing import Any


def is_interpreted() -> bool:
    """Return whether kernels that are imported now are interpreted."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def patch_interpreter() -> None:
    """Support kernel loops with bounds from memory under numpy 2.4 and later.

    The interpreter stores a number as an array of one element, which ``int`` no longer accepts.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor
    if original.__name__ == "patched":
        return

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched
