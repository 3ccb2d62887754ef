"""Our side of ``decoding.py``."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from decoding_model import TAG, build
from decoding_shape import END, VOCAB, sources
from decoding_worker import serve

from moesaic.data.batch import InputRows
from moesaic.data.vocabulary import Vocabulary
from moesaic.model.beam_search import Beam, Greedy
from moesaic.model.generate import DecodingRules, generate


def main(kind: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = build(sparse=kind == "moe")
    vocabulary = Vocabulary(size=VOCAB, pad=0, bos=1, eos=END, unk=3, mask=4)
    rules = DecodingRules(vocabulary, suppress_tokens=(END,))  # no early end

    def prepare(asked: dict[str, Any]) -> Callable[[], object]:
        source = InputRows.full(torch.tensor(sources(asked["rows"])))
        prompt = InputRows.full(torch.full((asked["rows"], 1), TAG))
        search = Greedy() if asked["beam"] == 1 else Beam(size=asked["beam"])

        def run() -> None:
            found = generate(
                model,
                source,
                prompt=prompt,
                search=search,
                max_tokens=asked["tokens"],
                rules=rules,
            )
            assert all(len(best[0].ids) == asked["tokens"] for best in found)

        return run

    serve(prepare, parameters=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
