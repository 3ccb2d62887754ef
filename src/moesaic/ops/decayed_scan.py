"""Chunked scan of linear attention with decay: the recurrence of gated linear attention and SSD.

Each head keeps a state ``S`` [K, V]: ``S_t = diag(exp(g_t)) S_{t-1} + k_t v_t``, and the output is
``o_t = q_t S_t``. With a log decay ``g`` per channel this is gated linear attention (GLA,
2312.06635), with one per head it is Mamba-2's state space duality (SSD, 2405.21060). Rows are cut
into chunks: matrix products within a chunk, the recurrence only from chunk to chunk.

No exponent is a difference of long float32 sums, so a strong decay neither overflows nor cancels:
per channel, a chunk is halved again and again, and the decay from a key to a query of the other
half is the product of two factors of at most 1 (GLA's secondary chunking, at every size). Padding
has zero keys and log decays: it adds nothing to a state and leaves it as it is.

Letters: B rows, S length, H heads, G key heads (each read by R = H / G heads), K key channels, V
value channels, E decay channels (K, or 1 per head), M chunks, C tokens of a chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Shaped, Tensor

CHUNK = 64


class ScanInputs(NamedTuple):
    """Rows of a scan, zero at padding; ``log_decay`` is at most 0."""

    query: Float[Tensor, "B S G K"]
    key: Float[Tensor, "B S G K"]
    value: Float[Tensor, "B S H V"]
    log_decay: Float[Tensor, "B S H E"]


class ScanResult(NamedTuple):
    """Outputs, and the state after the last token."""

    out: Float[Tensor, "B S H V"]
    state: Float[Tensor, "B H K V"]


class StateChange(NamedTuple):
    """What some tokens do to a state: ``S -> exp(log_decay) S + added``."""

    log_decay: Float[Tensor, "B H E"]
    added: Float[Tensor, "B H K V"]


def decayed_scan(
    inputs: ScanInputs,
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    scale: float = 1.0,
    chunk: int = CHUNK,
) -> ScanResult:
    """Scan rows from their ``state`` (None: zeros), with queries times ``scale``.

    The state is float32, or float64 where the values are. ``chunk`` is a power of two. Autograd
    saves the inputs only; backward repeats the forward pass.
    """
    return ScanResult(*_DecayedScan.apply(*inputs, state, scale, chunk))


def state_change(inputs: ScanInputs, *, chunk: int = CHUNK) -> StateChange:
    """Return what the tokens of each row do to a state; queries are not read."""
    with torch.autocast(inputs.value.device.type, enabled=False):
        cut = _cut_inputs(inputs, chunk)
        added, total = _added_by_chunk(cut), cut.log_decay.sum(3)
        states = _states(added, total, added.new_zeros(added[:, :, 0].shape))
        return StateChange(total.sum(2), states[-1])


class _DecayedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *tensors, ctx.scale, ctx.chunk = inputs
        ctx.save_for_backward(*tensors)
        return _scan(ScanInputs(*tensors[:4]), tensors[4], scale=ctx.scale, chunk=ctx.chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *rows, state = ctx.saved_tensors
        given = [x.detach().requires_grad_() for x in (*rows, *([] if state is None else [state]))]
        initial = None if state is None else given[4]
        with torch.enable_grad():
            outputs = _scan(ScanInputs(*given[:4]), initial, scale=ctx.scale, chunk=ctx.chunk)
        found = torch.autograd.grad(outputs, given, grads)
        return *found, *[None] * (7 - len(found))


def _scan(
    inputs: ScanInputs, state: Tensor | None, *, scale: float, chunk: int
) -> tuple[Tensor, Tensor]:
    value = inputs.value
    with torch.autocast(value.device.type, enabled=False):
        if state is None:
            sizes = (value.shape[0], value.shape[2], inputs.key.shape[3], value.shape[3])
            state = value.new_zeros(sizes, dtype=state_dtype(value))
        if value.shape[1] == 1:
            return _one_token(inputs, state, scale)
        cut = _cut_inputs(inputs, chunk)
        cut = cut._replace(query=cut.query * scale)
        states = _states(_added_by_chunk(cut), cut.log_decay.sum(3), state)
        within = _within_heads(cut) if inputs.log_decay.shape[-1] == 1 else _within_channels(cut)
        out = within + _from_state(cut, torch.stack(states[:-1], 2))
        rows = out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : value.shape[1]]
        return rows.to(value.dtype).contiguous(), states[-1]


def state_dtype(value: Shaped[Tensor, "*N"]) -> torch.dtype:
    """Return the dtype of a state of such values: float32, or float64 as they are."""
    return torch.promote_types(value.dtype, torch.float32)


def _one_token(inputs: ScanInputs, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Do one step of the recurrence."""
    query, key, value, decay = (x[:, 0].to(state.dtype) for x in inputs)
    shared = value.shape[1] // key.shape[1]
    query, key = (x.repeat_interleave(shared, 1) for x in (query, key))
    state = torch.addcmul(decay.exp()[..., None] * state, key[..., None], value[:, :, None])
    out = (query[:, :, None] * scale) @ state
    return out.transpose(1, 2).to(inputs.value.dtype), state


