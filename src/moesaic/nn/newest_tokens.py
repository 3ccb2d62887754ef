"""Attention of the newest tokens of each row to all tokens so far: a step of decoding.

Letters: T newest tokens, H heads, G key/value heads, d head dim, e width of values.
"""

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.attention_backend import KeyValue, QueryKeyValue, pad_heads
from moesaic.nn.attention_scores import AttentionScores
from moesaic.nn.decode_slots import DecodeSlots
from moesaic.nn.decode_state import CachedKeys, KVState, WindowKVState
from moesaic.nn.packing import Packing
from moesaic.nn.softmax_attention import attend_allowed, attend_positions, attend_rows

AttentionState = KVState | WindowKVState


def attention_state(empty: KVState, scores: AttentionScores) -> AttentionState:
    """Return the state of an attention without tokens: with a window, of its newest tokens only."""
    newest = scores.mask.num_cached
    return empty if newest is None else WindowKVState(empty.key, empty.value, newest)


def store_newest(
    key: Float[Tensor, "T G d"],
    value: Float[Tensor, "T G e"],
    *,
    packing: Packing,
    slots: DecodeSlots,
    state: AttentionState,
) -> None:
    """Add the keys and values of the newest tokens to a state."""
    if isinstance(state, WindowKVState):
        new = KeyValue(pad_heads(key, packing), pad_heads(value, packing))
        _append_to_window(new, packing=packing, slots=slots, state=state)
    else:
        state.append(*(pad_heads(x, packing, sources=slots.sources) for x in (key, value)))


def attend_newest(
    heads: QueryKeyValue,
    *,
    packing: Packing,
    slots: DecodeSlots,
    state: AttentionState,
    scores: AttentionScores,
) -> Float[Tensor, "T He"]:
    """Add the newest tokens to a state, and attend from them; returns the concatenated heads.

    Where values have no channels, keys are the values too (latents).
    """
    if isinstance(state, WindowKVState):
        query, key, value = (pad_heads(each, packing) for each in heads)
        new = KeyValue(key, value)
        cached = _append_to_window(new, packing=packing, slots=slots, state=state)
        mixed = attend_positions(
            query,
            cached.keys.key,
            _values(cached.keys),
            scores=scores,
            query_position=slots.newest_positions,
            key_position=cached.position,
        )
    else:
        query, key, value = (pad_heads(each, packing, sources=slots.sources) for each in heads)
        keys = state.append(key, value)
        if slots.is_first:
            values, mask = _values(KeyValue(key, value)), packing.key_mask
            mixed = attend_rows(query, key, values, scores=scores, key_mask=mask)
        else:
            position = slots.newest_positions.reshape(slots.sources, -1)
            mixed = attend_allowed(
                query,
                keys.key,
                _values(keys),
                scores=scores,
                allowed=slots.allowed(),
                bias=scores.bias and scores.bias.at(position, slots.position),
            )
    return packing.pack(mixed.transpose(1, 2).flatten(2))


def _append_to_window(
    new: KeyValue, *, packing: Packing, slots: DecodeSlots, state: WindowKVState
) -> CachedKeys:
    count = None if packing.mask is None else packing.lengths
    return state.append(new, position=slots.newest_positions, count=count)


def _values(keys: KeyValue) -> Tensor:
    return keys.value if keys.value.shape[-1] else keys.key
