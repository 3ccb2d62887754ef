"""Family: the models of one ``model_type`` of transformers, as data."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moesaic.data.language_tag import FirstTargetToken, NoTag
from moesaic.exchange.config_mapping import ConfigMapping
from moesaic.exchange.tensor_table import (
    TensorPiece,
    TensorTable,
    match_tensors,
    our_tensors,
)
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.nn.positional_encoding import Rotary

PER_EXPERT, FUSED, DENSE, PUBLISHED = "per-expert", "fused", "dense", "published"


def _no_variants(_model: ModelConfig, /) -> TensorTable:
    return {}


@dataclass(frozen=True)
class Family:
    """How the models of a family are stored.

    ``layouts`` are the tables of tensor names, the one that the family is published in first.
    ``copies`` are names that may hold another tensor once more (tied tables), with the name of the
    other; ``derived`` are patterns of tensors that a model computes. ``rotated`` is the pattern of
    the tensors whose rows are the channels of queries and keys; ``variants`` are the rules of
    tensors that have another name in a model of this config. ``tag`` is where an encoder-decoder
    has the tags of languages; ``fairseq_rows`` is true where the ids of a SentencePiece model are
    not the rows of the table. ``transformers_note`` says what transformers computes otherwise.
    """

    model_type: str
    architecture: str
    mapping: ConfigMapping
    layouts: Mapping[str, TensorTable]
    copies: Mapping[str, str] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    rotated: str = ""
    tag: FirstTargetToken | NoTag = field(default_factory=NoTag)
    fairseq_rows: bool = False
    transformers_note: str = ""
    variants: Callable[[ModelConfig], TensorTable] = _no_variants

    def pieces(self, model: ModelConfig, *, layout: str) -> list[TensorPiece]:
        """Return the pieces of all tensors of a model, ours as targets."""
        ours = our_tensors(Transformer.without_values(model))
        pieces = match_tensors(ours, {**self.layouts[layout], **self.variants(model)})
        position, wanted = model.position, self.mapping.template.position
        if not isinstance(position, Rotary) or not isinstance(wanted, Rotary):
            return pieces
        if position.pairing == wanted.pairing:
            return pieces
        order = _channel_order(model.head_dim, rotated=position.rotated_channels(model.head_dim))
        if wanted.pairing == "halves":  # ours are neighbours
            order = sorted(range(len(order)), key=order.__getitem__)
        return [self._reorder(piece, order) for piece in pieces]

    def _reorder(self, piece: TensorPiece, order: Sequence[int]) -> TensorPiece:
        if not re.fullmatch(self.rotated, piece.source.name):
            return piece
        heads = range(0, piece.source.shape[0], len(order))
        return replace(piece, order=tuple(start + channel for start in heads for channel in order))


def _channel_order(channels: int, *, rotated: int) -> list[int]:
    """Return which neighbouring channel each one is that rotates with the one half a head away."""
    pairs = [*range(0, rotated, 2), *range(1, rotated, 2)]
    return [*pairs, *range(rotated, channels)]
