"""Law: a decoding step costs the same number of operations at any length, and so many per layer.

Operations are counted, not timed.
"""

import pytest
import torch

from cost_counters import OperationCounter
from model.samples import VARIANTS, ids
from moesaic.data.batch import InputRows
from moesaic.data.vocabulary import Vocabulary
from moesaic.model.beam_search import Beam, Greedy
from moesaic.model.generate import DecodingRules, generate
from moesaic.model.transformer import Transformer
from moesaic.nn.decode_state import MIN_ROOM
from moesaic.ops.cpu.cpu_library import load_library

FUSED = ["rotary-top2", "decoder-only"] if load_library().library else []
NAMES = ["dense", "decoder-only-dense-nope", *FUSED]
NAMES += [name for name in VARIANTS if name.startswith("mixer-")]


def steps(model, *, beams, number):
    """The operations of each of so many steps, beams exchanged before it."""
    source, prompt = ids(2, [4, 2], width=4), InputRows.from_lists([[5], [6]])
    found = []
    with torch.inference_mode():
        cache = model.init_cache(model.encode(source), rows=2)
        model.step(prompt, cache)
        cache.reorder(torch.arange(2).repeat_interleave(beams))
        token = InputRows.full(torch.full((2 * beams, 1), 9))
        order = torch.arange(2 * beams).view(2, -1).flip(1).flatten()
        for _ in range(number):
            with OperationCounter() as counted:
                model.step(token, cache)
                if beams > 1:
                    cache.reorder(order)
            found.append(counted)
    return found


def of_depth(name, layers):
    config = VARIANTS[name]
    return Transformer(config.replace(decoder=config.decoder.replace(layers=layers))).eval()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_steps_cost_the_same_at_any_length(name, beams):
    _, _, *later = steps(Transformer(VARIANTS[name]).eval(), beams=beams, number=20)
    assert 20 * beams < MIN_ROOM  # the caches grow once
    assert len({tuple(sorted(each.names.items())) for each in later}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_costs_the_same_and_waits_for_nothing(name):
    counts = [steps(of_depth(name, layers), beams=2, number=3)[-1] for layers in (2, 4, 6)]
    totals = [counted.names.total() for counted in counts]
    assert totals[2] - totals[1] == totals[1] - totals[0] > 0
    assert [counted.waits for counted in counts] == [0, 0, 0]


@pytest.mark.parametrize("search", [Greedy(), Beam(size=3)], ids=["greedy", "beam"])
def test_a_search_costs_the_same_for_each_token_and_any_number_of_sources(search):
    model = Transformer(VARIANTS["dense"]).eval()
    vocabulary = Vocabulary(size=VARIANTS["dense"].vocab_size, eos=2)
    rules = DecodingRules(vocabulary, suppress_tokens=(2,))  # no end

    def cost(rows, tokens):
        source, prompt = ids(rows, [4] * rows, width=4), InputRows.full(torch.full((rows, 1), 5))
        with OperationCounter() as counted:
            generate(model, source, prompt=prompt, search=search, max_tokens=tokens, rules=rules)
        return counted.names.total()

    ten_more = cost(2, 18) - cost(2, 8)
    assert ten_more < 10 * 250  # two layers; the count was 203 when this was written
    # a step in which no beam moves has a few operations less
    assert cost(8, 18) - cost(8, 8) == pytest.approx(ten_more, abs=10 * 6)
