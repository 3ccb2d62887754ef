"""Routings, weights and the definition that kernels are compared with."""

from dataclasses import replace

import torch

from moesaic.ops.grouped_gemm import FeedForwardWeights, expert_of_row
from moesaic.ops.moe_kernel import Edges
from moesaic.ops.permute import group_by_expert
from moesaic.ops.triton import kernel_launch
from moesaic.ops.triton.kernel_launch import KernelOptions, LaunchContext
from moesaic.ops.triton.tiles import Tile

EXPERTS, DIM, HIDDEN = 3, 40, 24  # no multiple of a tile of 16 or 32
SMALL = {  # several tiles in every direction
    "up": Tile(16, 16, 32, 4, 2, group_m=2),
    "down": Tile(16, 32, 32, 4, 2, group_m=2),
    "down_dgrad": Tile(16, 16, 32, 4, 2, group_m=2),
    "up_dgrad": Tile(16, 32, 32, 4, 2, group_m=2),
    "up_wgrad": Tile(32, 32, 16, 4, 2, group_m=2),
    "down_wgrad": Tile(32, 32, 16, 4, 2, group_m=2),
}
E = EXPERTS
ROUTES = {  # expert of each edge, edges per token
    "balanced": (torch.arange(24) % E, 2),
    "empty-experts": (torch.full((20,), 1), 1),
    "one-token": (torch.tensor([2, 0]), 2),
    "some-dropped": (torch.arange(30) * 7 % 11 % (E + 1), 6),
    "all-dropped": (torch.full((4,), E), 2),
    "no-tokens": (torch.empty(0, dtype=torch.long), 2),
}


def edges_of(expert, k, device, *, general=False):
    """Edges in token-major order, or shuffled with a token that has none."""
    number = expert.numel()
    token = torch.arange(number) // k
    tokens = number // k
    if general:
        mixed = torch.randperm(number, generator=torch.Generator().manual_seed(3))
        expert, token, tokens = expert[mixed], token[mixed], tokens + 1
    weight = torch.rand(number, generator=torch.Generator().manual_seed(4))
    weight = torch.where(expert < EXPERTS, weight, 0.0)
    groups = group_by_expert(expert.to(device), num_experts=EXPERTS)
    return Edges(token.to(device), weight.to(device), groups, tokens, 0 if general else k)


def job_of(edges, *, activation="swiglu", tiles=SMALL):
    return LaunchContext(
        kernel_launch.schedule_tiles(edges, rows=tiles["up"].block_m),
        KernelOptions(tiles, activation),
    )


def draw(*shape, device, dtype=torch.float32, seed=0, scale=1.0):
    random = torch.Generator().manual_seed(seed + 17 * len(shape))
    return (torch.randn(shape, generator=random) * scale).to(device, dtype)


def live_rows(edges):
    """How many sorted rows lead to an expert, and the expert of each."""
    expert = expert_of_row(edges.groups, rows=edges.token.numel())
    live = int(edges.groups.offsets[-1])
    return live, expert[:live]


def definition(x, *, edges, weights: FeedForwardWeights, activation):
    """The sum over edges, edge by edge, differentiated by autograd."""
    out = torch.zeros(edges.num_tokens, x.shape[1], device=x.device)
    live, expert = live_rows(edges)
    for row in range(live):
        edge, e = int(edges.groups.order[row]), int(expert[row])
        token = int(edges.token[edge])
        hidden = x[token] @ weights.up[e]
        hidden = hidden if weights.up_bias is None else hidden + weights.up_bias[e]
        output = activation(hidden) @ weights.down[e]
        output = output if weights.down_bias is None else output + weights.down_bias[e]
        place = torch.tensor([token], device=x.device)
        out = out.index_add(0, place, (edges.weight[edge] * output)[None])
    return out


def by_descriptor(tiles):
    return {op: replace(tile, tma=True) for op, tile in tiles.items()}


assert (ROUTES["some-dropped"][0] == E).any(), "a route that should drop edges drops none"
