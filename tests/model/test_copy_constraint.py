import itertools
import math

import pytest
import torch

from moesaic.data.copy_units import CopyUnit, insert_slots
from moesaic.data.tokenizer import CopyTokens
from moesaic.model.beam_search import Beam, Greedy, Search, SearchInputs
from moesaic.model.copy_constraint import CopyConstraint

V, EOS = 12, 2
TOKENS = CopyTokens(ids=(6, 7, 8, 9), slot_of=(0, 0, 1, 1))


def constraint(*units: tuple[CopyUnit, ...], limit: int = 20) -> CopyConstraint:
    limits = torch.full((len(units),), limit)
    return CopyConstraint(TOKENS, units=units, max_tokens=limits, eos=EOS)


def reference_constraint(
    log_prob: list[float], *, written: list[int], units: tuple[CopyUnit, ...], limit: int
) -> list[float]:
    """The definition, for one hypothesis."""
    slot = dict(zip(TOKENS.ids, TOKENS.slot_of, strict=True))
    used = [sum(slot.get(i) == s for i in written) for s in range(TOKENS.slots)]
    missing = [units[s].count - used[s] for s in range(TOKENS.slots)]
    allowed = [
        s
        for s in range(TOKENS.slots)
        if missing[s] > 0 and (not units[s].after or sum(used[b] for b in units[s].after) > used[s])
    ]
    result = [
        -math.inf if i in slot and slot[i] not in allowed else p for i, p in enumerate(log_prob)
    ]
    mass = sum(math.exp(result[i]) for i in slot)
    if any(m > 0 for m in missing) and mass:
        gain = math.log((mass + math.exp(log_prob[EOS])) / mass)
        forced = limit - len(written) - 1 <= sum(m for m in missing if m > 0)
        for i in range(len(result)):
            if i in slot:
                result[i] += gain
            elif forced or i == EOS:
                result[i] = -math.inf
    return result


@pytest.mark.parametrize("limit", [3, 20])
def test_the_constraint_equals_its_definition(limit: int) -> None:
    torch.manual_seed(0)
    units = (CopyUnit("a", 2), CopyUnit("b", 2, after=(0,)))
    for written in itertools.product([5, 6, 8], repeat=3):
        log_prob = torch.randn(1, V).log_softmax(-1)
        ids = torch.tensor([written])
        found = constraint(units, limit=limit)(ids, torch.zeros(1, dtype=torch.long), log_prob)
        expected = reference_constraint(
            log_prob[0].tolist(), written=list(written), units=units, limit=limit
        )
        assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_probability_is_not_created() -> None:
    log_prob = torch.randn(1, V).log_softmax(-1)
    units = (CopyUnit("a", 1), CopyUnit("b", 1))
    found = constraint(units)(torch.empty(1, 0, dtype=torch.long), torch.tensor([0]), log_prob)
    assert float(found.logsumexp(-1)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("search", [Greedy(), Beam(size=3, n_best=3)], ids=["greedy", "beam"])
@pytest.mark.parametrize("limit", [5, 12])
def test_every_answer_holds_its_units_exactly(search: Search, limit: int) -> None:
    torch.manual_seed(1)
    sources = ["%s of %d", "none", "<b>x</b> <b>y</b>"]
    units = [insert_slots(text, slots=2).units for text in sources]
    limits = torch.full((3,), limit)
    inputs = SearchInputs(
        logits=torch.randn(3, V),
        step=lambda ids: torch.randn(ids.shape[0], V) * 3,
        reorder_cache=lambda *_: None,
        max_tokens=limits,
        suppressed=torch.zeros(0, dtype=torch.long),
        ends=(EOS,),
        processors=(CopyConstraint(TOKENS, units=units, max_tokens=limits, eos=EOS),),
    )
    slot = dict(zip(TOKENS.ids, TOKENS.slot_of, strict=True))
    first, second, third = (
        [[slot[i] for i in h.ids if i in slot] for h in hypotheses] for hypotheses in search(inputs)
    )
    assert all(found == [0, 1] for found in first)  # in order: %s, then %d
    assert all(found == [] for found in second)
    # </b> is slot 0; each comes after its <b>
    assert all(
        sorted(found) == [0, 0, 1, 1] and found[0] == 1 and found[-1] == 0 for found in third
    )
