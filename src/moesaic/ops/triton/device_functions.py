"""Device functions that several kernels call: tile order, weight tiles, activations.

Letters in kernels: BM, BN, BK are a tile's block sizes; names in capitals are compile-time
constants.
"""
# Triton checks kernels itself: they are not ordinary Python
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def swizzled_tile(pid, tiles, columns: tl.constexpr, GROUP: tl.constexpr):
    """Return (row tile, column tile) of a program: GROUP row tiles share their columns in L2."""
    width = GROUP * columns
    first = pid // width * GROUP
    height = tl.minimum(tiles - first, GROUP)
    inside = pid % width
    return first + inside % height, inside // height


@triton.jit
def load_weight_tile(
    expert_weight, expert, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load [BR, BC] of ``expert_weight[expert]`` at (row, column); zero outside unless EVEN."""
    if TMA:
        tile = expert_weight.load([expert, row, column]).reshape(BR, BC)
    else:
        r = row + tl.arange(0, BR)
        c = column + tl.arange(0, BC)
        at = (
            expert_weight
            + expert.to(tl.int64) * (ROWS * COLUMNS)
            + r[:, None] * COLUMNS
            + c[None, :]
        )
        if EVEN:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(r[:, None] < ROWS) & (c[None, :] < COLUMNS), other=0.0)
    return tile


@triton.jit
def activation_forward(gate, value, ACT: tl.constexpr):
    """Return the activation in float32; ``value`` is read only if gated. NaN stays NaN."""
    if ACT == "swiglu":
        out = gate * tl.sigmoid(gate) * value
    elif ACT == "gelu":
        out = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        out = tl.where(gate < 0.0, 0.0, gate)
        if ACT == "relu2":
            out = out * out
    return out


@triton.jit
def activation_backward(gate, value, grad, ACT: tl.constexpr):
    """Return the gradients of gate and value (the latter is meaningful only if gated)."""
    if ACT == "swiglu":
        s = tl.sigmoid(gate)
        grad_gate = grad * value * s * (1.0 + gate * (1.0 - s))
        grad_value = grad * gate * s
    elif ACT == "gelu":
        normal = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        grad_gate = grad * (0.5 * (1.0 + tl.erf(gate * 0.7071067811865476)) + gate * normal)
        grad_value = grad_gate
    else:
        grad_gate = tl.where(gate > 0.0, grad, 0.0)
        if ACT == "relu2":
            grad_gate = grad_gate * 2.0 * gate
        grad_value = grad_gate
    return grad_gate, grad_value
