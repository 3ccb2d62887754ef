"""The models of ``decoding.py``: what each side builds, and the sources that all decode."""

import os
import random
from typing import Any

VOCAB, DIM, HEADS, ENCODER, DECODER = 2048, 128, 4, 3, 2
EXPERTS, EXPERT_HIDDEN = 8, 256  # the demo's: 2M parameters, 1M of them active for a token
DENSE_HIDDEN = 976  # a dense model of the same number of parameters
SOURCE = 24  # tokens of each source, without padding on any side
START, END = 1, 2  # ids of the first target token and of the end
PAUSE = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait leave the core


def sources(rows: int) -> list[list[int]]:
    """Return sources of ordinary ids, equal on every side."""
    draw = random.Random(0)
    return [[draw.randrange(16, VOCAB) for _ in range(SOURCE)] for _ in range(rows)]


def request(rows: int, *, beam: int, tokens: int) -> dict[str, Any]:
    """Return what a side is asked for: ``tokens`` new tokens for each of ``rows`` sources."""
    return {"rows": rows, "beam": beam, "tokens": tokens}
