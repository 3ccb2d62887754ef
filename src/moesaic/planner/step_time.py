"""Step time: the seconds of a training step on a machine, from what the step costs.

Compute, communication and copies that overlap take ``together``: the longer one, and of the shorter
one the share that the contended pair loses. Gradient sums overlap the backward pass and gathered
weights the pass that needs them, but for the last sum, whose gradients are complete when the pass
ends; exchanges between layers (tensor, context, expert) do not. Links between nodes are those of
ranks numbered node by node. Where ranks share cores (``SharedCores``), a call of a collective takes
what it was measured to take between pieces of compute, and none of it is hidden.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moesaic.distributed.parallel_plan import DENSE_AXES, ParallelPlan
from moesaic.parallel.communication_volume import CommunicationVolume, summed_volumes
from moesaic.planner.cost_entries import (
    DEVICE,
    DISK,
    HOST,
    MovedBytes,
    OperationCost,
    Phase,
    Purpose,
    StepCost,
)
from moesaic.planner.machine import LinkSpeed, Machine, SizedRate
from moesaic.planner.operation_recorder import OperationKind

PRODUCTS_PER_EXPERT = {Phase.FORWARD: 2, Phase.BACKWARD: 4}
COUNT_BYTES = 8  # of a number that ranks sum


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by what the rank waits for; ``hidden`` is what compute covers.

    ``compute`` is by kind of operation, ``communication`` by collective and axis, ``transfers`` by
    source and target tier. ``bubble`` is the wait of a pipeline's rank for others.
    """

    compute: Mapping[str, float] = field(default_factory=dict)
    communication: Mapping[str, float] = field(default_factory=dict)
    transfers: Mapping[str, float] = field(default_factory=dict)
    update: float = 0.0
    bubble: float = 0.0
    hidden: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        parts = (self.compute, self.communication, self.transfers)
        return sum(sum(part.values()) for part in parts) + self.update + self.bubble


def together(first: float, second: float, *, slow_down: float) -> float:
    """Return the time of two pieces of work at once: ``slow_down`` times that of equal pieces."""
    return max(first, second) + (slow_down - 1) * min(first, second)


def step_time(
    cost: StepCost, *, machine: Machine, plan: ParallelPlan, num_experts: int = 1
) -> StepTime:
    """Return the time of a step on a machine. ``plan`` has its ``data`` degree.

    ``num_experts`` is that of a layer.

    Raises ConfigError if the machine has no rates of a dtype.
    """
    local = max(1.0, num_experts / plan.expert)
    has_neighbours = min(plan.world_size, int(machine.devices_per_node.value)) > 1
    busy = machine.beside_busy_ranks() if has_neighbours else machine
    compute = compute_seconds(
        (*cost.operations, *cost.gradient_operations), machine=busy, local_experts=local
    )
    update = compute.pop("update", 0.0)
    compute = {
        kind: machine.compute_factor(OperationKind(kind), neighbours=has_neighbours) * seconds
        for kind, seconds in compute.items()
    }
    states = [held for held in cost.held if held.purpose is Purpose.STATES and held.bytes]
    if any(held.tier != DEVICE for held in states):
        update = _host_update_seconds(cost.operations, machine=machine)
    exposed = {
        f"{line.kind} {line.axis}": collective_seconds(line, machine=machine, plan=plan)
        for line in summed_volumes((*cost.exchanged, *step_sums(plan)))
    }
    sync = SyncSeconds()
    for line in cost.synced:
        shape = group_shape(plan, line.axis, devices_per_node=int(machine.devices_per_node.value))
        sync = sync.plus(sync_seconds(line, shape=shape, machine=machine))
    copies = _transfer_seconds(cost.moved, machine=machine)
    serial = StepTime(compute, exposed, copies, update=update)
    return overlapped(serial, sync=sync, machine=machine, bubble=cost.bubble)


@dataclass(frozen=True, slots=True)
class SyncSeconds:
    """Seconds of gradient sums and gathered weights: what compute can hide, and the rest."""

    hideable: float = 0.0
    exposed: float = 0.0

    def plus(self, other: "SyncSeconds") -> "SyncSeconds":
        """Return both together."""
        return SyncSeconds(self.hideable + other.hideable, self.exposed + other.exposed)


