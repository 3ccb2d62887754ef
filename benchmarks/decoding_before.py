"""Our side of ``decoding.py`` for commits before 2026-11-29, whose ``generate`` takes tensors."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from decoding_model import TAG, build
from decoding_shape import END, sources
from decoding_worker import serve

from moesaic.model.beam_search import Beam, Greedy
from moesaic.model.generate import SUPPRESSED_TOKENS, DecodingRules, generate


def main(kind: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = build(sparse=kind == "moe")
    rules = DecodingRules(suppress_tokens=(*SUPPRESSED_TOKENS, END))  # no early end

    def prepare(asked: dict[str, Any]) -> Callable[[], object]:
        source = torch.tensor(sources(asked["rows"]))
        tag = torch.full((asked["rows"],), TAG)
        search = Greedy() if asked["beam"] == 1 else Beam(size=asked["beam"])
        limit = asked["tokens"]
        return lambda: generate(
            model, source, tag=tag, search=search, max_tokens=limit, rules=rules
        )

    serve(prepare, parameters=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
