"""Step memory: the spans of a measured step put together for a whole model, and its peak.

A peak is what is there for good plus the most that is there at once beside it: the sum of what the
spans before have left, and the most within a span.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from moesaic.parallel.communication_volume import gradient_buckets
from moesaic.parallel.gradient_sums import IN_FLIGHT
from moesaic.parallel.parameter_inventory import RankParameters
from moesaic.parallel.partial_forward import BlockRange
from moesaic.planner.block_chain import STACKS, BlockChain, ChainPlace
from moesaic.planner.cost_entries import Phase
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.measured_step import Span

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class UpdatedBytes:
    """Bytes of what a step updates: weights, those of them that a tier takes, gradients, states."""

    weights: int = 0
    streamed: int = 0
    gradients: int = 0
    states: int = 0

    def __sub__(self, other: "UpdatedBytes") -> "UpdatedBytes":
        return UpdatedBytes(
            self.weights - other.weights,
            self.streamed - other.streamed,
            self.gradients - other.gradients,
            self.states - other.states,
        )


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of a rank's weights, gradients and optimizer states, exact, in whichever tier.

    ``counters`` are those of the states that are one number, which stay on the device; ``streamed``
    those of the weights that a tier of parameters takes, by unit (``parameter_streaming.py``).
    Of what is ``updated``, ``by_matrix`` is by rules that compute on the device (Muon). An update
    ``reads_weights`` unless it has float32 copies of them.
    ``overwritten`` are the old values of updates that may run ahead of the gradient norm.
    ``summed_once`` are the gradients that ZeRO 1 adds up on the device: a tier gets them once.
    """

    weights: int
    counters: int
    streamed: Mapping[str, int]
    updated: UpdatedBytes
    by_matrix: UpdatedBytes
    reads_weights: bool
    overwritten: int = 0
    summed_once: int = 0

    @property
    def gradients(self) -> int:
        """Bytes of gradients: those that are updated by."""
        return self.updated.gradients

    @property
    def states(self) -> int:
        """Bytes of all states."""
        return self.updated.states + self.counters

    @property
    def stored(self) -> int:
        """Bytes of the states that a tier holds."""
        return self.updated.states


def state_bytes(parameters: RankParameters, settings: CostSettings) -> StateBytes:
    """Return the bytes of the shards of a rank."""
    precision = settings.precision
    weight, gradient = precision.parameter_dtype.itemsize, precision.gradient_dtype.itemsize
    master = precision.master_weights.bytes_per_value if weight < FLOAT32_BYTES else 0
    values = overwritten = counters = summed_once = 0
    streamed: dict[str, int] = {}
    sums: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}  # by elementwise
    for shard in parameters.shards:
        size = math.prod(shard.shape)
        values += size
        if shard.streams:
            unit = shard.parameter.fsdp_unit
            streamed[unit] = streamed.get(unit, 0) + weight * size
    for shard in parameters.trained:
        size = math.prod(shard.shape)
        parameter = nn.Parameter(torch.empty(shard.shape, device="meta"))
        rule = settings.optimizer.param_group(parameter, kind=shard.parameter.kind)["rule"]
        slots = rule.initial_state(parameter).values()
        stored = sum(slot.nbytes for slot in slots if slot.dim())
        counters += sum(slot.nbytes for slot in slots if not slot.dim())
        sums[rule.elementwise] += Counter(
            weights=weight * size,
            streamed=weight * size * shard.streams,
            gradients=gradient * size,
            states=master * size + stored,
        )
        if parameters.plan.zero == 1 and shard.zero_axes:
            summed_once += gradient * size
        if rule.elementwise:
            overwritten += FLOAT32_BYTES * size + stored
    return StateBytes(
        weight * values,
        counters,
        streamed,
        UpdatedBytes(**(sums[True] + sums[False])),
        UpdatedBytes(**sums[False]),
        reads_weights=not master,
        overwritten=overwritten,
        summed_once=summed_once,
    )


def stage_spans(
    spans: Sequence[Span],
    *,
    chain: BlockChain,
    blocks: BlockRange,
    corrections: Mapping[ChainPlace, int],
) -> tuple[Span, ...]:
    """Return the spans of a stage of these blocks, in the order of a micro-batch.

    ``corrections`` are added to what the backward span of a block leaves.
    """
    by_place = {(span.phase, span.place): span for span in spans}
    places: list[ChainPlace] = []
    for stack, numbers in (("encoder", blocks.encoder), ("decoder", blocks.decoder)):
        places += [ChainPlace(stack)] if 0 in numbers else []
        places += [ChainPlace(stack, number) for number in numbers]
    if blocks.decoder.stop == len(chain.representative["decoder"]):
        places.append(ChainPlace("head"))
    forward = [by_place[Phase.FORWARD, chain.run_for(place)] for place in places]
    backward = [
        by_place.get((Phase.BACKWARD, chain.run_for(place)), _no_backward(place)).with_more(
            corrections.get(place, 0)
        )
        for place in reversed(places)
    ]
    return (*forward, *backward)


