"""Blockwise quantization: nearest values of the map, in blocks that end with rows."""

import pytest
import torch

from moesaic.ops.blockwise_quantization import (
    codes_by_search,
    dequantize,
    dynamic_map,
    quantize,
)

SIGNED = pytest.mark.parametrize("signed", [True, False])
SHAPES = [(5, 700), (3, 2, 512), (4, 10), (0, 8), (2, 0), (1, 257)]


def problem(shape, *, signed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) ** 5
    return values if signed else values.square()


@SIGNED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_have_the_nearest_value_of_the_map(shape, signed):
    values = problem(shape, signed=signed)
    codes, scales = quantize(values, block=256, signed=signed)
    assert codes.shape == values.shape
    assert scales.shape == (*shape[:-1], -(-shape[-1] // 256))
    back = dequantize(codes, scales, block=256, signed=signed)
    every = torch.from_numpy(dynamic_map(signed=signed).values).double()
    for start in range(0, shape[-1], 256):
        part, of = values[..., start : start + 256].double(), scales[..., start // 256, None]
        nearest = (part.unsqueeze(-1) - every * of.unsqueeze(-1)).abs().amin(-1)
        error = (back[..., start : start + 256].double() - part).abs()
        torch.testing.assert_close(error, nearest, rtol=0, atol=float(1e-6 * values.abs().sum()))
        assert torch.equal(of[..., 0], part.abs().amax(-1).float())


@SIGNED
def test_the_table_finds_the_codes_of_the_search(signed):
    found = dynamic_map(signed=signed)
    middles, values = torch.from_numpy(found.middles[:-1]), torch.from_numpy(found.values)
    below = torch.nextafter(middles, torch.full_like(middles, -2))
    grid = torch.linspace(-1 if signed else 0, 1, 100_001)
    every = torch.cat([middles, below, values, grid, torch.tensor([0.0, -0.0, 1.0])])
    codes, _ = quantize(every[None], block=len(every), signed=signed)
    assert torch.equal(codes[0], codes_by_search(every, signed=signed))


@SIGNED
def test_rows_quantized_apart_have_the_bits_of_the_whole(signed):
    values = problem((6, 300), signed=signed)
    whole = quantize(values, block=128, signed=signed)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        part = quantize(values[start:stop], block=128, signed=signed)
        assert all(torch.equal(a, b[start:stop]) for a, b in zip(part, whole, strict=True))
    cut = quantize(values[:, 128:], block=128, signed=signed)  # between blocks
    assert torch.equal(cut[0], whole[0][:, 128:])
    assert torch.equal(cut[1], whole[1][:, 1:])


def test_zeros_and_the_smallest_values_stay():
    values = torch.tensor([[0.0, 0.0], [2e-38, -2e-38]])
    back = dequantize(*quantize(values, block=2, signed=True), block=2, signed=True)
    assert torch.equal(back[0], values[0])
    torch.testing.assert_close(back[1:], values[1:], rtol=0.01, atol=0)
    zeros = torch.zeros(1, 2, dtype=torch.uint8)  # what a store begins with
    assert not dequantize(zeros, torch.zeros(1, 1), block=2, signed=True).any()
