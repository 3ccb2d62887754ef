"""Our side of ``decoding.py``: the demo's mixture of experts, or a dense model of its size."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from decoding_shape import (
    DECODER,
    DENSE_HIDDEN,
    DIM,
    ENCODER,
    EXPERT_HIDDEN,
    EXPERTS,
    HEADS,
    VOCAB,
    sources,
)
from decoding_worker import serve

from moesaic.data import batch
from moesaic.data.batch import InputRows
from moesaic.data.vocabulary import Vocabulary
from moesaic.model.beam_search import Beam, Greedy
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.generate import DecodingRules, generate
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, SquaredReLU
from moesaic.nn.norm import LayerNorm


def as_input(ids: torch.Tensor) -> Any:
    """Return rows of ids as ``generate`` takes them (older commits: the tensor itself)."""
    return batch.InputRows.full(ids) if "InputRows" in vars(batch) else ids


def build(*, sparse: bool) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=DIM,
        encoder=Stack(layers=ENCODER),
        decoder=Stack(layers=DECODER),
        attention=AttentionConfig(heads=HEADS),
        feed_forward=FeedForwardConfig(
            hidden=EXPERT_HIDDEN if sparse else DENSE_HIDDEN, activation=SquaredReLU()
        ),
        moe=MoE(experts=EXPERTS, select=SwitchTop1()) if sparse else NoMoE(),
        norm=LayerNorm(),
    )
    return Transformer(config).eval()


def main(kind: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = build(sparse=kind == "moe")
    rules = DecodingRules(
        Vocabulary(model.config.vocab_size, eos=2), (0, 1, 2, 3, 4)
    )  # no early end

    def prepare(asked: dict[str, Any]) -> Callable[[], object]:
        source = as_input(torch.tensor(sources(asked["rows"])))
        prompt = InputRows.full(torch.full((asked["rows"], 1), 5))
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
