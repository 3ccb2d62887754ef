"""Generate: answers of a model to a batch of sources, by any search.

Letters: B sources, S source length.
"""

from collections.abc import Sequence

import torch

from moesaic.core.shapes import Int, Tensor
from moesaic.data.tokenizer import BOS, MASK, PAD, UNK
from moesaic.model.search import Greedy, Hypothesis, SearchInputs, Search
from moesaic.model.transformer import Transformer

SUPPRESSED_TOKENS = (PAD, BOS, UNK, MASK)


@torch.inference_mode()
def generate(
    model: Transformer,
    source: Int[Tensor, "B S"],
    *,
    tag: Int[Tensor, "B"],
    search: Search | None = None,
    max_tokens: int | Int[Tensor, "B"] = 128,
    suppress_tokens: Sequence[int] = SUPPRESSED_TOKENS,
) -> list[list[Hypothesis]]:
    """Decode each source (right-padded with ``PAD``), the first token forced to be ``tag``.

    A decoder-only model reads ``source`` and ``tag`` as its prompt. ``max_tokens`` is per source or
    for all, ``EOS`` included; ``forbid`` are ids that are never said. Default search: ``Greedy``.
    The answer to a source does not depend on the others in the batch (if the model drops no tokens
    in evaluation).
    """
    if not source.shape[0]:
        return []
    training = model.training
    model.eval()
    try:
        return (search or Greedy())(_search_inputs(model, source, tag, max_tokens, tuple(suppress_tokens)))
    finally:
        model.train(training)


def _search_inputs(
    model: Transformer,
    source: Tensor,
    tag: Tensor,
    max_tokens: int | Tensor,
    suppress_tokens: tuple[int, ...],
) -> SearchInputs:
    rows = torch.arange(source.shape[0], device=source.device)
    cache = model.init_cache(model.encode(source), rows)
    prompt = tag[:, None] if model.config.encoder.layers else append_tag(source, tag=tag)
    logits = model.step(prompt, cache)
    limit = torch.as_tensor(max_tokens, device=source.device).expand(source.shape[0])
    forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool, device=source.device)
    forbidden[list(suppress_tokens)] = True
    return SearchInputs(
        logits=logits,
        step=lambda ids: model.step(ids[:, None], cache),
        reorder_cache=cache.reorder,
        max_tokens=limit,
        suppressed=forbidden,
    )


def append_tag(source: Int[Tensor, "B S"], *, tag: Int[Tensor, "B"]) -> Int[Tensor, "B S1"]:
    """Put a token after the last real one of each right-padded row."""
    longer = torch.nn.functional.pad(source, (0, 1), value=PAD)
    return longer.scatter(1, (source != PAD).sum(1, keepdim=True), tag[:, None])
