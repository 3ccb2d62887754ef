"""Checks of layer_gpu.py: every kernel and the MoE kernel compared with torch, on the device."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_problem import Shape, SwiGLU, make, wait, with_kernel

from moesaic.ops.grouped_gemm import FeedForwardWeights, SequentialGEMM, expert_of_row
from moesaic.ops.moe_kernel import Edges, UnfusedMoEKernel
from moesaic.ops.permute import group_by_expert
from moesaic.ops.triton import kernel_launch
from moesaic.ops.triton.kernel_launch import KernelOptions, LaunchContext
from moesaic.ops.triton.tiles import Tiles, load_table
from moesaic.ops.triton.triton_moe_kernel import TritonMoEKernel

Tensor = torch.Tensor
STEP = Shape(256, 256, 128, 8, 2)  # of the checks of a training step
Check = tuple[str, float, float]  # what, its error, the most it may be
Task = Callable[[], list[Check]]
LIMIT = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def off(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; NaN where a value is not finite."""
    size = want.float().norm().clamp(min=1e-9)
    return float((got.float() - want.float()).norm() / size)


def edges_for(shape: Shape, *, device: str, case: str) -> Edges:
    """Edges of a shape; ``case`` names a special property."""
    draw = torch.Generator().manual_seed(5)
    t, e, k = shape.tokens, shape.experts, shape.k
    expert = torch.randint(e, (t * k,), generator=draw)
    token = torch.arange(t).repeat_interleave(k)
    if case == "one expert":
        expert.fill_(e - 1)
    if case in ("dropped", "any order"):
        expert = torch.where(torch.rand(t * k, generator=draw) < 0.2, e, expert)
    if case == "any order":
        mixed = torch.randperm(t * k, generator=draw)
        expert, token = expert[mixed], token[mixed]
    weight = torch.where(expert < e, torch.rand(t * k, generator=draw), 0.0)
    groups = group_by_expert(expert.to(device), num_experts=e)
    per_token = 0 if case == "any order" else k
    return Edges(token.to(device), weight.to(device), groups, t, per_token)


def kernel_errors(
    shape: Shape, *, tiles: Tiles, device: str, dtype: torch.dtype
) -> Iterator[tuple[str, float]]:
    """Yield (kernel, its error) for SwiGLU with biases and some edges dropped."""
    s, edges = shape, edges_for(shape, device=device, case="dropped")
    job = LaunchContext(
        kernel_launch.schedule_tiles(edges, rows=tiles["up"].block_m),
        KernelOptions(tiles, "swiglu"),
    )
    routes, live = job.schedule, int(edges.groups.offsets[-1])
    number = edges.token.numel()
    expert = expert_of_row(edges.groups, rows=number)[:live]
    draw = torch.Generator(device).manual_seed(1)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=draw, device=device).mul_(scale).to(dtype)

    x, back = normal(s.tokens, s.dim), normal(s.tokens, s.dim)
    up = normal(s.experts, s.dim, 2 * s.hidden, scale=s.dim**-0.5)
    down = normal(s.experts, s.hidden, s.dim, scale=s.hidden**-0.5)
    up_bias, down_bias = normal(s.experts, 2 * s.hidden), normal(s.experts, s.dim)
    token, w = routes.token[:live], edges.weight[routes.order[:live], None]

    each, outer = partial(_each, expert), partial(_outer, expert, s.experts)
    hidden, active = kernel_launch.up_projection(x, up, bias=up_bias, save_hidden=True, job=job)
    assert hidden is not None
    want = each(x[token], up) + up_bias[expert].float()
    yield "up: hidden", off(hidden[:live], want)
    yield "up: active", off(active[:live], SwiGLU()(hidden[:live].float()))
    every = range(s.dim)
    y = kernel_launch.row_matmul(
        active, down, bias=down_bias, transposed=False, columns=every, job=job
    )
    yield "down", off(y[:live], each(active[:live], down) + down_bias[expert].float())
    dx = kernel_launch.row_matmul(hidden, up, bias=None, transposed=True, columns=every, job=job)
    yield "up transposed", off(dx[:live], each(hidden[:live], up.transpose(1, 2)))
    y[live:] = torch.nan
    out = torch.empty_like(x)
    kernel_launch.launch_unpermute_sum(y, weight=edges.weight, out=out, first=0, schedule=routes)
    y[live:] = 0
    want = torch.zeros(s.tokens, s.dim, device=device)
    want.index_add_(0, token, y[:live].float() * w)
    yield "unpermute", off(out, want)
    through = kernel_launch.down_backward(
        back, down, bias=down_bias, weight=edges.weight, hidden=hidden, job=job
    )
    leaf = hidden[:live].float().requires_grad_()
    active32 = SwiGLU()(leaf)
    to_active = each(back[token], down.transpose(1, 2))
    (want,) = torch.autograd.grad(active32, leaf, to_active * w)
    yield "down back: hidden", off(through.hidden[:live], want)
    yield "down back: scaled", off(through.scaled[:live], active32.detach() * w)
    dots = (to_active * active32.detach()).sum(1)
    dots += (back[token].float() * down_bias[expert].float()).sum(1)
    yield "down back: weight", off(through.weight[routes.order[:live]], dots)
    through.hidden[live:] = torch.nan
    to_up = kernel_launch.weight_gradient(x, through.hidden, op="up_wgrad", like=up, job=job)
    yield "up outer", off(to_up, outer(x[token], through.hidden[:live]))
    to_down = kernel_launch.weight_gradient(
        through.scaled, back, op="down_wgrad", like=down, job=job
    )
    yield "down outer", off(to_down, outer(through.scaled[:live], back[token]))
    to_bias = kernel_launch.bias_gradient(
        back, weight=edges.weight, like=down_bias, schedule=routes
    )
    yield "sums", off(to_bias[:, None], outer(w, back[token]))