def _no_backward(place: ChainPlace) -> Span:
    """Return the span of a place to which no gradient flows, as nothing before it is trained."""
    return Span(Phase.BACKWARD, place, 0, 0, Counter(), Counter())


def kept_bytes(spans: Iterable[Span]) -> int:
    """Return what the forward spans leave for backward."""
    return sum(span.change for span in spans if span.phase == Phase.FORWARD)


def peak_bytes(spans: Iterable[Span]) -> int:
    """Return the most that is there at once beside what was there before the first span."""
    live = most = 0
    for span in spans:
        most = max(most, live + span.peak, live + span.change)
        live += span.change
    return most


def gathered_bytes(parameters: RankParameters, *, itemsize: int) -> int:
    """Return the bytes of the weights that ZeRO has gathered at once in a forward pass.

    Stage 3 has those outside of blocks and one unit, stages 1 and 2 all of them.
    """
    units: dict[str, int] = {}
    for shard in parameters.shards:
        if shard.zero_axes:
            unit = shard.parameter.fsdp_unit
            units[unit] = units.get(unit, 0) + math.prod(shard.shape_before_zero)
    root, rest = units.pop("", 0), list(units.values())
    return itemsize * (root + (max(rest, default=0) if parameters.plan.zero == 3 else sum(rest)))


def gradient_corrections(
    parameters: RankParameters, measured: RankParameters, settings: CostSettings
) -> Mapping[ChainPlace, int]:
    """Return, for each place, by how much more bytes of gradients stay than where it was run.

    There are fewer ranks there, so ZeRO's shards are larger; and all gradients are on the device.
    """
    itemsize = settings.precision.gradient_dtype.itemsize
    is_device = settings.parallel.memory.gradients.is_device
    small = {shard.parameter.name: math.prod(shard.shape) for shard in measured.trained}
    found: dict[ChainPlace, int] = {}
    for shard in parameters.trained:
        place = _place_of(shard.parameter.name, settings)
        more = is_device * math.prod(shard.shape) - small.get(shard.parameter.name, 0)
        found[place] = found.get(place, 0) + itemsize * more
    return found


def stage_gradients(
    parameters: RankParameters, stages: Sequence[BlockRange], settings: CostSettings
) -> list[int]:
    """Return the bytes of gradients that the first micro-batch leaves on each of a rank's stages.

    Those outside of blocks are with the first stage of the rank.
    """
    itemsize = settings.precision.gradient_dtype.itemsize
    sizes = [0] * len(stages)
    for shard in parameters.trained if settings.parallel.memory.gradients.is_device else ():
        stack, _, rest = shard.parameter.name.partition(".")
        number = rest.partition(".")[0]
        index = 0
        if stack in STACKS and number.isdigit():
            blocks = [each.encoder if stack == "encoder" else each.decoder for each in stages]
            index = next(i for i, numbers in enumerate(blocks) if int(number) in numbers)
        sizes[index] += itemsize * math.prod(shard.shape)
    return sizes


def _place_of(name: str, settings: CostSettings) -> ChainPlace:
    """Return where the gradient of a parameter is complete: outside of blocks, at the end."""
    stack, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    if stack in STACKS and number.isdigit():
        return ChainPlace(stack, int(number))
    return ChainPlace("encoder" if settings.model.encoder.layers else "decoder")


def bucket_copies(parameters: RankParameters, settings: CostSettings) -> Mapping[ChainPlace, int]:
    """Return, for each place, by how much the copies of gradients that are summed grow there.

    A bucket is copied when its last gradient is complete, after those before it; of more than
    ``IN_FLIGHT`` the oldest is done then.
    """
    found: dict[ChainPlace, int] = {}
    sizes: list[int] = []
    last = ChainPlace("head")
    for bucket in gradient_buckets(parameters, precision=settings.precision):
        places = [last, *(_place_of(name, settings) for name in bucket.names)]
        last = min(places, key=_order)
        done = sizes[-IN_FLIGHT] if len(sizes) >= IN_FLIGHT else 0
        sizes.append(bucket.bytes)
        found[last] = found.get(last, 0) + bucket.bytes - done
    return found


def _order(place: ChainPlace) -> tuple[int, int]:
    """Sort places as a forward pass has them."""
    return (*STACKS, "head").index(place.stack), place.block


def with_offloaded_activations(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return spans whose saved storages leave at their end, and are fetched for backward.

    Of what is saved, only what the span has added can leave: the rest is in use elsewhere.
    """
    left = {
        span.place: min(span.saved, max(0, span.change))
        for span in spans
        if span.phase == Phase.FORWARD
    }
    return tuple(
        span.with_more(-left[span.place])
        if span.phase == Phase.FORWARD
        else replace(span, change=span.change + left[span.place], peak=span.peak + left[span.place])
        for span in spans
    )
