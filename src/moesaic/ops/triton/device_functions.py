"""What several kernels share: the order of tiles, a tile of a bank, activations and their slopes.

Letters in kernels: BM rows, BN columns and BK depth of a tile; a capital is known when compiling.
"""
# kernels are a language of their own, which Triton checks
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
    bank, expert, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return [BR, BC] of ``bank[expert]`` from (row, column) on; zero outside, unless EVEN."""
    if TMA:
        tile = bank.load([expert, row, column]).reshape(BR, BC)
    else:
        r = row + tl.arange(0, BR)
        c = column + tl.arange(0, BC)
        at = bank + expert.to(tl.int64) * (ROWS * COLUMNS) + r[:, None] * COLUMNS + c[None, :]
        if EVEN:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(r[:, None] < ROWS) & (c[None, :] < COLUMNS), other=0.0)
    return tile


@triton.jit
def activation_forward(gate, value, ACT: tl.constexpr):
    """Return the activation in float32; ``value`` counts only if gated. NaN stays NaN."""
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
    """Return the gradients of gate and value (the latter counts only if gated)."""
    if ACT == "swiglu":
        s = tl.sigmoid(gate)
        to_gate = grad * value * s * (1.0 + gate * (1.0 - s))
        to_value = grad * gate * s
    elif ACT == "gelu":
        normal = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        to_gate = grad * (0.5 * (1.0 + tl.erf(gate * 0.7071067811865476)) + gate * normal)
        to_value = to_gate
    else:
        to_gate = tl.where(gate > 0.0, grad, 0.0)
        if ACT == "relu2":
            to_gate = to_gate * 2.0 * gate
        to_value = to_gate
    return to_gate, to_value
