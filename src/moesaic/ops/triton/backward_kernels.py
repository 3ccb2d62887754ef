"""Backward kernels: down projection and activation, weight gradients, bias gradients.

With ``y = active @ down`` and ``out = sum of weight * y``, the gradient of an edge's weight is
``<grad_out, y> = <grad_out @ down.T, active>`` (SonicMoE, arXiv:2512.14080): ``y`` is not saved.
"""
# Triton checks kernels itself: they are not ordinary Python
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from moesaic.ops.triton.device_functions import (
    activation_backward,
    activation_forward,
    load_weight_tile,
    swizzled_tile,
)


@triton.jit(do_not_specialize=["tiles", "edges"])
def down_backward_kernel(
    grad, expert_weight, bias, token, order, weight, hidden,
    grad_hidden, scaled, dots, tile_expert, tile_row, offsets, tiles, edges,
    D: tl.constexpr, F: tl.constexpr, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute ``grad_hidden``, ``scaled = weight * active`` and ``dots`` from ``grad[token]``.

    ``dots[column tile, edge]`` is the column tile's part of the gradient of the edge's weight.
    """
    GATED: tl.constexpr = ACT == "swiglu"
    G: tl.constexpr = 2 * F if GATED else F
    EVEN: tl.constexpr = D % BK == 0 and F % BN == 0
    row_tile, column_tile = swizzled_tile(tl.program_id(0), tiles, tl.cdiv(F, BN), GROUP)
    expert = tl.load(tile_expert + row_tile)
    if expert < 0:
        return
    top = tl.load(tile_row + row_tile)
    r = tl.arange(0, BM)
    live = r < tl.load(offsets + expert) - top
    source = tl.load(token + top + r, mask=live, other=0).to(tl.int64)
    depth = tl.arange(0, BK)
    at = grad + source[:, None] * D + depth[None, :]
    column = column_tile * BN
    acc = tl.zeros([BM, BN], tl.float32)
    bias_dot = tl.zeros([BM], tl.float32)
    for k in range(0, D, BK):
        if D % BK == 0:
            a = tl.load(at + k)
        else:
            a = tl.load(at + k, mask=depth[None, :] < D - k, other=0.0)
        b = load_weight_tile(expert_weight, expert, column, k, F, D, BN, BK, EVEN, TMA)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if BIAS:
            more = tl.load(bias + expert * D + k + depth, mask=depth < D - k, other=0.0)
            bias_dot += tl.sum(a.to(tl.float32) * more.to(tl.float32)[None, :], 1)
    edge = tl.load(order + top + r, mask=live, other=0)
    w = tl.load(weight + edge, mask=live, other=0.0)[:, None]
    # half a tile at a time: the whole would not fit in registers
    halves = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1)
    left, right = halves.split()
    long = top.to(tl.int64)
    hidden += long * G
    grad_hidden += long * G
    scaled += long * F
    dot = _half_tile_backward(left, w, live, column, hidden, grad_hidden, scaled, F, ACT)
    dot += _half_tile_backward(
        right, w, live, column + BN // 2, hidden, grad_hidden, scaled, F, ACT
    )
    if BIAS:
        dot += tl.where(column_tile == 0, bias_dot, 0.0)
    tl.store(dots + column_tile * edges + edge, dot, mask=live)


@triton.jit
def _half_tile_backward(
    acc, w, live, column, hidden, grad_hidden, scaled, F: tl.constexpr, ACT: tl.constexpr
):
    """Store the gradient of ``hidden`` and ``w * active``; return the rows' <acc, active>."""
    GATED: tl.constexpr = ACT == "swiglu"
    G: tl.constexpr = 2 * F if GATED else F
    r = tl.arange(0, acc.shape[0])[:, None]
    c = column + tl.arange(0, acc.shape[1])[None, :]
    mask = live[:, None] & (c < F)
    gate = tl.load(hidden + r * G + c, mask=mask, other=0.0).to(tl.float32)
    value = gate
    if GATED:
        value = tl.load(hidden + F + r * G + c, mask=mask, other=0.0).to(tl.float32)
    active = activation_forward(gate, value, ACT)
    grad_gate, grad_value = activation_backward(gate, value, acc * w, ACT)
    tl.store(grad_hidden + r * G + c, grad_gate.to(grad_hidden.dtype.element_ty), mask=mask)
    if GATED:
        at_value = grad_hidden + F + r * G + c
        tl.store(at_value, grad_value.to(grad_hidden.dtype.element_ty), mask=mask)
    tl.store(scaled + r * F + c, (active * w).to(scaled.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, active * acc, 0.0), 1)


@triton.jit
def weight_gradient_kernel(
    left, right, token, offsets, out,
    P: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[e] = left[rows of e].T @ right[rows of e]``; a gathered operand is read by token."""
    TILES: tl.constexpr = tl.cdiv(P, BP) * tl.cdiv(Q, BQ)
    expert = tl.program_id(0) // TILES
    p_tile, q_tile = swizzled_tile(tl.program_id(0) % TILES, tl.cdiv(P, BP), tl.cdiv(Q, BQ), GROUP)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    p = p_tile * BP + tl.arange(0, BP)
    q = q_tile * BQ + tl.arange(0, BQ)
    acc = tl.zeros([BP, BQ], tl.float32)
    for row in range(start, end, BK):
        rows = row + tl.arange(0, BK)
        live = rows < end
        left_row = rows.to(tl.int64)
        right_row = left_row
        if GATHER_LEFT:
            left_row = tl.load(token + rows, mask=live, other=0).to(tl.int64)
        if GATHER_RIGHT:
            right_row = tl.load(token + rows, mask=live, other=0).to(tl.int64)
        # both operands are masked: a row past the segment may hold anything, NaN included
        left_mask = live[:, None] & (p[None, :] < P)
        right_mask = live[:, None] & (q[None, :] < Q)
        a = tl.load(left + left_row[:, None] * P + p[None, :], mask=left_mask, other=0.0)
        b = tl.load(right + right_row[:, None] * Q + q[None, :], mask=right_mask, other=0.0)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    at = out + expert.to(tl.int64) * (P * Q) + p[:, None] * Q + q[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(p[:, None] < P) & (q[None, :] < Q))


@triton.jit
def bias_gradient_kernel(
    rows, index, order, weight, offsets, out,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    GATHER: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """``out[e] = sum over the rows of e``, gathered by ``index`` and times the edge's weight."""
    expert = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    acc = tl.zeros([BC], tl.float32)
    while first < end:
        r = first + tl.arange(0, BR)
        live = r < end
        source = r.to(tl.int64)
        if GATHER:
            source = tl.load(index + r, mask=live, other=0).to(tl.int64)
        mask = live[:, None] & (c[None, :] < C)
        tile = tl.load(rows + source[:, None] * C + c[None, :], mask=mask, other=0.0)
        tile = tile.to(tl.float32)
        if WEIGHTED:
            edge = tl.load(order + r, mask=live, other=0)
            tile = tile * tl.load(weight + edge, mask=live, other=0.0)[:, None]
        acc += tl.sum(tile, 0)
        first += BR
    tl.store(out + expert * C + c, acc.to(out.dtype.element_ty), mask=c < C)
