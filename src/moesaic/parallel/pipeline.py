"""Pipeline: the micro-batches of a step through the stages of a model, on PyTorch's schedules.

Every rank of a pipeline has the same micro-batches, so only states travel (``wire.py``); what else
a stage needs it makes of its own copy. The last stage scores. Losses that other stages have of
their own (balance) get their gradient where they are: an identity in the stream whose backward adds
it.

Letters: N predicted tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import PAD, Batch
from moesaic.dist.collectives import Group
from moesaic.dist.mesh import Mesh
from moesaic.dist.world import ProcessGroupWorld, World
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.layer import accumulate_routing_stats
from moesaic.moe.record import RoutingRecord, loss_terms
from moesaic.nn.packing import Packing
from moesaic.parallel.schedules import engine
from moesaic.parallel.stages import Stages
from moesaic.parallel.wire import Boundary, Held, Wire, hang


@dataclass(frozen=True, slots=True)
class Scoring:
    """How the last stage scores: ``predicted`` tokens are those of the step on all ranks."""

    predicted: int
    smoothing: float = 0.0
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(slots=True)
class Micro:
    """A micro-batch, and what this rank's stages make of it.

    ``terms`` are shares of the loss, detached. Where the last stage has scored, ``nll`` is each
    predicted token's negative log-likelihood and ``row`` its row of the batch.
    """

    batch: Batch
    tokens: Held
    terms: dict[str, Float[Tensor, ""]]
    records: tuple[RoutingRecord, ...] = ()
    nll: Float[Tensor, "N"] | None = None
    row: Int[Tensor, "N"] | None = None


@dataclass(slots=True)
class Job:
    """The step in progress."""

    micros: tuple[Micro, ...] = ()
    scoring: Scoring = field(default_factory=lambda: Scoring(0))


class Stage(nn.Module):
    """One stage: tensors in, tensors out; the last one returns this rank's share of the loss.

    ``index`` is the number of the micro-batch in ``job``.
    """

    def __init__(
        self, model: Transformer, *, stages: Stages, number: int, wires: Sequence[Wire], job: Job
    ) -> None:
        super().__init__()
        self.model = model
        self.leg = stages.legs[number]
        self.source = wires[number - 1] if number else None
        self.drain = wires[number] if number < len(wires) else None
        self.job = job

    def forward(self, *received: Tensor, index: Int[Tensor, "1"]) -> Any:
        """Pass a micro-batch on, or score it."""
        micro, scoring = self.job.micros[int(index)], self.job.scoring
        given = self.source.unpack(received, tokens=micro.tokens) if self.source else None
        terms: dict[str, Tensor] = {}
        with scoring.autocast():
            end = self.model.forward_blocks(micro.batch, blocks=self.leg, stage_input=given)
            if self.drain is None:
                output = self.model.output_of(end, batch=micro.batch)
                scored = self.model.loss(output, smoothing=scoring.smoothing)
                terms["cross_entropy"] = scored.total / max(scoring.predicted, 1)
                micro.nll, micro.row = scored.nll, output.row
        terms |= loss_terms(end.records, num_micro_batches=len(self.job.micros))
        objective = torch.stack(list(terms.values())).sum() if terms else torch.zeros(())
        for name, value in {**terms, "objective": objective}.items():
            micro.terms[name] = micro.terms[name] + value.detach().double()
        micro.records += end.records
        if self.training:
            # now, not after backward: the next micro-batch comes before that
            accumulate_routing_stats(self.model, end.records)
        if self.drain is None:
            return objective
        return self.drain.pack(end.stage_output, term=objective.to(micro.batch.source.device))


class Pipeline:
    """This rank's stages of a model that ``stages.keep_only`` has cut, and its two verbs.

    ``group`` are the ranks of the pipeline, first stage first; ``sharing`` has the world of each of
    ``stages.sharings`` that this rank is in.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        stages: Stages,
        group: Group,
        sharing: Mapping[tuple[int, ...], World],
        device: torch.device,
    ) -> None:
        self.model, self.stages = model, stages
        self.group, self.sharing, self.device = group, sharing, device
        self.rank = distributed.get_rank(group)
        self.dtype = next(model.parameters()).dtype
        self._names = term_names(stages)
        self._boundaries = [Boundary.after(leg, config=stages.config) for leg in stages.legs[:-1]]
        self._job = Job()
        model.attach_encoder = hang
        self._built: tuple[Any, Any] = (None, None)

    @staticmethod
    def on(mesh: Mesh, *, model: Transformer, stages: Stages) -> "Pipeline":
        """Make the pipeline of this rank of a mesh. Collective over the whole mesh."""
        sharing: dict[tuple[int, ...], World] = {}
        for ranks in stages.sharings:
            lists = [[line[rank] for rank in ranks] for line in mesh.dense_grid.groups(("pipe",))]
            group = mesh.new_group(lists)
            if mesh.coordinates()["pipe"] in ranks:
                sharing[ranks] = ProcessGroupWorld(mesh.device, group=group)
        return Pipeline(
            model, stages=stages, group=mesh.group("pipe"), sharing=sharing, device=mesh.device
        )

    @property
    def first(self) -> bool:
        """Whether this rank has the first stage: it counts tokens."""
        return self.stages.places[0] == self.rank

    @property
    def last(self) -> bool:
        """Whether this rank has the last stage: it scores."""
        return self.stages.places[-1] == self.rank

    def gradients(self, batches: Sequence[Batch], *, scoring: Scoring) -> tuple[Micro, ...]:
        """Add the gradients of this rank's share of the loss. Collective over the pipeline.

        Sums over ranks of the results' ``terms`` are what one process has. ``share_gradients``
        comes after whatever else adds gradients up.
        """
        self._begin(batches, scoring=scoring)
        wires = self._wires()
        if self._built[0] != (wires, len(batches)):
            self._built = ((wires, len(batches)), self._engine(wires, micro_batches=len(batches)))
        which = torch.arange(len(batches))
        self._built[1].step(which, index=which, target=which, return_outputs=False)
        return self._end()

    @torch.no_grad()
    def scores(self, batches: Sequence[Batch], *, scoring: Scoring) -> tuple[Micro, ...]:
        """Score batches, any number of them, without gradients. Collective over the pipeline."""
        self._begin(batches, scoring=scoring)
        wires = self._wires()
        sent: list[Any] = []
        local: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        for number in self.stages.at(self.rank):
            stage = self._stage(number, wires=wires)
            for index in range(len(batches)):
                received = local.pop((number, index), ())
                if number and not received:
                    received = self._receive(wires[number - 1], stage=number - 1)
                out = stage(*received, index=torch.tensor([index]))
                if number == len(wires):
                    continue
                if self.stages.places[number + 1] == self.rank:
                    local[number + 1, index] = out
                else:
                    to = self.stages.places[number + 1]
                    sent += [distributed.isend(t, group=self.group, group_dst=to) for t in out]
        for work in sent:
            work.wait()
        return self._end()

    def _begin(self, batches: Sequence[Batch], *, scoring: Scoring) -> None:
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        self._job.scoring = scoring
        self._job.micros = tuple(
            Micro(batch.to(self.device), self._tokens(batch), dict.fromkeys(self._names, none))
            for batch in batches
        )

    def _end(self) -> tuple[Micro, ...]:
        micros, self._job.micros = self._job.micros, ()
        return micros

    def _tokens(self, batch: Batch) -> Held:
        """How many tokens of a micro-batch are held here."""
        sides = (batch.source != PAD, (batch.target_in != PAD) | (batch.target_out != PAD))
        packings = [self.model.sequence_sharding(Packing.from_mask(real)) for real in sides]
        source, target = (len(range(packing.num_tokens)[packing.local_tokens]) for packing in packings)
        return Held(source, target)

    def _wires(self) -> tuple[Wire, ...]:
        dim, tokens = self.stages.config.dim, [micro.tokens for micro in self._job.micros]
        return tuple(
            Wire.of(boundary, dim=dim, dtype=self.dtype, tokens=tokens)
            for boundary in self._boundaries
        )

    def _stage(self, number: int, *, wires: Sequence[Wire]) -> Stage:
        stage = Stage(self.model, stages=self.stages, number=number, wires=wires, job=self._job)
        return stage.train(self.model.training)

    def _engine(self, wires: Sequence[Wire], *, micro_batches: int) -> Any:
        """PyTorch's schedule over this rank's stages."""
        schedule = self.stages.schedule
        made = [self._torch_stage(number, wires=wires) for number in self.stages.at(self.rank)]
        return getattr(engine(), schedule.torch_name)(
            made[0] if schedule.per_rank() == 1 else made,
            n_microbatches=micro_batches,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )

    def _torch_stage(self, number: int, *, wires: Sequence[Wire]) -> Any:
        # shapes are said here, so that nothing is run to find them out
        root, loss = torch.empty(1, dtype=torch.long), torch.empty((), requires_grad=True)
        return engine().PipelineStage(
            self._stage(number, wires=wires),
            number,
            len(wires) + 1,
            self.device,
            input_args=wires[number - 1].blanks("meta") if number else (root,),
            output_args=wires[number].blanks("meta") if number < len(wires) else (loss,),
            group=self.group,
        )

    def _receive(self, wire: Wire, *, stage: int) -> tuple[Tensor, ...]:
        blanks = tuple(blank.detach() for blank in wire.blanks(self.device))
        for blank in blanks:
            distributed.recv(blank, group=self.group, group_src=self.stages.places[stage])
        return blanks

    def share_gradients(self) -> None:
        """Give what several ranks hold the sum of their gradients. Collective.

        Last of all sums: what other groups add up, each in an order of its own, would differ in
        its last bits from rank to rank.
        """
        named = dict(self.model.named_parameters())
        for ranks in self.stages.sharings:
            if self.rank in ranks:
                held = [p for name, p in named.items() if self.stages.holders[name] == ranks]
                self.sharing[ranks].all_reduce_gradients(held)


def term_names(stages: Stages) -> tuple[str, ...]:
    """The names of every part of the training loss, on whichever stage it is."""
    config, names = stages.config, {"cross_entropy", "objective"}
    for stack in (config.encoder, config.decoder):
        moe = config.moe_of_stack(stack)
        if isinstance(moe, MoE) and stack.moe_layers:
            names |= {f"loss_{term.name}" for term in moe.balance}
    return tuple(sorted(names))
