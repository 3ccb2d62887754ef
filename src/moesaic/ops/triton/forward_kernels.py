"""Forward kernels: tile schedule, fused gather + up projection + activation, row matmul, unpermute.

Rows are sorted by expert; a tile never spans two experts. The number of tiles is on the device
only: a grid has the largest possible number of programs, and those without a tile return.
"""
# Triton checks kernels itself: they are not ordinary Python
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from moesaic.ops.triton.device_functions import activation_forward, load_weight_tile, swizzled_tile


@triton.jit(do_not_specialize=["tiles"])
def tile_schedule_kernel(
    offsets, tile_expert, tile_row, tiles,
    E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program e writes the tiles of expert e; program E writes -1 for unused tiles."""
    program = tl.program_id(0)
    e = tl.arange(0, EP)
    end = tl.load(offsets + e, mask=e < E, other=0)
    start = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles_of = tl.where(e < E, (end - start + BM - 1) // BM, 0)
    first = tl.sum(tl.where(e < program, tiles_of, 0), 0)
    count = tl.sum(tl.where(e == program, tiles_of, 0), 0)
    count = tl.where(program == E, tiles - first, count)
    row = tl.sum(tl.where(e == program, start, 0), 0)
    done = 0
    while done < count:
        i = done + tl.arange(0, BLOCK)
        expert = tl.where(program == E, -1, program) + tl.zeros([BLOCK], tl.int32)
        tl.store(tile_expert + first + i, expert, mask=i < count)
        tl.store(tile_row + first + i, row + i * BM, mask=i < count)
        done += BLOCK


@triton.jit(do_not_specialize=["tiles"])
def up_projection_kernel(
    x, expert_weight, bias, token, hidden, active, tile_expert, tile_row, offsets, tiles,
    D: tl.constexpr, F: tl.constexpr, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SAVE_HIDDEN: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``active = act(x[token] @ expert_weight[e] + bias[e])`` and ``hidden`` if SAVE_HIDDEN."""
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
    # rows past the segment read token 0: their results are not stored, so loads need no mask
    source = tl.load(token + top + r, mask=live, other=0).to(tl.int64)
    depth = tl.arange(0, BK)
    at = x + source[:, None] * D + depth[None, :]
    column = column_tile * BN
    gate = tl.zeros([BM, BN], tl.float32)
    value = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        if D % BK == 0:
            a = tl.load(at + k)
        else:
            a = tl.load(at + k, mask=depth[None, :] < D - k, other=0.0)
        b = load_weight_tile(expert_weight, expert, k, column, D, G, BK, BN, EVEN, TMA)
        gate = tl.dot(a, b, gate, input_precision=PRECISION)
        if GATED:
            b = load_weight_tile(expert_weight, expert, k, F + column, D, G, BK, BN, EVEN, TMA)
            value = tl.dot(a, b, value, input_precision=PRECISION)
    columns = column + tl.arange(0, BN)
    inside = columns < F
    if BIAS:
        at_bias = bias + expert * G + columns
        gate += tl.load(at_bias, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            value += tl.load(at_bias + F, mask=inside, other=0.0).to(tl.float32)[None, :]
    # rounded as it is saved, so that backward recomputes the same activation
    rounded_gate = gate.to(active.dtype.element_ty)
    rounded_value = value.to(active.dtype.element_ty)
    mask = live[:, None] & inside[None, :]
    # a long offset to the tile and short ones inside it: half the registers of long ones
    if SAVE_HIDDEN:
        at_hidden = hidden + top.to(tl.int64) * G + r[:, None] * G + columns[None, :]
        tl.store(at_hidden, rounded_gate, mask=mask)
        if GATED:
            tl.store(at_hidden + F, rounded_value, mask=mask)
    out = activation_forward(rounded_gate.to(tl.float32), rounded_value.to(tl.float32), ACT)
    at_active = active + top.to(tl.int64) * F + r[:, None] * F + columns[None, :]
    tl.store(at_active, out.to(active.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def row_matmul_kernel(
    left, expert_weight, bias, out, tile_expert, tile_row, offsets, tiles, first,
    P: tl.constexpr, Q: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out = left @ expert_weight[e] + bias[e]`` for WIDTH of the Q columns, from ``first`` on.

    ``left`` is [N, P]; ``expert_weight`` is [E, P, Q], or its transpose [E, Q, P] if TRANSPOSED.
    """
    EVEN: tl.constexpr = P % BK == 0 and WIDTH % BN == 0
    row_tile, column_tile = swizzled_tile(tl.program_id(0), tiles, tl.cdiv(WIDTH, BN), GROUP)
    expert = tl.load(tile_expert + row_tile)
    if expert < 0:
        return
    top = tl.load(tile_row + row_tile)
    r = tl.arange(0, BM)
    count = tl.load(offsets + expert) - top
    depth = tl.arange(0, BK)
    at = left + top.to(tl.int64) * P + tl.minimum(r, count - 1)[:, None] * P + depth[None, :]
    column = column_tile * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, P, BK):
        if P % BK == 0:
            a = tl.load(at + k)
        else:
            a = tl.load(at + k, mask=depth[None, :] < P - k, other=0.0)
        if TRANSPOSED:
            b = load_weight_tile(
                expert_weight, expert, first + column, k, Q, P, BN, BK, EVEN, TMA
            ).T
        else:
            b = load_weight_tile(expert_weight, expert, k, first + column, P, Q, BK, BN, EVEN, TMA)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    columns = column + tl.arange(0, BN)
    inside = columns < WIDTH
    if BIAS:
        more = tl.load(bias + expert * Q + first + columns, mask=inside, other=0.0)
        acc += more.to(tl.float32)[None, :]
    at_out = out + top.to(tl.int64) * WIDTH + r[:, None] * WIDTH + columns[None, :]
    mask = (r < count)[:, None] & inside[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def unpermute_sum_kernel(
    rows, inverse, weight, edge_of, starts, offsets, out, first,
    E: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    BD: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum over the edges of t of weight * rows[inverse]`` for WIDTH of D columns.

    With K edges per token they are ``t * K + k``; with K = 0, ``edge_of[starts[t]:starts[t + 1]]``.
    The sum is in float32 and in the order of the edges: the same bits each time.
    """
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < WIDTH
    live = tl.load(offsets + E - 1)
    acc = tl.zeros([BD], tl.float32)
    if K > 0:
        for k in tl.static_range(K):
            at = tl.load(inverse + t * K + k)
            is_live = at < live
            row = tl.load(rows + at * WIDTH + columns, mask=inside & is_live, other=0.0)
            if WEIGHTED:
                acc += row.to(tl.float32) * tl.load(weight + t * K + k, mask=is_live, other=0.0)
            else:
                acc += row.to(tl.float32)
    else:
        now = tl.load(starts + t)
        stop = tl.load(starts + t + 1)
        while now < stop:
            edge = tl.load(edge_of + now)
            at = tl.load(inverse + edge)
            is_live = at < live
            row = tl.load(rows + at * WIDTH + columns, mask=inside & is_live, other=0.0)
            if WEIGHTED:
                acc += row.to(tl.float32) * tl.load(weight + edge, mask=is_live, other=0.0)
            else:
                acc += row.to(tl.float32)
            now += 1
    tl.store(out + t * D + first + columns, acc.to(out.dtype.element_ty), mask=inside)