def _cut_inputs(inputs: ScanInputs, chunk: int) -> ScanInputs:
    """Return the inputs as [B, heads, M, C, channels]; the last chunk is padded with zeros."""
    assert chunk & (chunk - 1) == 0, "a chunk is halved down to one token"
    length, dtype = inputs.value.shape[1], state_dtype(inputs.value)
    size = min(chunk, 1 << max(length - 1, 0).bit_length())
    padded = (F.pad(x.to(dtype), (0, 0, 0, 0, 0, -length % size)) for x in inputs)
    return ScanInputs(*(x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4) for x in padded))


def _added_by_chunk(cut: ScanInputs) -> Float[Tensor, "B H M K V"]:
    """Return what each chunk adds to the state: keys times values, with the decay after them."""
    later = F.pad(cut.log_decay[..., 1:, :], (0, 0, 0, 1))
    weight = later.flip(-2).cumsum(-2).flip(-2).exp()
    if weight.shape[-1] == 1:
        weighted = _by_key_head(weight * cut.value, cut)
        return (cut.key.transpose(-1, -2)[:, :, None] @ weighted).flatten(1, 2)
    return (_by_head(cut.key, cut) * weight).transpose(-1, -2) @ cut.value


def _states(added: Tensor, total: Tensor, initial: Tensor) -> list[Float[Tensor, "B H K V"]]:
    """Return the state before each chunk, and after the last."""
    states, decay = [initial], total.exp()[..., None]
    for chunk_added, chunk_decay in zip(added.unbind(2), decay.unbind(2), strict=True):
        states.append(torch.addcmul(chunk_added, chunk_decay, states[-1]))
    return states


def _from_state(cut: ScanInputs, states: Float[Tensor, "B H M K V"]) -> Float[Tensor, "B H M C V"]:
    """Return what the queries read of the state at the start of their chunk."""
    weight = cut.log_decay.cumsum(-2).exp()
    if weight.shape[-1] == 1:
        return (cut.query[:, :, None] @ _by_key_head(states, cut)).flatten(1, 2) * weight
    return (_by_head(cut.query, cut) * weight) @ states


def _within_heads(cut: ScanInputs) -> Float[Tensor, "B H M C V"]:
    """Return what the queries read of their own chunk, with one decay per head.

    The scores of a key head are computed once. Sums are subtracted in float64, which keeps a weak
    decay exact after a strong one.
    """
    upto = cut.log_decay[..., 0].double().cumsum(-1)
    log_weight = (upto[..., :, None] - upto[..., None, :]).to(cut.value.dtype)
    future = torch.ones(log_weight.shape[-2:], dtype=torch.bool, device=upto.device).triu(1)
    weight = log_weight.masked_fill(future, float("-inf")).exp()
    scores = (cut.query @ cut.key.transpose(-1, -2))[:, :, None]
    return (_by_key_head(weight, cut) * scores).flatten(1, 2) @ cut.value


def _within_channels(cut: ScanInputs) -> Float[Tensor, "B H M C V"]:
    """Return what the queries read of their own chunk, with one decay per channel.

    Blocks of 1, 2, 4, ... tokens are paired: the queries of the second read the keys of the first.
    ``upto`` is the log decay from the start of a block to a token (included), ``after`` that from a
    token (excluded) to the end of the block.
    """
    query, key, value = _by_head(cut.query, cut), _by_head(cut.key, cut), cut.value
    out = (query * key).sum(-1, keepdim=True) * value
    upto, after = cut.log_decay, torch.zeros_like(cut.log_decay)
    size = 1
    while size < value.shape[-2]:
        early_upto, late_upto = _halves(upto, size)
        early_after, late_after = _halves(after, size)
        late_query = _halves(query, size)[1] * late_upto.exp()
        early_key = _halves(key, size)[0] * early_after.exp()
        early_out, late_out = _halves(out, size)
        read = (late_query @ early_key.mT) @ _halves(value, size)[0]
        out = _join_halves(early_out, late_out + read)
        after = _join_halves(early_after + late_upto[..., -1:, :], late_after)
        upto = _join_halves(early_upto, late_upto + early_upto[..., -1:, :])
        size *= 2
    return out


def _halves(x: Float[Tensor, "B H M C N"], size: int) -> tuple[Tensor, ...]:
    """Return the first and the second block of ``size`` tokens of each pair of blocks."""
    return x.unflatten(-2, (-1, 2, size)).unbind(-3)


def _join_halves(early: Tensor, late: Tensor) -> Float[Tensor, "B H M C N"]:
    return torch.stack([early, late], -3).flatten(-4, -2)


def _by_head(x: Float[Tensor, "B G M C K"], cut: ScanInputs) -> Float[Tensor, "B H M C K"]:
    """Repeat key heads for the heads that read them."""
    shared = cut.value.shape[1] // x.shape[1]
    return x if shared == 1 else x.repeat_interleave(shared, 1)


def _by_key_head(x: Float[Tensor, "B H *N"], cut: ScanInputs) -> Float[Tensor, "B G R *N"]:
    return x.unflatten(1, (cut.key.shape[1], -1))