def _each(expert: Tensor, rows: Tensor, expert_weight: Tensor) -> Tensor:
    """Return the rows, each times the matrix of its expert, in float32."""
    out = torch.empty(len(expert), expert_weight.shape[2], device=rows.device)
    for e, matrix in enumerate(expert_weight):
        out[expert == e] = rows[expert == e].float() @ matrix.float()
    return out


def _outer(expert: Tensor, experts: int, left: Tensor, right: Tensor) -> Tensor:
    """Return ``left.T @ right`` of every expert's rows, in float32."""
    mine = [expert == e for e in range(experts)]
    return torch.stack([left[m].float().T @ right[m].float() for m in mine])


def kernel_tasks(*, device: str, tiny: bool) -> list[Task]:
    """Checks of every kernel: dtypes, regimes, weights by descriptor, odd and even shapes."""
    table = load_table()
    card = table["any"] if tiny else table["sm90"]
    if tiny:
        shapes, kinds = [Shape(12, 40, 24, 3, 2)], [("single", torch.float32, ["few"])]
    else:
        shapes = [Shape(512, 256, 128, 6, 4), Shape(301, 200, 72, 5, 3)]
        kinds = [("half", torch.bfloat16, ["few", "some", "many"])]
        kinds += [("half", torch.float16, ["many"]), ("single", torch.float32, ["some"])]
    tasks: list[Task] = []
    for kind, dtype, regimes in kinds:
        for regime in regimes:
            plain = card.get(kind, table["any"][kind])[regime]
            variants = {"": plain, " by descriptor": by_descriptor(plain)}
            for shape in shapes:
                for variant, tiles in variants.items():
                    what = f"{dtype} {regime}{variant} | {shape}"
                    given = {"tiles": tiles, "device": device, "dtype": dtype, "what": what}
                    tasks.append(partial(_check_kernels, shape, **given))
    return tasks


def _check_kernels(
    shape: Shape, *, tiles: Tiles, device: str, dtype: torch.dtype, what: str
) -> list[Check]:
    found = kernel_errors(shape, tiles=tiles, device=device, dtype=dtype)
    return [(f"{kernel} | {what}", error, LIMIT[dtype]) for kernel, error in found]


def by_descriptor(tiles: Tiles) -> Tiles:
    return {op: replace(tile, tma=True) for op, tile in tiles.items()}


def moe_kernel_tasks(*, device: str, tiny: bool) -> list[Task]:
    """Checks of output and gradients against the unfused kernel in float32."""
    if tiny:
        problems = [(Shape(8, 40, 24, 3, 2), torch.float32, ["dropped"])]
    else:
        every = ["plain", "one expert", "dropped", "any order"]
        problems = [
            (Shape(700, 256, 128, 8, 2), torch.bfloat16, every),
            (Shape(33, 256, 128, 8, 6), torch.bfloat16, ["plain", "dropped"]),
            (Shape(1, 256, 128, 8, 2), torch.bfloat16, ["plain"]),
            (Shape(500, 200, 72, 5, 1), torch.bfloat16, ["dropped"]),
            (Shape(300, 256, 128, 8, 2), torch.float32, every),
        ]
    return [
        partial(_check_moe_kernel, shape, device=device, dtype=dtype, cases=cases)
        for shape, dtype, cases in problems
    ]