def sync_seconds(
    line: CommunicationVolume, *, shape: "GroupShape", machine: Machine
) -> SyncSeconds:
    """Return the seconds of a step's gradient sums or gathers of one kind over one axis.

    The last of its messages has no compute beside it.
    """
    shared, messages = machine.shared_cores, max(1, line.messages)
    unit = shared.unit(line.kind) if shared and 1 < shape.ranks <= shape.local else None
    if unit is not None:
        return SyncSeconds(exposed=messages * unit.seconds(line.bytes / messages))
    seconds = sent_seconds(line, shape=shape, machine=machine)
    last = seconds if shared else seconds / messages
    return SyncSeconds(seconds - last, last)


def step_sums(plan: ParallelPlan) -> tuple[CommunicationVolume, ...]:
    """What ranks sum in a step beside gradients.

    Data ranks sum the numbers of predictions, and all ranks the norm where a rank lacks parameters.
    """
    count = CommunicationVolume("all-reduce", "data", COUNT_BYTES, 1)
    norm = CommunicationVolume("all-reduce", "+".join(DENSE_AXES), COUNT_BYTES, 1)
    cuts = plan.pipe * plan.tensor * plan.expert * plan.expert_tensor
    is_cut = cuts > 1 or (plan.zero > 0 and plan.world_size > 1)
    return (count,) * ((plan.data or 1) > 1) + (norm,) * is_cut


def overlapped(serial: StepTime, *, sync: SyncSeconds, machine: Machine, bubble: float) -> StepTime:
    """Return a step whose gradient sums and transfers overlap its compute, with its bubble.

    ``serial`` has each part alone; ``bubble`` is a share.
    """
    pairs = machine.contended
    compute = sum(serial.compute.values())
    busy = together(compute, sync.hideable, slow_down=pairs.product_collective.value)
    communication = dict(serial.communication)
    if waits_for_sync := busy - compute + sync.exposed:
        communication["gradients and gathered weights"] = waits_for_sync
    copied, waits = 0.0, dict[str, float]()
    for way, seconds in serial.transfers.items():
        from_disk = DISK in way
        pair = pairs.disk_product if from_disk else pairs.product_copy
        waits[way] = together(busy, seconds, slow_down=pair.value) - busy
        copied += seconds - waits[way]
    whole = compute + sum(communication.values()) + sum(waits.values()) + serial.update
    return StepTime(
        serial.compute,
        communication,
        waits,
        update=serial.update,
        bubble=whole * bubble / (1 - bubble),
        hidden=max(0.0, compute + sync.hideable - busy) + copied,
    )


def compute_seconds(
    operations: Iterable[OperationCost], *, machine: Machine, local_experts: float = 1
) -> dict[str, float]:
    """Return the seconds of forward and backward by kind of operation, and those of the update."""
    found: dict[str, float] = {}
    for each in operations:
        name = "update" if each.phase == Phase.UPDATE else each.kind.value
        rate = operation_rate(machine, each)
        seconds = operation_seconds(each, rate, local_experts=local_experts)
        found[name] = found.get(name, 0.0) + each.count * seconds
    return found


def operation_seconds(
    each: OperationCost, rate: SizedRate, *, local_experts: float, scale: float = 1
) -> float:
    """Return the time of one of some equal operations on ``scale`` times the tokens.

    A grouped product is that of a layer: two products of each expert of the rank in forward, four
    in backward, and its rate is that of a product of one expert.
    """
    if each.kind is OperationKind.MEMORY:
        return rate.seconds((each.bytes_read + each.bytes_written) * scale)
    if each.kind is not OperationKind.GROUPED_PRODUCT:
        return rate.seconds(each.flops * scale)
    products = local_experts * PRODUCTS_PER_EXPERT[each.phase]
    return products * rate.seconds(each.flops * scale / products)


def operation_rate(machine: Machine, each: OperationCost) -> SizedRate:
    """Return the curve that times an operation. Raises ConfigError if the machine has none."""
    if each.kind is OperationKind.MEMORY:
        return machine.memory
    products = machine.products_of(each.dtype)
    if each.kind is OperationKind.ATTENTION:
        return products.attention
    return products.grouped if each.kind is OperationKind.GROUPED_PRODUCT else products.dense


