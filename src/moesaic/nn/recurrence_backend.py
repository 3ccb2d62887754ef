"""Recurrence backends: run a recurrence over packed rows, wherever the tokens of a row are.

``LocalRecurrence`` needs all tokens of a row on this rank. With ``ContextRecurrence`` each context
rank has spans of rows: what a span does to a state is exchanged, and prefix products of it are the
states from which the spans start.

Letters: T tokens, B rows, N spans of this rank, C channels, W width of a convolution, G key heads,
H heads, K key channels, V value channels, E decay channels (K, or 1).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.distributed.collectives import all_gather_rows
from moesaic.distributed.process_groups import Group, group_rank
from moesaic.nn.initializer import normal_parameter
from moesaic.nn.packing import Packing, TokenSpan
from moesaic.ops.decayed_scan import ScanInputs, StateChange, decayed_scan, state_change
from moesaic.ops.short_convolution import short_convolution


class TokenScan(NamedTuple):
    """The inputs of ``ops.decayed_scan``, packed."""

    query: Float[Tensor, "T G K"]
    key: Float[Tensor, "T G K"]
    value: Float[Tensor, "T H V"]
    log_decay: Float[Tensor, "T H E"]


class ScannedTokens(NamedTuple):
    """Outputs, and the state of each row after its last token."""

    out: Float[Tensor, "T H V"]
    state: Float[Tensor, "B H K V"]


class ConvolvedTokens(NamedTuple):
    """Outputs, and the last W - 1 inputs of each row (zeros where it has fewer)."""

    out: Float[Tensor, "T C"]
    last_inputs: Float[Tensor, "B W1 C"]


class ConvolutionWeights(nn.Module):
    """Weight and bias of a short causal convolution of each channel (``ops.short_convolution``)."""

    def __init__(self, channels: int, *, width: int) -> None:
        super().__init__()
        self.weight = normal_parameter(channels, width, std=(3 * width) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(channels))

    @property
    def num_earlier(self) -> int:
        """The inputs before a token that its output depends on."""
        return self.weight.shape[1] - 1


@runtime_checkable
class RecurrenceBackend(Protocol):
    """Recurrences within each row; rows start from zeros, or from what is given."""

    def scan(
        self,
        tokens: TokenScan,
        *,
        packing: Packing,
        scale: float,
        state: Float[Tensor, "B H K V"] | None,
    ) -> ScannedTokens:
        """Run ``ops.decayed_scan`` over the tokens of each row."""
        ...

    def convolve(
        self,
        x: Float[Tensor, "T C"],
        *,
        packing: Packing,
        weights: ConvolutionWeights,
        earlier: Float[Tensor, "B W1 C"] | None,
    ) -> ConvolvedTokens:
        """Run ``ops.short_convolution`` over the tokens of each row."""
        ...


class LocalRecurrence:
    """All tokens of a row are on this rank."""

    def scan(
        self,
        tokens: TokenScan,
        *,
        packing: Packing,
        scale: float,
        state: Float[Tensor, "B H K V"] | None,
    ) -> ScannedTokens:
        result = decayed_scan(_pad(tokens, packing), state=state, scale=scale)
        out = packing.pack(result.out.flatten(2)).unflatten(-1, result.out.shape[2:])
        return ScannedTokens(out, result.state)

    def convolve(
        self,
        x: Float[Tensor, "T C"],
        *,
        packing: Packing,
        weights: ConvolutionWeights,
        earlier: Float[Tensor, "B W1 C"] | None,
    ) -> ConvolvedTokens:
        if earlier is None:
            earlier = x.new_zeros(packing.rows, weights.num_earlier, x.shape[1])
        rows = packing.pad(x)
        out = short_convolution(rows, earlier=earlier, weight=weights.weight, bias=weights.bias)
        return ConvolvedTokens(packing.pack(out), _last_inputs(earlier, rows, packing))


class ContextRecurrence:
    """A ``RecurrenceBackend`` over the context ranks of ``group``, each of which has spans of rows.

    Only spans that another span of the row follows are exchanged: no row that one rank has whole.
    """

    def __init__(self, group: Group) -> None:
        self._group, self._rank, self._local = group, group_rank(group), LocalRecurrence()

    def scan(
        self,
        tokens: TokenScan,
        *,
        packing: Packing,
        scale: float,
        state: Float[Tensor, "B H K V"] | None,
    ) -> ScannedTokens:
        assert state is None, "in decoding a rank has all tokens of a row"
        exchange = self._exchange(packing, like=tokens.value)
        if exchange.plan.num_sent:
            rows = ScanInputs(*(x[exchange.sent] for x in _pad(tokens, exchange.spans)))
            state = self._states_before(state_change(rows), exchange)
        return self._local.scan(tokens, packing=exchange.spans, scale=scale, state=state)

    def convolve(
        self,
        x: Float[Tensor, "T C"],
        *,
        packing: Packing,
        weights: ConvolutionWeights,
        earlier: Float[Tensor, "B W1 C"] | None,
    ) -> ConvolvedTokens:
        assert earlier is None, "in decoding a rank has all tokens of a row"
        exchange, count = self._exchange(packing, like=x), weights.num_earlier
        plan = exchange.plan
        if plan.num_sent and count:
            assert packing.partition is not None
            last, before = packing.partition.once(
                ("tokens of a convolution", count), lambda: plan.convolution_tokens(count, like=x)
            )
            received = all_gather_rows(_rows_or_zeros(x, last), group=self._group, sizes=plan.sizes)
            earlier = _rows_or_zeros(received.flatten(0, 1), before)
        return self._local.convolve(x, packing=exchange.spans, weights=weights, earlier=earlier)

    def _exchange(self, packing: Packing, *, like: Tensor) -> "_Exchange":
        """Return the exchange of a batch, planned by the first layer that needs it."""
        assert packing.partition is not None, "the token stream is sharded over context ranks"
        return packing.partition.once(
            ("exchange of a recurrence", self._rank),
            lambda: _Exchange.of(packing, rank=self._rank, like=like),
        )

    def _states_before(self, change: StateChange, exchange: "_Exchange") -> Tensor:
        """Return the state before each span: the effects of the spans before it, in order."""
        plan = exchange.plan
        flat = torch.cat([part.flatten(1) for part in change], 1)
        received = all_gather_rows(flat, group=self._group, sizes=plan.sizes)
        # the row after the last is the identity: it stands where a span has fewer before it
        received = torch.cat([received, received.new_zeros(1, received.shape[1])])
        shapes = [part.shape[1:] for part in change]
        decay, added = received.split([shape.numel() for shape in shapes], 1)
        decay, added = decay.unflatten(1, shapes[0]).exp()[..., None], added.unflatten(1, shapes[1])
        state = added.new_zeros(len(plan.spans), *shapes[1])
        for before in exchange.before.unbind(1):
            state = torch.addcmul(added[before], decay[before], state)
        return state


@dataclass(frozen=True, slots=True)
class _Exchange:
    """An exchange plan, and its indices on the device of a batch.

    ``spans`` is the packing of this rank's tokens with one row for each span.
    """

    plan: "_ExchangePlan"
    spans: Packing
    sent: Int[Tensor, "S"]
    before: Int[Tensor, "N depth"]

    @staticmethod
    def of(packing: Packing, *, rank: int, like: Tensor) -> "_Exchange":
        plan = _ExchangePlan.of(packing, rank=rank)
        sent = torch.tensor(plan.sent, dtype=torch.int64, device=like.device)
        before = _index(plan.spans_before(), width=plan.depth, like=like)
        return _Exchange(plan, plan.packing(like.device), sent, before)


@dataclass(frozen=True, slots=True)
class _ExchangePlan:
    """The spans of this rank, and which spans of all ranks are exchanged, in rank order.

    ``sent`` are the numbers of those of this rank, ``sizes`` how many each rank sends, ``lengths``
    their tokens. ``before`` has, for each span of this rank, the exchanged ones before it in its
    row.
    """

    spans: tuple[TokenSpan, ...]
    sent: list[int]
    sizes: list[int]
    before: list[list[int]]
    lengths: list[int]

    @staticmethod
    def of(packing: Packing, *, rank: int) -> "_ExchangePlan":
        assert packing.partition is not None, "the token stream is sharded over context ranks"
        ranks = packing.partition.spans
        end = {span.row: 0 for spans in ranks for span in spans}
        for span in (span for spans in ranks for span in spans):
            end[span.row] = max(end[span.row], span.position + span.length)
        sent = [
            [i for i, span in enumerate(spans) if span.position + span.length < end[span.row]]
            for spans in ranks
        ]
        exchanged = [spans[i] for spans, chosen in zip(ranks, sent, strict=True) for i in chosen]
        by_row: dict[int, list[int]] = {}
        for number in sorted(range(len(exchanged)), key=lambda i: exchanged[i].position):
            by_row.setdefault(exchanged[number].row, []).append(number)
        before = [
            [i for i in by_row.get(span.row, ()) if exchanged[i].position < span.position]
            for span in ranks[rank]
        ]
        sizes, lengths = [len(chosen) for chosen in sent], [span.length for span in exchanged]
        return _ExchangePlan(ranks[rank], sent[rank], sizes, before, lengths)

    @property
    def num_sent(self) -> int:
        """The spans that all ranks exchange; where it is 0 there is no collective."""
        return len(self.lengths)

    @property
    def depth(self) -> int:
        """The most spans before a span, at least 1."""
        return max(1, *map(len, self.before)) if self.before else 1

    def packing(self, device: torch.device) -> Packing:
        """Return the packing of this rank's tokens with one row for each span."""
        lengths = [span.length for span in self.spans]
        return Packing.from_lengths(
            torch.tensor(lengths, dtype=torch.int64, device=device), length=max(lengths, default=1)
        )

    def spans_before(self) -> list[list[int]]:
        """Return ``before`` with ``depth`` entries each, of which the first are the identity."""
        depth = self.depth
        return [[self.num_sent] * (depth - len(spans)) + spans for spans in self.before]

    def convolution_tokens(
        self, count: int, *, like: Tensor
    ) -> tuple[Int[Tensor, "S count"], Int[Tensor, "N count"]]:
        """Return ``last_tokens`` and ``tokens_before`` on the device of ``like``."""
        last, before = self.last_tokens(count), self.tokens_before(count)
        return _index(last, width=count, like=like), _index(before, width=count, like=like)

    def last_tokens(self, count: int) -> list[list[int]]:
        """Return the last tokens of each span to send; -1 before its first."""
        chosen = [self.spans[number] for number in self.sent]
        return [
            [span.start + i if i >= 0 else -1 for i in range(span.length - count, span.length)]
            for span in chosen
        ]

    def tokens_before(self, count: int) -> list[list[int]]:
        """Return the tokens before each span among ``count`` of every exchanged span; -1: none."""
        found = [
            [
                number * count + i
                for number in spans
                for i in range(max(0, count - self.lengths[number]), count)
            ]
            for spans in self.before
        ]
        return [[-1] * (count - len(tokens)) + tokens[-count:] for tokens in found]


def _pad(tokens: TokenScan, packing: Packing) -> ScanInputs:
    return ScanInputs(*(packing.pad(x.flatten(1)).unflatten(2, x.shape[1:]) for x in tokens))


def _last_inputs(earlier: Tensor, rows: Tensor, packing: Packing) -> Float[Tensor, "B W1 C"]:
    """Return the last inputs of each row, of those before and the new ones."""
    count = earlier.shape[1]
    joined = torch.cat([earlier.to(rows.dtype), rows], 1)
    if packing.mask is None:
        return joined[:, joined.shape[1] - count :]
    place = packing.mask.sum(1)[:, None] + torch.arange(count, device=rows.device)
    return joined.gather(1, place[..., None].expand(-1, -1, rows.shape[2]))


def _rows_or_zeros(x: Float[Tensor, "T C"], index: Int[Tensor, "N V"]) -> Float[Tensor, "N V C"]:
    """Return rows of ``x``; zeros for the index -1."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[index]


def _index(rows: list[list[int]], *, width: int, like: Tensor) -> Int[Tensor, "N V"]:
    flat = [number for row in rows for number in row]
    return torch.tensor(flat, dtype=torch.int64, device=like.device).view(len(rows), width)
