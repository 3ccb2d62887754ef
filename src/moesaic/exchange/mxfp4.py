"""MXFP4: blocks of 32 values of four bits with one exponent (OCP Microscaling Formats, v1.0).

Letters: N any dims, G blocks of a row.
"""

import torch

from moesaic.core.shapes import Float, Shaped, Tensor

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1: two bits of exponent, one of mantissa
_VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))
_EXPONENT_BIAS = 127


def dequantise_mxfp4(
    blocks: Shaped[Tensor, "*N G 16"], scales: Shaped[Tensor, "*N G"]
) -> Float[Tensor, "*N 32*G"]:
    """Return bfloat16 values of uint8 ``blocks``, the lower four bits first, and exponents.

    Every value is one of bfloat16, unless its exponent is below the smallest one.
    """
    table = torch.tensor(_VALUES)
    index = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    exponent = scales.int() - _EXPONENT_BIAS
    return torch.ldexp(table[index.int()], exponent[..., None]).flatten(-2).bfloat16()