@dataclass(frozen=True, slots=True)
class GroupShape:
    """``ranks`` of a group of which ``local`` are on one node."""

    ranks: int
    local: int


def group_shape(plan: ParallelPlan, axis: str, *, devices_per_node: int) -> GroupShape:
    """Return the shape of the group of ranks along ``axis`` ("data+context", "stage", "expert").

    An axis varies every ``stride`` ranks; of its ranks, ``devices_per_node / stride`` share a node.
    """
    names = DENSE_AXES[1:] if axis == "stage" else tuple(axis.split("+"))
    grid = plan.axes() if set(names) <= set(DENSE_AXES) else expert_axes(plan)
    return shape_in(grid, names, devices_per_node=devices_per_node)


def shape_in(grid: Mapping[str, int], names: Sequence[str], *, devices_per_node: int) -> GroupShape:
    """Return the shape of the group of ranks along some axes of a grid, the innermost last."""
    ranks, local, stride = 1, 1, 1
    for name, size in reversed(tuple(grid.items())):
        if name in names:
            ranks *= size
            local *= max(1, min(size, devices_per_node // stride))
        stride *= size
    return GroupShape(ranks, local)


def expert_axes(plan: ParallelPlan) -> dict[str, int]:
    """Return the axes of a layer whose experts are sharded over ``plan.expert`` ranks."""
    return plan.axes(num_experts=plan.expert)


def unfolded_expert_axes(plan: ParallelPlan) -> dict[str, int]:
    """Return the axes of experts over data ranks alone, as before folding (2504.14960)."""
    return {
        "pipe": plan.pipe,
        "expert_data": (plan.data or 1) // plan.expert,
        "expert": plan.expert,
        "context": plan.context,
        "expert_tensor": plan.expert_tensor,
    }


def collective_seconds(line: CommunicationVolume, *, machine: Machine, plan: ParallelPlan) -> float:
    """Return the time of a step's collectives of one kind over one axis."""
    shape = group_shape(plan, line.axis, devices_per_node=int(machine.devices_per_node.value))
    return sent_seconds(line, shape=shape, machine=machine)


def sent_seconds(line: CommunicationVolume, *, shape: GroupShape, machine: Machine) -> float:
    """Return the time in which each rank of a group sends the bytes of ``line``.

    Across nodes, an all-to-all sends the share of the other nodes' ranks over the slow link. Other
    collectives run in rings through the nodes: each of a node's ``local`` ranks carries its share
    of what crosses. The links within a node carry all bytes at the same time.
    """
    inside, across = machine.within_node, machine.between_nodes
    size, messages = line.bytes, max(1, line.messages)
    if shape.ranks <= 1 or not size:
        return 0.0
    if shape.local >= shape.ranks:
        curve = machine.shared_cores.collective(line.kind) if machine.shared_cores else None
        if curve is not None:
            return messages * curve.seconds(size / messages)
        return inside.seconds(size, messages=messages)
    if line.kind == "all-to-all":
        crossing = size * (shape.ranks - shape.local) / (shape.ranks - 1)
    else:
        crossing = size / shape.local
    return max(
        inside.seconds(size, messages=messages) if shape.local > 1 else 0.0,
        across.seconds(crossing, messages=messages),
    )


def transfer_link(machine: Machine, source: str, target: str) -> LinkSpeed:
    """Return the link between two tiers; to and from disk it is that of the disk."""
    if source == DISK:
        return machine.disk_read
    if target == DISK:
        return machine.disk_write
    return machine.host_to_device if source == HOST else machine.device_to_host


def _transfer_seconds(moved: Iterable[MovedBytes], *, machine: Machine) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in moved:
        way = f"{each.source} to {each.target}"
        seconds = transfer_link(machine, each.source, each.target).seconds(each.bytes)
        found[way] = found.get(way, 0.0) + seconds
    return found


def _host_update_seconds(operations: Iterable[OperationCost], *, machine: Machine) -> float:
    size = sum(
        (each.bytes_read + each.bytes_written) * each.count
        for each in operations
        if each.phase == Phase.UPDATE
    )
    return size / machine.update.value
