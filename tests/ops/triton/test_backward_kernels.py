"""Each backward kernel equals autograd."""

import pytest
import torch

from moesaic.nn.feed_forward import GELU, ReLU, SquaredReLU, SwiGLU
from moesaic.ops.triton import kernel_launch
from ops.triton.cases import (
    DIM,
    EXPERTS,
    HIDDEN,
    ROUTES,
    SMALL,
    draw,
    edges_of,
    job_of,
    live_rows,
)

CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float16: {"rtol": 1e-2, "atol": 1e-2}}


@pytest.mark.parametrize(
    ("activation", "bias", "dtype"),
    [
        (ReLU(), False, torch.float32),
        (SquaredReLU(), True, torch.float32),
        (GELU(), False, torch.float32),
        (SwiGLU(), True, torch.float32),
        (SwiGLU(), False, torch.float16),
    ],
    ids=str,
)
def test_down_projection_backward_equals_autograd(activation, dtype, bias, device):
    edges = edges_of(*ROUTES["some-dropped"], device)
    job = job_of(edges, activation=activation.kernel_name)
    live, expert = live_rows(edges)
    number = edges.token.numel()
    hidden = draw(number, activation.width(HIDDEN), device=device, dtype=dtype)
    expert_weight = draw(EXPERTS, HIDDEN, DIM, device=device, dtype=dtype, scale=0.2)
    more = draw(EXPERTS, DIM, device=device, dtype=dtype) if bias else None
    grad = draw(edges.num_tokens, DIM, device=device, dtype=dtype)
    got = kernel_launch.down_backward(
        grad, expert_weight, bias=more, weight=edges.weight, hidden=hidden, job=job
    )

    leaf = hidden[:live].float().requires_grad_()
    weight = edges.weight.clone().requires_grad_()
    active = activation(leaf)
    output = torch.einsum("rf,rfd->rd", active, expert_weight[expert].float())
    output = output + more[expert].float() if bias else output
    sorted_weight = weight[edges.groups.order[:live], None]
    rows = grad[job.schedule.token[:live]].float()
    want = torch.autograd.grad((sorted_weight * output * rows).sum(), [leaf, weight])
    torch.testing.assert_close(got.hidden[:live].float(), want[0], **CLOSE[dtype])
    torch.testing.assert_close(got.weight, want[1], **CLOSE[dtype])
    scaled = (sorted_weight * active).detach()
    torch.testing.assert_close(got.scaled[:live].float(), scaled, **CLOSE[dtype])


@pytest.mark.parametrize("op", ["up_wgrad", "down_wgrad"])
@pytest.mark.parametrize(
    ("route", "dtype"),
    [
        ("some-dropped", torch.float32),
        ("empty-experts", torch.float16),
        ("no-tokens", torch.float32),
    ],
    ids=str,
)
def test_a_weight_gradient_equals_a_product_per_expert(route, op, dtype, device):
    edges = edges_of(*ROUTES[route], device)
    job = job_of(edges)
    live, _ = live_rows(edges)
    tokens = draw(edges.num_tokens, DIM, device=device, dtype=dtype)
    rows = draw(edges.token.numel(), HIDDEN, device=device, dtype=dtype)
    rows[live:] = torch.nan  # what a dropped edge's row may hold
    sides = (tokens, rows) if op == "up_wgrad" else (rows, tokens)
    sizes = (DIM, HIDDEN) if op == "up_wgrad" else (HIDDEN, DIM)
    like = torch.empty(
        EXPERTS, *sizes, device=device
    )  # a float32 expert_weight keeps a float32 gradient
    got = kernel_launch.weight_gradient(*sides, op=op, like=like, job=job)
    gathered = tokens[job.schedule.token].float()
    left, right = (gathered, rows.float()) if op == "up_wgrad" else (rows.float(), gathered)
    ends = [0, *edges.groups.offsets.tolist()]
    for e in range(EXPERTS):
        span = slice(ends[e], ends[e + 1])
        torch.testing.assert_close(got[e], left[span].T @ right[span], **CLOSE[dtype])


@pytest.mark.parametrize("route", ["balanced", "some-dropped", "no-tokens"])
def test_a_bias_gradient_is_the_sum_of_the_experts_rows(route, device):
    edges = edges_of(*ROUTES[route], device)
    schedule = job_of(edges).schedule
    live, expert = live_rows(edges)
    by_row = draw(edges.token.numel(), HIDDEN, device=device)
    by_token = draw(edges.num_tokens, DIM, device=device)
    by_row[live:] = torch.nan
    got = kernel_launch.bias_gradient(
        by_row, weight=None, like=torch.empty(EXPERTS, HIDDEN), schedule=schedule
    )
    want = torch.zeros(EXPERTS, HIDDEN, device=device).index_add(0, expert, by_row[:live])
    torch.testing.assert_close(got.to(device), want)
    like = torch.empty(EXPERTS, DIM, device=device)
    got = kernel_launch.bias_gradient(by_token, weight=edges.weight, like=like, schedule=schedule)
    weight = edges.weight[edges.groups.order[:live], None]
    rows = weight * by_token[schedule.token[:live]]
    torch.testing.assert_close(got, torch.zeros_like(like).index_add(0, expert, rows))


def test_the_shares_of_column_tiles_add_up_to_the_weights_gradient(device):
    assert SMALL["down_dgrad"].block_n < HIDDEN  # so that there are several
    edges = edges_of(*ROUTES["balanced"], device)
    job = job_of(edges, activation="relu")
    hidden = draw(edges.token.numel(), HIDDEN, device=device)
    expert_weight = draw(EXPERTS, HIDDEN, DIM, device=device)
    grad = draw(edges.num_tokens, DIM, device=device)
    got = kernel_launch.down_backward(
        grad, expert_weight, bias=None, weight=edges.weight, hidden=hidden, job=job
    )
    _, expert = live_rows(edges)
    output = torch.einsum("rf,rfd->rd", hidden.relu(), expert_weight[expert])
    by_row = (output * grad[job.schedule.token]).sum(1)
    torch.testing.assert_close(got.weight[edges.groups.order], by_row, rtol=1e-4, atol=1e-4)
