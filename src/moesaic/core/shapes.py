"""Tensor types of shape annotations, and the letters of all shapes.

B batch rows, S source length, L target length, T tokens, E experts, K experts per token,
N edges or predicted tokens, R rows received, D model dim, F feed-forward dim, H heads,
V vocabulary.
"""

from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Shaped", "Tensor", "UInt8"]
