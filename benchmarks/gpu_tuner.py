"""Tuner of layer_gpu.py: candidates for each product, compiled in parallel, timed one by one."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_problem import Problem, Shape, SwiGLU, interleaved, spread
from triton.runtime.jit import JITFunction

from moesaic.ops.grouped_gemm import FeedForwardWeights
from moesaic.ops.moe_kernel import Edges
from moesaic.ops.permute import group_by_expert
from moesaic.ops.triton import kernel_launch
from moesaic.ops.triton.kernel_launch import KernelOptions, LaunchContext
from moesaic.ops.triton.tiles import (
    ROW_TILE_OPS,
    TABLE,
    WEIGHT_GRADIENT_OPS,
    Tile,
    Tiles,
    load_table,
    parse_table,
    to_numbers,
)
from moesaic.ops.triton.triton_moe_kernel import TritonMoEKernel, column_chunks

Candidates = dict[str, list[Tile]]
MANY: Candidates = {
    "up": [
        Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4, tma=True),
        Tile(128, 128, 64, 8, 4, group_m=4), Tile(128, 64, 64, 4, 4), Tile(128, 64, 64, 8, 4),
        Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 4, 4, tma=True), Tile(64, 64, 64, 4, 4),
    ],
    "down": [
        Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 4, tma=True),
        Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(128, 256, 64, 8, 3, group_m=4),
        Tile(64, 256, 64, 4, 4), Tile(64, 256, 64, 4, 4, tma=True), Tile(64, 128, 64, 4, 4),
    ],
    "down_dgrad": [
        Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4, tma=True),
        Tile(128, 64, 64, 4, 4), Tile(128, 128, 64, 4, 3), Tile(128, 256, 64, 8, 3),
        Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 4, 4, tma=True), Tile(64, 64, 64, 4, 4),
    ],
    "up_wgrad": [
        Tile(128, 256, 64, 8, 5), Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 5),
        Tile(128, 128, 64, 8, 5), Tile(128, 128, 64, 4, 5), Tile(128, 128, 32, 4, 6),
    ],
}  # fmt: skip
MANY |= {"up_dgrad": MANY["down"], "down_wgrad": MANY["up_wgrad"]}
FEW: Candidates = {
    "up": [
        Tile(16, 32, 128, 4, 4), Tile(16, 32, 256, 4, 3), Tile(16, 16, 256, 4, 4),
        Tile(16, 64, 128, 4, 4), Tile(16, 32, 128, 2, 5), Tile(16, 32, 128, 4, 4, tma=True),
    ],
    "down": [
        Tile(16, 64, 128, 4, 4), Tile(16, 32, 256, 4, 3), Tile(16, 128, 64, 4, 4),
        Tile(16, 128, 128, 4, 3), Tile(16, 64, 128, 2, 5), Tile(16, 64, 128, 4, 4, tma=True),
    ],
}  # fmt: skip
TINY: Candidates = {op: [Tile(16, 16, 32, 4, 2), Tile(16, 32, 32, 4, 2)] for op in MANY}


def bundles(candidates: Candidates, *, base: Tiles) -> list[Tiles]:
    """Sets of tiles that contain every candidate once, for compilation."""
    longest = max(map(len, candidates.values()))
    every = []
    for i in range(longest):
        chosen = {op: tiles[i] for op, tiles in candidates.items() if i < len(tiles)}
        every.append(base | chosen)
    return every


def compile_one(tiles: Tiles, shape: Shape, dtype: torch.dtype, train: bool) -> int:  # noqa: FBT001
    """Compile the launches of the kernel without allocating memory; return their number.

    Each kernel's binary goes to the cache on disk, where the timing process finds it.
    """
    original, seen = JITFunction.run, []

    def warm(self: JITFunction, *args: Any, grid: Any, warmup: Any, **options: Any) -> Any:
        del warmup
        seen.append(self)
        try:
            return original(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # a candidate that does not fit is told when it is timed
            print(f"not compiled: {type(error).__name__}: {str(error)[:100]}", flush=True)

    JITFunction.run = warm
    try:
        meta_pass(tiles, shape, dtype, train=train)
    finally:
        JITFunction.run = original
    return len(seen)


def meta_pass(tiles: Tiles, shape: Shape, dtype: torch.dtype, *, train: bool) -> None:
    s = shape

    def leaf(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta", dtype=dtype, requires_grad=train)

    expert = torch.empty(s.tokens * s.k, device="meta", dtype=torch.long)
    weight = torch.empty(s.tokens * s.k, device="meta")
    groups = group_by_expert(expert, num_experts=s.experts)
    edges = Edges(torch.empty_like(expert), weight, groups, s.tokens, s.k)
    weights = FeedForwardWeights(
        leaf(s.experts, s.dim, 2 * s.hidden), leaf(s.experts, s.hidden, s.dim)
    )
    x = leaf(s.tokens, s.dim)
    out = TritonMoEKernel(tiles=tiles)(x, edges=edges, weights=weights, activation=SwiGLU())
    if train:
        out.backward(torch.empty_like(out))


def compile_all(
    jobs: Sequence[tuple[Tiles, Shape, torch.dtype, bool]], *, workers: int,
    left: Callable[[], float],
) -> dict[str, Any]:  # fmt: skip
    """Compile in separate processes until all is done or no time is left."""
    context = multiprocessing.get_context("spawn")
    pool, failed, done = ProcessPoolExecutor(workers, mp_context=context), [], 0
    waiting = [pool.submit(compile_one, *job) for job in jobs]
    try:
        for future in as_completed(waiting, timeout=max(1.0, left())):
            error = future.exception()
            done += error is None
            if error is not None:
                failed.append(f"{type(error).__name__}: {str(error)[:200]}")
    except TimeoutError:
        failed.append("no time left")
    pool.shutdown(wait=False, cancel_futures=True)
    return {"bundles": len(jobs), "done": done, "failed": failed[:10]}


def works_of(p: Problem, op: str, *, base: Tiles) -> Callable[[Tile], Callable[[], Any]]:
    """Return a factory of the launch of one product for a tile, on the tensors of a problem."""
    s, edges = p.shape, p.edges()
    x, up, down, back = (t.detach() for t in (p.x, p.up, p.down, p.back))
    weight, number = edges.weight.detach(), edges.token.numel()
    spare = TritonMoEKernel().max_buffer_elements
    piece = next(column_chunks(s.dim, rows=number, width=2 * s.hidden, max_elements=spare))
    hidden, active = x.new_empty(number, 2 * s.hidden).normal_(), x.new_empty(number, s.hidden)
    active.normal_()

    def make(tile: Tile) -> Callable[[], Any]:
        tiles = base | {op: tile}
        rows = tile.block_m if op in ROW_TILE_OPS else base["up"].block_m
        job = LaunchContext(
            kernel_launch.schedule_tiles(edges, rows=rows), KernelOptions(tiles, "swiglu")
        )
        train = edges.token.numel() > 16 * s.experts
        return {
            "up": lambda: kernel_launch.up_projection(x, up, bias=None, save_hidden=train, job=job),
            "down": lambda: kernel_launch.row_matmul(
                active, down, bias=None, transposed=False, columns=piece, job=job
            ),
            "up_dgrad": lambda: kernel_launch.row_matmul(
                hidden, up, bias=None, transposed=True, columns=piece, job=job
            ),
            "down_dgrad": lambda: kernel_launch.down_backward(
                back, down, bias=None, weight=weight, hidden=hidden, job=job
            ),
            "up_wgrad": lambda: kernel_launch.weight_gradient(x, hidden, op=op, like=up, job=job),
            "down_wgrad": lambda: kernel_launch.weight_gradient(
                active, back, op=op, like=down, job=job
            ),
        }[op]

    return make


def time_candidates(
    p: Problem, candidates: Candidates, *, base: Tiles, left: Callable[[], float]
) -> dict[str, list[dict[str, Any]]]:
    """Median time of each candidate of each product; one that fails has none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for op, tiles in candidates.items():
        make, found[op] = works_of(p, op, base=base), []
        for tile in tiles:
            if left() < 0:
                break
            times = interleaved({"it": make(tile)}, rounds=5, repeats=4, left=left)
            median = spread(times.get("it", [])).get("median_ms")
            problem = next((name for name in times if name != "it"), None)
            found[op].append({"tile": to_numbers(tile), "median_ms": median, "failed": problem})
    return found


