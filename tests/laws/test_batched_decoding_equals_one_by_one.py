"""Law: the output of a source does not depend on the other sources of the batch."""

from dataclasses import replace

import pytest
import torch

from model.samples import BASE, RULES, VARIANTS, ids, question
from moesaic.data.batch import InputRows
from moesaic.model.beam_search import Beam, Greedy
from moesaic.model.generate import generate
from moesaic.model.sampling import Sample
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity

SEARCHES = {
    "greedy": Greedy(),
    "sample": Sample(temperature=1.5, top_p=0.9, seed=2),
    "beam": Beam(size=3, n_best=3),
    "beam-long": Beam(size=4, length_penalty=2.0, early_stopping="never", no_repeat_ngram_size=2),
}
LENGTHS = [3, 9, 1]  # one that fills the width, one token, one between; each ends at its own limit
LIMITS = torch.tensor([8, 3, 10])
CAPPED = BASE.replace(moe=MoE(experts=4, limit=Capacity(factor=0.5, minimum=0)))


NAMES = (*VARIANTS, "capped-in-training")
# sampling draws from what greedy search takes the best of; beam-long has what beam has, and more
CASES = [(name, search) for name in NAMES for search in ("sample", "beam-long")]
CASES += [("mixers-of-all-kinds", "greedy"), ("mixers-of-all-kinds", "beam")]


@pytest.mark.parametrize(("name", "search"), CASES)
def test_batched_decoding_equals_one_by_one(name, search):
    model = Transformer((VARIANTS | {"capped-in-training": CAPPED})[name])
    source = ids(3, LENGTHS, width=9)
    tag = torch.tensor([5, 6, 7])
    settings = {"search": SEARCHES[search], "rules": RULES}
    together = generate(model, **question(model, source, tag=tag), max_tokens=LIMITS, **settings)
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        words = InputRows.full(source.values[one, :length])
        asked = question(model, words, tag=tag[one])
        rules = replace(RULES, row_key=torch.tensor([row]))
        (alone,) = generate(model, **asked, max_tokens=LIMITS[one], **settings | {"rules": rules})
        assert [h.ids for h in alone] == [h.ids for h in together[row]]
        for here, there in zip(alone, together[row], strict=True):
            assert here.score == pytest.approx(there.score, abs=1e-4)
