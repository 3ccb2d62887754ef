"""Copy constraint: an answer holds each copy unit of its source exactly as often as the source.

A logits processor of the search. Slots that a source does not have, or that are used up, are
forbidden; the answer cannot end while a slot is missing. The probability of ending goes to the
missing slots, in proportion to their own, so that a model that wants to end writes them.

Letters: B sources, R hypotheses, L tokens generated so far, V vocabulary, S slots, C copy tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.copy_units import CopyUnit
from moesaic.data.tokenizer import CopyTokens
from moesaic.model.generate import DecodingRules


class CopyConstraint:
    """The constraint for a batch of sources: the units and the limit of tokens of each."""

    def __init__(
        self,
        tokens: CopyTokens,
        *,
        units: Sequence[Sequence[CopyUnit]],
        max_tokens: Int[Tensor, "B"],
        eos: int,
    ) -> None:
        device, slots = max_tokens.device, tokens.slots
        self._ids = torch.tensor(tokens.ids, device=device)  # [C]
        self._slots = torch.tensor(tokens.slot_of, device=device)  # [C]
        self._max_tokens, self._eos = max_tokens, eos
        self._needed = torch.zeros(len(units), slots, dtype=torch.long)  # [B, S]
        self._after = torch.zeros(len(units), slots, slots)  # [B, slot, slot before it]
        for row, found in enumerate(units):
            for slot, unit in enumerate(found):
                self._needed[row, slot] = unit.count
                before = [s for s in unit.after if found[s].count]
                self._after[row, slot, before] = 1
        self._needed, self._after = self._needed.to(device), self._after.to(device)

    def __call__(
        self, ids: Int[Tensor, "R L"], source: Int[Tensor, "R"], log_prob: Float[Tensor, "R V"]
    ) -> Float[Tensor, "R V"]:
        """Return the log-probabilities of the next token under the constraint."""
        used = self._used(ids)
        missing, after = self._needed[source] - used, self._after[source]
        written_before = (after @ used.float()[:, :, None]).squeeze(2)
        in_order = (after.sum(2) == 0) | (written_before > used)
        allowed = (missing > 0) & in_order  # [R, S]
        copies = log_prob[:, self._ids].masked_fill(~allowed[:, self._slots], float("-inf"))
        mass, end = copies.logsumexp(1), log_prob[:, self._eos]
        wanted = (missing > 0).any(1) & mass.isfinite()
        # mass of the copies becomes their own and that of the end
        gain = torch.where(wanted, torch.logaddexp(mass, end) - mass, 0.0)
        left = self._max_tokens[source] - ids.shape[1] - 1  # after this token
        forced = wanted & (left <= missing.clamp(min=0).sum(1))
        result = log_prob.masked_fill(forced[:, None], float("-inf"))
        result[:, self._ids] = copies + gain[:, None]
        result[:, self._eos] = torch.where(wanted, float("-inf"), end)
        return result

    def _used(self, ids: Int[Tensor, "R L"]) -> Int[Tensor, "R S"]:
        """Return how often each slot has been written."""
        written = ids[:, :, None] == self._ids  # [R, L, C]
        used = torch.zeros_like(self._needed[:1]).repeat(len(ids), 1)
        return used.index_add_(1, self._slots, written.sum(1))


def copy_rules(
    rules: DecodingRules,
    tokens: CopyTokens,
    *,
    units: Sequence[Sequence[CopyUnit]],
    max_tokens: Int[Tensor, "B"],
) -> DecodingRules:
    """Add the constraint to the rules of a batch; without copy units they stay as they are."""
    if not tokens.ids:
        return rules
    constraint = CopyConstraint(
        tokens, units=units, max_tokens=max_tokens, eos=rules.vocabulary.eos
    )
    return replace(rules, processors=(*rules.processors, constraint))
