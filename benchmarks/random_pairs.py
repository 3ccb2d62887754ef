"""Random pairs of ids with the lengths of text, in batches of similar length, without torch."""

import random

ROWS = 64
WARM, STEPS = 4, 16
SHAPE = {"vocab": 8000, "dim": 256, "heads": 4, "hidden": 1024, "layers": 4}
SMOOTHING, LR, CLIP = 0.1, 1e-4, 1.0

Pair = tuple[list[int], list[int]]


def batches(seed: int, *, count: int = WARM + STEPS) -> list[list[Pair]]:
    """Return ``count`` batches of ``ROWS`` pairs; lengths are log-normal, 3 to 60."""
    draw = random.Random(seed)
    made = [_pair(draw) for _ in range(ROWS * count)]
    made.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    found = [made[i : i + ROWS] for i in range(0, len(made), ROWS)]
    draw.shuffle(found)
    return found


def real_tokens(found: list[list[Pair]]) -> int:
    """Tokens of both sides, padding left out."""
    return sum(len(source) + len(target) for batch in found for source, target in batch)


def _pair(draw: random.Random) -> Pair:
    length = min(60, max(3, round(draw.lognormvariate(2.6, 0.5))))
    other = max(3, round(length * draw.uniform(0.8, 1.25)))
    return _ids(draw, length), _ids(draw, other)


def _ids(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(5, SHAPE["vocab"]) for _ in range(length)]
