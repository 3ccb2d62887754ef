"""Matrix owners: each matrix is updated by one of the ranks that hold it, as Muon needs it whole.

Muon orthogonalizes a matrix as a whole. The ranks that hold slices of a matrix (tensor parallelism,
ZeRO) send them to its owner; the owner computes the update and sends the slices back. Where other
ranks hold copies (data parallelism without ZeRO), the owner is one rank of one copy, which
broadcasts its slices to the others. So a rank computes and holds one part in as many of the updates
as there are ranks, and no rank holds all matrices whole. Owners are balanced by FLOPs, and maps of
a fused matrix may have different owners.

Letters: S ranks that hold the slices of one copy, R copies, O matrices of an owner's stack,
M rows, N columns.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import accumulate, chain, product

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.distributed.collectives import all_to_all, broadcast_from
from moesaic.distributed.process_groups import Group
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.sharding_plan import Spans

MatrixSpans = tuple[Spans, Spans]  # of the rows and of the columns that a rank holds


@dataclass(frozen=True, slots=True)
class _Holders:
    """The axes whose ranks share out the slices of a matrix, and those whose ranks have copies."""

    slice_axes: tuple[str, ...]
    copy_axes: tuple[str, ...]
    num_experts: int | None


@dataclass(frozen=True, slots=True)
class OwnedMaps:
    """Matrices ``first`` to ``first + count`` of a parameter's stack, of the block at ``offset``.

    ``shape`` are the rows and columns of the block: of the whole matrix, or of one map of a fused
    one. The owner is rank ``slice_owner`` of copy ``copy_owner``.
    """

    name: str
    first: int
    count: int
    offset: tuple[int, int]
    shape: tuple[int, int]
    slice_owner: int = 0
    copy_owner: int = 0

    @property
    def flops(self) -> int:
        """The multiplications of one product of a matrix with itself."""
        return self.count * min(self.shape) * self.shape[0] * self.shape[1]


class MatrixOwners:
    """The ``MatrixSharding`` of the optimizer of a parallel model (``optim/group_update.py``).

    Every rank of a pipeline stage gives the same names in the same order.
    """

    def __init__(self, parallel_model: ParallelModel) -> None:
        self._parallel_model = parallel_model
        self._plans: dict[tuple[str, ...], list[_OwnerPlan]] = {}

    def update_maps(
        self,
        parts: Mapping[str, Float[Tensor, "*O m n"]],
        *,
        fused: Mapping[str, Sequence[int]],
        function: Callable[[Sequence[Tensor]], None],
    ) -> None:
        """Apply ``function``, which changes whole maps in place, to the maps of these slices.

        Collective. ``function`` is called once, with the maps that this rank owns.
        """
        stacks = {name: part if part.ndim == 3 else part[None] for name, part in parts.items()}
        key = tuple(parts)
        if key not in self._plans:
            self._plans[key] = list(self._make_plans(parts, fused=fused))
        plans = self._plans[key]
        device = self._parallel_model.mesh.device
        gathered = [plan.gather(stacks, device=device) for plan in plans]
        function(list(chain.from_iterable(gathered)))
        for plan, wholes in zip(plans, gathered, strict=True):
            plan.scatter(stacks, wholes, device=device)

    def _make_plans(
        self, parts: Mapping[str, Tensor], *, fused: Mapping[str, Sequence[int]]
    ) -> Iterator["_OwnerPlan"]:
        by_holders: dict[_Holders, list[OwnedMaps]] = defaultdict(list)
        model, mesh = self._parallel_model, self._parallel_model.mesh
        for name, part in parts.items():
            holders = self._holders(name, ndim=part.ndim)
            axes, experts = (*holders.slice_axes, *holders.copy_axes), holders.num_experts
            owners = mesh.size(*axes, num_experts=experts)
            stack = 1 if part.ndim == 2 else part.shape[0]
            shape = model.sharding_plan[name].shape[-2:]
            output = 0 if part.ndim == 2 else 1
            widths = fused.get(name) or (shape[output],)
            by_holders[holders] += _split_stack(
                name, blocks=_map_blocks(shape, widths, output), stack=stack, pieces=owners
            )
        for holders, maps in by_holders.items():
            if maps:  # ZeRO may leave a rank no experts
                yield self._plan(holders, maps)

    def _plan(self, holders: _Holders, maps: Sequence[OwnedMaps]) -> "_OwnerPlan":
        model, mesh, experts = self._parallel_model, self._parallel_model.mesh, holders.num_experts
        slice_ranks = mesh.ranks(*holders.slice_axes, num_experts=experts)
        copy_ranks = mesh.ranks(*holders.copy_axes, num_experts=experts)
        spans = {
            name: [model.local_spans(name, rank=rank)[-2:] for rank in slice_ranks]
            for name in dict.fromkeys(each.name for each in maps)
        }
        return _OwnerPlan(
            _balance(maps, slices=len(slice_ranks), copies=len(copy_ranks)),
            spans={name: [(s[0], s[1]) for s in ranks] for name, ranks in spans.items()},
            slice_rank=slice_ranks.index(mesh.rank),
            copy_rank=copy_ranks.index(mesh.rank),
            slice_group=mesh.group(*holders.slice_axes, num_experts=experts),
            copy_group=mesh.group(*holders.copy_axes, num_experts=experts),
        )

    def _holders(self, name: str, *, ndim: int) -> _Holders:
        model = self._parallel_model
        placement, sync = model.sharding_plan[name], model.gradient_sync[name]
        dims = range(ndim - 2, ndim)
        axes = [sharded.axis for sharded in placement.sharded_dims if sharded.dim in dims]
        axes += sync.zero_axes if model.zero_dim(name) in dims else ()
        sizes = model.mesh.grid(placement.num_experts).axes

        def used(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(axis for axis in names if sizes[axis] > 1)

        return _Holders(used(axes), used(sync.all_reduce_axes), placement.num_experts)


class _OwnerPlan:
    """The exchanges of the maps with the same holders; ``spans`` has those of each of S ranks."""

    def __init__(
        self,
        maps: Sequence[OwnedMaps],
        *,
        spans: Mapping[str, Sequence[MatrixSpans]],
        slice_rank: int,
        copy_rank: int,
        slice_group: Group,
        copy_group: Group,
    ) -> None:
        self._spans, self._slice_rank, self._copy_rank = spans, slice_rank, copy_rank
        self._slice_group, self._copy_group = slice_group, copy_group
        self._of_copy: dict[int, list[OwnedMaps]] = defaultdict(list)
        for each in maps:
            self._of_copy[each.copy_owner].append(each)
        mine = self._of_copy[copy_rank]
        ranks = len(next(iter(spans.values())))
        self._of_rank = [[m for m in mine if m.slice_owner == rank] for rank in range(ranks)]

    def gather(self, stacks: Mapping[str, Tensor], *, device: torch.device) -> list[Tensor]:
        """Return the whole maps that this rank owns, ``[O, M, N]`` each."""
        owned = self._of_rank[self._slice_rank]
        if self._slice_group is None:
            return [_block(stacks[m.name], m) for m in owned]
        wholes = [
            torch.empty(m.count, *m.shape, device=device, dtype=stacks[m.name].dtype) for m in owned
        ]
        _exchange(
            self._slices(stacks), self._owned_slices(wholes), self._slice_group, device=device
        )
        return wholes

    def scatter(
        self, stacks: Mapping[str, Tensor], wholes: Sequence[Tensor], *, device: torch.device
    ) -> None:
        """Write the slices of updated maps into ``stacks`` on all ranks that hold them."""
        if self._slice_group is not None:
            _exchange(
                self._owned_slices(wholes), self._slices(stacks), self._slice_group, device=device
            )
        if self._copy_group is None:
            return
        for copy, maps in sorted(self._of_copy.items()):
            views = [view for m in maps for view in self._local_slices(stacks, m)]
            if not views:
                continue
            flat = torch.cat([view.reshape(-1) for view in views]).to(device)
            broadcast_from(flat, group=self._copy_group, source=copy)
            if copy != self._copy_rank:
                _unpack(flat, views)

    def _slices(self, stacks: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Return this rank's slices of the maps of each owner."""
        return [
            [view for m in maps for view in self._local_slices(stacks, m)] for maps in self._of_rank
        ]

    def _local_slices(self, stacks: Mapping[str, Tensor], maps: OwnedMaps) -> list[Tensor]:
        stack = stacks[maps.name].narrow(0, maps.first, maps.count)
        runs = _runs(maps, self._spans[maps.name][self._slice_rank])
        return [
            stack.narrow(1, row.local, row.length).narrow(2, column.local, column.length)
            for row, column in runs
        ]

    def _owned_slices(self, wholes: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the slices of each rank in the whole maps of this one."""
        owned = self._of_rank[self._slice_rank]
        return [
            [
                whole.narrow(1, row.whole, row.length).narrow(2, column.whole, column.length)
                for m, whole in zip(owned, wholes, strict=True)
                for row, column in _runs(m, self._spans[m.name][rank])
            ]
            for rank in range(len(self._of_rank))
        ]


@dataclass(frozen=True, slots=True)
class _Run:
    """``length`` rows or columns: from ``local`` on in a slice, from ``whole`` on in the map."""

    local: int
    whole: int
    length: int


def _runs(maps: OwnedMaps, spans: MatrixSpans) -> Iterator[tuple[_Run, _Run]]:
    """Yield the runs of rows and columns of a map that a rank's slice contains."""
    both = zip(spans, maps.offset, maps.shape, strict=True)
    yield from product(*(list(_overlaps(s, start, size)) for s, start, size in both))  # pyright: ignore[reportReturnType]


def _overlaps(spans: Spans, start: int, size: int) -> Iterator[_Run]:
    locals_ = accumulate((length for _, length in spans), initial=0)
    for (first, length), local in zip(spans, locals_, strict=False):
        low, high = max(first, start), min(first + length, start + size)
        if high > low:
            yield _Run(local + low - first, low - start, high - low)


def _block(stack: Float[Tensor, "E m n"], maps: OwnedMaps) -> Float[Tensor, "O M N"]:
    """Return a view of the maps in a stack of whole matrices."""
    (row, column), (rows, columns) = maps.offset, maps.shape
    return stack[maps.first : maps.first + maps.count, row : row + rows, column : column + columns]


def _map_blocks(
    shape: Sequence[int], widths: Sequence[int], output: int
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return offset and shape of each map of a matrix whose outputs are dim ``output``."""
    starts = accumulate(widths, initial=0)
    if output == 0:
        return [
            ((start, 0), (width, shape[1])) for start, width in zip(starts, widths, strict=False)
        ]
    return [((0, start), (shape[0], width)) for start, width in zip(starts, widths, strict=False)]


def _split_stack(
    name: str,
    *,
    blocks: Sequence[tuple[tuple[int, int], tuple[int, int]]],
    stack: int,
    pieces: int,
) -> Iterator[OwnedMaps]:
    """Yield every map of a stack of matrices in at most so many pieces."""
    number = min(stack, pieces)
    for piece in range(number):
        first, last = stack * piece // number, stack * (piece + 1) // number
        for offset, shape in blocks:
            yield OwnedMaps(name, first, last - first, offset, shape)


def _balance(maps: Sequence[OwnedMaps], *, slices: int, copies: int) -> list[OwnedMaps]:
    """Give each map to the rank with the least work so far, the largest first."""
    loads = [(0, copy, rank) for rank in range(slices) for copy in range(copies)]
    heapify(loads)
    owned: dict[int, OwnedMaps] = {}
    for index in sorted(range(len(maps)), key=lambda i: -maps[i].flops):
        load, copy, rank = loads[0]
        owned[index] = replace(maps[index], slice_owner=rank, copy_owner=copy)
        heapreplace(loads, (load + maps[index].flops, copy, rank))
    return [owned[index] for index in range(len(maps))]


def _exchange(
    sent: Sequence[Sequence[Tensor]],
    received: Sequence[Sequence[Tensor]],
    group: Group,
    *,
    device: torch.device,
) -> None:
    """Send a list of views to each rank; write what each rank sends into the views of another."""
    views = list(chain.from_iterable(sent))
    flat = torch.cat([view.reshape(-1) for view in views]) if views else torch.empty(0)
    out = all_to_all(
        flat.to(device),  # offloaded states are in host memory, which NCCL cannot read
        group=group,
        input_splits=[sum(view.numel() for view in each) for each in sent],
        output_splits=[sum(view.numel() for view in each) for each in received],
    )
    _unpack(out, list(chain.from_iterable(received)))


def _unpack(flat: Tensor, views: Sequence[Tensor]) -> None:
    for view, content in zip(views, flat.split([v.numel() for v in views]), strict=True):
        view.copy_(content.view(view.shape))
