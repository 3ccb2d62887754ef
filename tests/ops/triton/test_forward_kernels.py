"""Each forward kernel equals torch, and writes no row past the groups."""

import pytest
import torch

from moesaic.nn.feed_forward import GELU, ReLU, SquaredReLU, SwiGLU
from moesaic.ops.triton import kernel_launch
from ops.references import reference_unpermute
from ops.triton.cases import (
    DIM,
    EXPERTS,
    HIDDEN,
    ROUTES,
    SMALL,
    by_descriptor,
    draw,
    edges_of,
    job_of,
    live_rows,
)

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 4e-3, "atol": 4e-3}}


@pytest.mark.parametrize("route", ROUTES)
def test_the_schedule_covers_every_live_row_once_and_marks_the_rest_unused(route, device):
    edges = edges_of(*ROUTES[route], device)
    rows = 4
    schedule = kernel_launch.schedule_tiles(edges, rows=rows)
    live, expert = live_rows(edges)
    covered = []
    for e, start in zip(schedule.tile_expert.tolist(), schedule.tile_row.tolist(), strict=True):
        if e >= 0:
            stop = min(start + rows, int(edges.groups.offsets[e]))
            assert expert[start:stop].tolist() == [e] * (stop - start)
            covered += range(start, stop)
    assert sorted(covered) == list(range(live))


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        (ReLU(), torch.float32),
        (SquaredReLU(), torch.float32),
        (GELU(), torch.float32),
        (SwiGLU(), torch.float32),
        (SwiGLU(), torch.float16),
    ],
    ids=str,
)
def test_up_equals_gather_multiply_activate(activation, dtype, device):
    edges = edges_of(*ROUTES["some-dropped"], device)
    job = job_of(edges, activation=activation.kernel_name)
    width = activation.width(HIDDEN)
    x = draw(edges.num_tokens, DIM, device=device, dtype=dtype)
    expert_weight = draw(EXPERTS, DIM, width, device=device, dtype=dtype, scale=0.2)
    bias = draw(EXPERTS, width, device=device, dtype=dtype)
    hidden, active = kernel_launch.up_projection(
        x, expert_weight, bias=bias, save_hidden=True, job=job
    )
    live, expert = live_rows(edges)
    rows = x[job.schedule.token[:live]].float()
    want = torch.einsum("rd,rdg->rg", rows, expert_weight[expert].float()) + bias[expert].float()
    torch.testing.assert_close(hidden[:live].float(), want, **CLOSE[dtype])
    torch.testing.assert_close(active[:live].float(), activation(want), **CLOSE[dtype])
    nothing, again = kernel_launch.up_projection(
        x, expert_weight, bias=bias, save_hidden=False, job=job
    )
    assert nothing is None
    assert torch.equal(again[:live], active[:live])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
def test_row_matmul_equals_torch_for_any_range_of_columns(transposed, dtype, device):
    edges = edges_of(*ROUTES["some-dropped"], device)
    job = job_of(edges)
    left = draw(edges.token.numel(), HIDDEN, device=device, dtype=dtype)
    expert_weight = draw(EXPERTS, HIDDEN, DIM, device=device, dtype=dtype, scale=0.2)
    bias = None if transposed else draw(EXPERTS, DIM, device=device, dtype=dtype)
    live, expert = live_rows(edges)
    want = torch.einsum("rp,rpq->rq", left[:live].float(), expert_weight[expert].float())
    want = want if bias is None else want + bias[expert].float()
    given = expert_weight.transpose(1, 2).contiguous() if transposed else expert_weight
    for columns in (range(DIM), range(16, 33)):
        got = kernel_launch.row_matmul(
            left, given, bias=bias, transposed=transposed, columns=columns, job=job
        )
        piece = want[:, columns.start : columns.stop]
        torch.testing.assert_close(got[:live].float(), piece, **CLOSE[dtype])


@pytest.mark.parametrize("general", [False, True], ids=["k-per-token", "any-edges"])
@pytest.mark.parametrize("route", ["some-dropped", "one-token", "no-tokens"])
def test_unpermute_sum_equals_the_reference_whatever_is_past_the_groups(route, general, device):
    edges = edges_of(*ROUTES[route], device, general=general)
    job = job_of(edges)
    rows = draw(edges.token.numel(), DIM, device=device)
    live, _ = live_rows(edges)
    rows[live:] = 0.0
    want = reference_unpermute(
        rows, token=edges.token, weight=edges.weight, groups=edges.groups,
        num_tokens=edges.num_tokens,
    )  # fmt: skip
    rows[live:] = torch.nan
    out = torch.empty_like(want)
    for first in (0, 24):
        piece = rows[:, first : first + 24].contiguous()
        kernel_launch.launch_unpermute_sum(
            piece, weight=edges.weight, out=out, first=first, schedule=job.schedule
        )
    torch.testing.assert_close(out, want)


def test_weights_read_by_descriptor_give_the_same(device):
    edges = edges_of(*ROUTES["some-dropped"], device)
    x = draw(edges.num_tokens, DIM, device=device)
    expert_weight = draw(EXPERTS, DIM, 2 * HIDDEN, device=device)
    pointers, descriptors = (
        kernel_launch.up_projection(
            x, expert_weight, bias=None, save_hidden=True, job=job_of(edges, tiles=tiles)
        )
        for tiles in (SMALL, by_descriptor(SMALL))
    )
    live, _ = live_rows(edges)
    for a, b in zip(pointers, descriptors, strict=True):
        assert torch.equal(a[:live], b[:live])
