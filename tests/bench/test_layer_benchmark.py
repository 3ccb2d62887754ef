"""All implementations compute the same layer, and the result has what its table needs."""

import importlib.util

import pytest
import torch

from moesaic.bench.layer_benchmark import (
    IMPLEMENTATIONS,
    LayerBenchmark,
    implementation_names,
    run_layer_benchmark,
)
from moesaic.bench.layer_workload import (
    LAYER_SHAPES,
    LayerShape,
    UnavailableImplementation,
    make_workload,
    saved_bytes,
)
from moesaic.bench.machine_info import machine_info
from moesaic.core.errors import UserError

TINY = LayerShape(24, 16, 12, 4, 2)
OURS = ["moesaic", "unfused-sequential", "unfused-grouped_mm"]
OPTIONAL = {"hf-grouped_mm": "transformers", "hf-eager": "transformers", "deepspeed": "deepspeed"}


@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
@pytest.mark.parametrize("skew", ["none", "zipf"])
def test_every_path_of_ours_gives_the_same_answer(passes, skew):
    problem = make_workload(TINY, passes=passes, skew=skew)
    answers = [IMPLEMENTATIONS[name](problem).run() for name in OURS]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPTIONAL)
def test_another_library_gives_our_answer_or_says_how_to_install_it(name):
    problem = make_workload(TINY, passes="forward")
    made = IMPLEMENTATIONS[name](problem)
    if importlib.util.find_spec(OPTIONAL[name]) is None:
        assert isinstance(made, UnavailableImplementation)
        assert "pip install" in made.reason
    else:
        torch.testing.assert_close(
            made.run(), IMPLEMENTATIONS["moesaic"](problem).run(), rtol=1e-3, atol=1e-3
        )


def test_a_result_has_ratios_bytes_and_the_machine():
    found = run_layer_benchmark(
        LayerBenchmark(TINY, against=["unfused", "hf-eager"], rounds=2, threads=1)
    )
    rows = found["implementations"]
    assert {"dense", "moesaic", "unfused-sequential"} <= rows.keys()
    assert found["dense"] == "dense"
    assert rows["dense"]["of_dense"]["median"] == 1.0
    assert rows["moesaic"]["of_moesaic"]["median"] == 1.0
    assert rows["unfused-sequential"]["differs_by"] < 1e-3
    assert rows["moesaic"]["saved_bytes"] >= found["least_saved_bytes"] == 4 * TINY.min_saved_values
    assert {*rows, *found["unavailable"]} == set(found["settings"]["against"])
    assert found["machine"]["load_before"] >= 0


def test_few_rows_per_expert_are_compared_with_reading_the_weights():
    assert "read-weights" in implementation_names(
        LayerBenchmark(LAYER_SHAPES["C"], passes="forward")
    )
    assert "read-weights" not in implementation_names(
        LayerBenchmark(LAYER_SHAPES["A"], passes="forward")
    )
    found = run_layer_benchmark(LayerBenchmark(TINY, passes="forward", against=[], rounds=1))
    assert found["implementations"]["read-weights"]["of_dense"]["median"] > 0
    assert found["implementations"]["read-weights"]["differs_by"] is None


def test_threads_are_given_back():
    before = torch.get_num_threads()
    found = run_layer_benchmark(LayerBenchmark(TINY, against=[], rounds=1, threads=before + 1))
    assert found["settings"]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="deepspeed"):
        implementation_names(LayerBenchmark(TINY, against=["depspeed"]))


def test_ours_keeps_less_than_the_composed_path():
    problem = make_workload(LayerShape(64, 32, 64, 4, 2), passes="forward+backward")
    ours, unfused = (saved_bytes(IMPLEMENTATIONS[n](problem)) for n in ("moesaic", OURS[1]))
    assert ours <= unfused


def test_the_machine_says_what_it_is():
    found = machine_info()
    assert found["cores"] >= 1
    assert found["torch"].startswith(torch.__version__.partition("+")[0])