def _check_moe_kernel(
    shape: Shape, *, device: str, dtype: torch.dtype, cases: list[str]
) -> list[Check]:
    found = []
    for case in cases:
        edges = edges_for(shape, device=device, case=case)
        p = make(shape, device=device, dtype=dtype)
        got = _both(TritonMoEKernel(), edges, [p.x, p.up, p.down], p.back)
        exact = [t.detach().float().requires_grad_() for t in (p.x, p.up, p.down)]
        want = _both(UnfusedMoEKernel(SequentialGEMM()), edges, exact, p.back.float())
        for name, a, b in zip(("out", "x", "up", "down", "weight"), got, want, strict=True):
            found.append((f"{name} | {dtype} {case} | {shape}", off(a, b), 2 * LIMIT[dtype]))
    return found


def _both(kernel: Any, edges: Edges, leaves: list[Tensor], back: Tensor) -> list[Tensor]:
    weight = edges.weight.detach().clone().requires_grad_()
    x, up, down = leaves
    given = Edges(edges.token, weight, edges.groups, edges.num_tokens, edges.per_token)
    out = kernel(x, edges=given, weights=FeedForwardWeights(up, down), activation=SwiGLU())
    return [out.detach(), *torch.autograd.grad(out, [*leaves, weight], back)]


def verdict(tasks: list[Task], *, workers: int, seconds: float) -> dict[str, Any]:
    """Run checks in separate processes (most of the time is compilation); NaN is an error."""
    found, failed = [], []
    for rows, error in _each_result(tasks, workers=workers, seconds=seconds):
        found += rows
        failed += [error] if error else []
    rows = [{"what": what, "error": error, "limit": limit} for what, error, limit in found]
    wrong = [row for row in rows if not row["error"] < row["limit"]]
    worst = max((row["error"] / row["limit"] for row in rows), default=float("nan"))
    right = bool(rows) and not wrong and not failed
    counted = {"right": right, "checks": len(rows), "worst_of_limit": worst}
    return counted | {"wrong": wrong[:40], "failed": failed[:20]}


def _each_result(
    tasks: list[Task], *, workers: int, seconds: float
) -> Iterator[tuple[list[Check], str]]:
    if not workers:
        yield from ((task(), "") for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    waiting = [pool.submit(task) for task in tasks]
    try:
        for future in as_completed(waiting, timeout=seconds):
            error = future.exception()
            yield ([], repr(error)[:300]) if error else (future.result(), "")
    except TimeoutError:
        yield [], f"not all checks ended within {seconds:.0f} s"
    pool.shutdown(wait=False, cancel_futures=True)


def no_wait(*, device: str) -> dict[str, Any]:
    """A training step of the layer, in which any host synchronization is an error."""
    p = make(STEP, device=device, dtype=torch.bfloat16)
    ours = with_kernel(p, TritonMoEKernel(), name="ours")
    ours.both()
    wait()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.both()
        with torch.no_grad():
            ours.forward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return {"right": True}


def graph(*, device: str) -> dict[str, Any]:
    """Capture a training step, replay it with other routings, compare with eager calls."""
    p = make(STEP, device=device, dtype=torch.bfloat16)
    ours = with_kernel(p, TritonMoEKernel(), name="ours")

    def step() -> list[Tensor]:
        out = ours.forward()
        return [out.detach(), *torch.autograd.grad(out, p.leaves, p.back)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        static = step()
    errors = []
    for case in ("random", "one expert", "some dropped"):
        new = torch.randint(8, p.expert.shape, device=device)
        new = torch.full_like(new, 7) if case == "one expert" else new
        new = torch.where(new == 3, 8, new) if case == "some dropped" else new
        p.expert.copy_(new)
        captured.replay()
        wait()
        errors.append(max(off(a, b) for a, b in zip(static, step(), strict=True)))
    return {"right": all(error == 0 for error in errors), "errors": errors}


def same_bits(*, device: str, dtype: torch.dtype, shape: Shape) -> dict[str, Any]:
    """Two runs of forward and backward, under load, give the same bits."""
    p = make(shape, device=device, dtype=dtype)
    ours = with_kernel(p, TritonMoEKernel(), name="ours")
    first = [ours.forward().detach(), *ours.both()]
    equal = True
    for _ in range(3):
        again = [ours.forward().detach(), *ours.both()]
        equal &= all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return {"right": equal, "shape": str(shape)}
