"""Packing and padding are inverses, with gradients for exactly the real tokens."""

import torch

from moesaic.nn.packing import Packing

REAL = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)


def test_pad_undoes_pack_at_real_tokens():
    packing = Packing.from_mask(REAL)
    x = torch.randn(packing.num_tokens, 4)
    padded = packing.pad(x)
    assert padded.shape == (3, 3, 4)
    assert torch.equal(packing.pack(padded), x)
    assert torch.equal(padded[~REAL], torch.zeros(4, 4))


def test_row_and_position_are_those_of_the_padded_batch():
    packing = Packing.from_mask(REAL)
    assert packing.row.tolist() == [0, 0, 1, 1, 1]
    assert packing.position.tolist() == [0, 1, 0, 1, 2]


def test_gradients_are_those_of_plain_indexing():
    packing = Packing.from_mask(REAL)
    x = torch.randn(3, 3, 4, requires_grad=True)
    weigh = torch.randn(5, 4)
    got = torch.autograd.grad((packing.pack(x) * weigh).sum(), x)[0]
    assert torch.equal(got, torch.autograd.grad((x[REAL] * weigh).sum(), x)[0])
    y = torch.randn(5, 4, requires_grad=True)
    weigh = torch.randn(3, 3, 4)
    got = torch.autograd.grad((packing.pad(y) * weigh).sum(), y)[0]
    assert torch.equal(got, weigh[REAL])


def test_without_padding_nothing_is_copied():
    packing = Packing.from_mask(torch.ones(2, 3, dtype=torch.bool))
    x = torch.randn(6, 4)
    assert packing.mask is None
    assert packing.key_mask is None
    assert packing.pack(packing.pad(x)).data_ptr() == x.data_ptr()


def test_a_row_without_tokens_has_one_allowed_key():
    mask = Packing.from_mask(REAL).key_mask
    assert mask is not None
    assert mask.any(-1).all()
    assert mask[:2, 0, 0].equal(REAL[:2])


def test_a_batch_without_any_token_packs_to_nothing():
    assert Packing.from_mask(torch.zeros(2, 0, dtype=torch.bool)).num_tokens == 0
    assert Packing.from_mask(torch.zeros(2, 3, dtype=torch.bool)).num_tokens == 0


def test_an_empty_batch_packs_and_pads():
    packing = Packing.from_mask(torch.zeros(0, 3, dtype=torch.bool))
    assert packing.pad(torch.zeros(0, 4)).shape == (0, 3, 4)
    assert packing.pack(torch.zeros(0, 3, 4)).shape == (0, 4)