def best(timed: Sequence[dict[str, list[dict[str, Any]]]], *, base: Tiles) -> Tiles:
    """Return the tiles with the least time, summed over problems as multiples of the best one's.

    The products over segments share their row tiles, so these are chosen together.
    """
    cost = {op: costs for op in base if (costs := _costs(timed, op=op))}
    chosen = dict(base)
    for op in WEIGHT_GRADIENT_OPS:
        if op in cost:
            chosen[op] = _tile(min(cost[op], key=cost[op].__getitem__))
    segment_ops = [op for op in ROW_TILE_OPS if op in cost]
    every = [{t[0] for t in cost[op]} for op in segment_ops]
    possible = set.intersection(*every) if every else set()
    if not possible:
        return chosen

    def least(op: str, rows: int) -> tuple[float, tuple[int, ...]]:
        return min((c, t) for t, c in cost[op].items() if t[0] == rows)

    rows = min(possible, key=lambda rows: sum(least(op, rows)[0] for op in segment_ops))
    for op in ROW_TILE_OPS:
        chosen[op] = _tile(least(op, rows)[1]) if op in cost else replace(base[op], block_m=rows)
    return chosen


def _costs(
    timed: Sequence[dict[str, list[dict[str, Any]]]], *, op: str
) -> dict[tuple[int, ...], float]:
    """Cost of the tiles of a product that ran in every problem."""
    cost: dict[tuple[int, ...], list[float]] = {}
    for problem in timed:
        known = {tuple(r["tile"]): r["median_ms"] for r in problem.get(op, []) if r["median_ms"]}
        for tile, ms in known.items():
            cost.setdefault(tile, []).append(ms / min(known.values()))
    return {tile: sum(costs) for tile, costs in cost.items() if len(costs) == len(timed)}


def write_table(path: Path, *, card: str, kind: str, tuned: dict[str, Tiles]) -> None:
    """Write ``tiles.json`` with the tuned entries of one architecture replaced."""
    raw = json.loads(TABLE.read_text())
    table = load_table()
    before = table.get(card, {}).get(kind, table["any"][kind])
    entries = raw.setdefault(card, {}).setdefault(kind, {})
    for regime, tiles in (before | tuned).items():
        entries[regime] = {op: to_numbers(tile) for op, tile in tiles.items()}
    parse_table(raw)
    path.write_text(json.dumps(raw, indent=1) + "\n")


def _tile(numbers: tuple[int, ...]) -> Tile:
    return Tile(*numbers[:6], tma=bool(numbers[6]))
