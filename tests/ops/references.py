"""Reference implementations of the operations of ``ops``: unfused, by autograd."""

import torch
import torch.nn.functional as F

from moesaic.ops.counter_rng import hash_combine
from moesaic.ops.cross_entropy import TokenLoss
from moesaic.ops.grouped_gemm import expert_slices


def reference_unpermute(y, *, token, weight, groups, num_tokens):
    out = torch.zeros(num_tokens, y.shape[1], dtype=torch.float32, device=y.device)
    weighted = y.float() * weight[groups.order, None]
    return out.index_add(0, token[groups.order], weighted).to(y.dtype)


def reference_grouped_matmul(rows, *, weight, groups):
    out = rows.new_zeros(rows.shape[0], weight.shape[-1])
    for expert, span in expert_slices(groups):
        row = torch.arange(span.start, span.stop, device=out.device)
        out = out.index_copy(0, row, rows[span] @ weight[expert])
    return out


def reference_feed_forward(rows, *, weights, groups, activation):
    out = torch.zeros_like(rows)
    for e, span in expert_slices(groups):
        hidden = rows[span] @ weights.up[e]
        hidden = hidden if weights.up_bias is None else hidden + weights.up_bias[e]
        result = activation(hidden) @ weights.down[e]
        result = result if weights.down_bias is None else result + weights.down_bias[e]
        row = torch.arange(span.start, span.stop, device=out.device)
        out = out.index_copy(0, row, result)
    return out


def reference_cross_entropy(hidden, *, weight, label, label_smoothing=0.0, z_loss=0.0):
    """``(1-s) * nll + s * mean over V of -log p``, plus ``z * logsumexp^2``."""
    logits = (hidden @ weight.to(hidden.dtype).t()).float()
    total = F.cross_entropy(logits, label, label_smoothing=label_smoothing, reduction="sum")
    total = total + z_loss * logits.logsumexp(-1).square().sum()
    return TokenLoss(total, F.cross_entropy(logits.detach(), label, reduction="none"))


def reference_dropout_mask(key, *, width, rate):
    """One channel at a time: channel c reads bits 16 * (c % 4) of hash c // 4."""
    threshold = min(max(round(rate * 2**16), 1), 2**16 - 1)
    mask = torch.zeros(len(key), width, dtype=torch.bool, device=key.device)
    for channel in range(width):
        bits = hash_combine(key, torch.full_like(key, channel // 4)) >> 16 * (channel % 4)
        mask[:, channel] = (bits + 2**15) % 2**16 < threshold
    return mask


def reference_attend(query, keys, *, mask, causal):
    share = query.shape[1] // keys.key.shape[1]
    key, value = (t.repeat_interleave(share, 1) for t in (keys.key, keys.value))
    score = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        allowed = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
        mask = allowed if mask is None else mask & allowed
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf"))
    return (score.softmax(-1) @ value).transpose(1, 2).flatten(2)


def reference_attend_rows(query, key, value, *, scores, key_mask):
    """Softmax of every allowed score, one matrix of scores for each head."""
    mask, share = scores.mask, query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(share, 1) for t in (key, value))
    score = query @ key.transpose(-1, -2) * scores.scale_of(query.shape[-1])
    if scores.softcap:
        score = scores.softcap * (score / scores.softcap).tanh()
    i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    allowed = torch.ones(len(i), len(j), dtype=torch.bool)
    if mask.causal:
        allowed &= j <= i
    if mask.window:
        allowed &= (i - j).abs() < mask.window
    if mask.chunk:
        allowed &= i // mask.chunk == j // mask.chunk
    if scores.bias:
        bucket = scores.bias.buckets.of(j - i)
        score = score + F.embedding(bucket, scores.bias.table).permute(2, 0, 1)
    if key_mask is not None:  # a padded query may attend to itself: its output is not read
        allowed = (allowed & key_mask) | (i == j)
    power = score.masked_fill(~allowed, float("-inf")).exp()
    total = power.sum(-1, keepdim=True)
    if scores.sinks is not None:
        total = total + scores.sinks.exp()[:, None, None]
    return power / total @ value


def reference_decayed_scan(inputs, *, state, scale=1.0):
    """``S_t = exp(g_t) S_{t-1} + k_t v_t`` and ``o_t = scale q_t S_t``, one token at a time."""
    query, key, value, log_decay = inputs
    shared = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(shared, 2) for x in (query, key))
    out = []
    for t in range(value.shape[1]):
        added = key[:, t, :, :, None] * value[:, t, :, None]
        state = log_decay[:, t].exp()[..., None] * state + added
        out.append(scale * (query[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(out, 1), state


def reference_short_convolution(x, *, earlier, weight, bias):
    tokens, width = torch.cat([earlier, x], 1), weight.shape[1]
    sums = [(tokens[:, t : t + width] * weight.t()).sum(1) + bias for t in range(x.shape[1])]
    return F.silu(torch.stack(sums, 1))
