"""Triton's interpreter: kernels run on a CPU, value by value, slowly and exactly.

It is chosen by ``TRITON_INTERPRET=1`` before Triton is imported. It cannot multiply bfloat16
(``tl.dot`` gives wrong numbers without a word), so kernels are tried in float32 and float16.
"""

import importlib
import os
from typing import Any


def is_interpreted() -> bool:
    """Tell whether kernels that are imported now are interpreted."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def patch_interpreter() -> None:
    """Let loops of a kernel have bounds from memory with numpy 2.4 and later.

    The interpreter holds a number as an array of one element, which ``int`` no longer takes.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor
    if original.__name__ == "mended":
        return

    def mended(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = mended
