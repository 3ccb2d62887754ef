"""Generation: decode a batch of sources with a search (``model/beam_search.py``).

Letters: B sources, S source length.
"""

from dataclasses import dataclass

import torch

from moesaic.core.errors import CheckpointError, DataError
from moesaic.core.shapes import Int, Tensor
from moesaic.data.batch import InputRows
from moesaic.data.vocabulary import Vocabulary
from moesaic.model.beam_search import (
    Greedy,
    Hypothesis,
    LogitsProcessor,
    NonFiniteLogitsError,
    Observer,
    Search,
    SearchInputs,
)
from moesaic.model.transformer import Transformer
from moesaic.model.weights import describe_nonfinite


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """What ends an answer and what is never in it, and changes to log-probabilities.

    ``vocabulary`` has the end and the ids that are no text, ``suppress_tokens`` are further ones.
    ``row_key`` and ``observer`` are those of ``SearchInputs``.
    """

    vocabulary: Vocabulary
    suppress_tokens: tuple[int, ...] = ()
    processors: tuple[LogitsProcessor, ...] = ()
    row_key: Int[Tensor, "B"] | None = None
    observer: Observer | None = None

    def suppressed(self, rows: int) -> tuple[int, ...]:
        """Return the ids that are never generated, of a model with so many rows of embeddings."""
        without_token = range(self.vocabulary.size, rows)
        return (*self.vocabulary.suppressed, *self.suppress_tokens, *without_token)


@torch.inference_mode()
def generate(
    model: Transformer,
    source: InputRows,
    *,
    prompt: InputRows,
    rules: DecodingRules,
    search: Search | None = None,
    max_tokens: int | Int[Tensor, "B"] = 128,
) -> list[list[Hypothesis]]:
    """Decode each source, from a prompt of at least one token in the decoder.

    A decoder-only model reads the prompt alone; its sources are empty rows. ``max_tokens`` is per
    source or for all, the end included; it is lowered to the positions that the model has. Default
    search: ``Greedy``. The answer to a source does not depend on the others in the batch (if the
    model drops no tokens in evaluation).

    Raises DataError if a source has no room for an answer in the model's positions, and
    CheckpointError if weights or logits are NaN or infinite.
    """
    if not source.rows:
        return []
    training = model.training
    model.eval()
    try:
        limit = torch.as_tensor(max_tokens, device=source.device).expand(source.rows)
        limit = _within_positions(limit, model=model, source=source, prompt=prompt)
        cache = model.init_cache(model.encode(source), rows=source.rows)
        logits = model.step(prompt, cache)
        inputs = SearchInputs(
            logits=logits,
            step=lambda ids: model.step(InputRows.full(ids[:, None]), cache),
            reorder_cache=cache.reorder,
            max_tokens=limit,
            suppressed=torch.tensor(
                rules.suppressed(logits.shape[-1]), dtype=torch.long, device=source.device
            ),
            ends=rules.vocabulary.ends,
            processors=rules.processors,
            row_key=rules.row_key,
            observer=rules.observer,
        )
        return (search or Greedy())(inputs)
    except (NonFiniteLogitsError, IndexError, ValueError, RuntimeError) as error:
        # a router may fail on NaN before any logits are computed
        found = describe_nonfinite(model)
        if found:
            raise CheckpointError(f"the model's weights hold {found}") from error
        raise
    finally:
        model.train(training)


def _within_positions(
    max_tokens: Int[Tensor, "B"], *, model: Transformer, source: InputRows, prompt: InputRows
) -> Int[Tensor, "B"]:
    """Lower the limits to the positions that a model with learned positions has."""
    most = model.position.max_positions
    if most is None:
        return max_tokens
    width = max(source.width if model.config.encoder.layers else 0, prompt.width)
    if width > most:
        raise DataError(
            f"a source of {width} tokens, but the model has learned {most} positions: expected a "
            "shorter text"
        )
    return max_tokens.minimum(most + 1 - prompt.lengths)
