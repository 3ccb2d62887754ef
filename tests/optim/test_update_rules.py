"""Newton-Schulz orthogonalization of single, stacked and tall matrices."""

import pytest
import torch

from moesaic.optim.update_rules import (
    _newton_schulz_direct,
    _newton_schulz_gram,
    newton_schulz,
    orthogonalize,
)


def test_singular_values_come_near_one_and_vectors_stay():
    make = torch.Generator().manual_seed(0)
    x = torch.randn(3, 12, 20, generator=make)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = newton_schulz(x, steps=5)
    middle = u.mT @ y @ vh.mT
    diagonal = middle.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3
    torch.testing.assert_close(middle, torch.diag_embed(diagonal), rtol=0, atol=1e-4)


def test_stacked_experts_equal_one_matrix_at_a_time():
    make = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=make) for s in ((8, 5), (4, 8, 5), (1, 8, 5))]
    together = orthogonalize(tensors, steps=5)
    for tensor, result in zip(tensors, together, strict=True):
        assert result.shape == tensor.shape
        for one, part in zip(tensor.view(-1, 8, 5), result.view(-1, 8, 5), strict=True):
            torch.testing.assert_close(
                newton_schulz(one[None], steps=5)[0], part, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("rank", [16, 3], ids=["full rank", "nearly rank 3"])
def test_iterating_on_gram_matrices_equals_the_published_iteration(rank):
    make = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, rank, generator=make) @ torch.randn(4, rank, 64, generator=make)
    x = x + 1e-4 * torch.randn(4, 16, 64, generator=make)
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    plain = _newton_schulz_direct(x.double(), steps=5).float()
    torch.testing.assert_close(_newton_schulz_gram(x, steps=5), plain, rtol=0, atol=1e-4)


def test_a_tall_stack_is_the_transpose_of_a_wide_one():
    x = torch.randn(2, 24, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(newton_schulz(x, steps=5), newton_schulz(x.mT, steps=5).mT)
