import json

import numpy as np
import pytest
import torch

from moesaic.core.errors import DataError
from moesaic.monitor.expert_usage import LogitStats, UsageCounter, read_usage

LANGUAGES = ("deu_Latn", "ces_Latn", "ukr_Cyrl")


def edges(seed, n=200, num_experts=4):
    make = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, num_experts + 1, (n,), generator=make)
    return expert, torch.randint(0, 3, (n,), generator=make)


def counted(*seeds):
    counts = UsageCounter(LANGUAGES)
    for seed in seeds:
        for layer in ("encoder.1", "decoder.1"):
            expert, language = edges(seed)
            counts.add_edges(
                layer,
                expert=expert,
                language=language,
                num_experts=4,
                late=torch.arange(200) >= 100,
                logit_stats=LogitStats(logit_rms=seed + 1.0),
            )
    return counts


def test_counts_equal_a_count_by_hand():
    expert, language = edges(0)
    (layer, _) = counted(0).layers()
    pairs = list(zip(expert.tolist(), language.tolist(), strict=True))
    assert layer.layer == "encoder.1"
    for e in range(4):
        for g in range(3):
            assert layer.counts[e, g] == pairs.count((e, g))
    assert [pairs.count((4, g)) for g in range(3)] == layer.dropped.tolist()
    assert layer.dropped_late == (expert[100:] == 4).sum()
    assert layer.edges == 200


def test_counts_of_ranks_add_up_to_those_of_one():
    whole, parts = counted(0, 1, 2), [counted(0), counted(1, 2)]
    together = UsageCounter(LANGUAGES)
    for part in parts:
        together.merge(part.tensors())
    assert together.tensors().keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        assert torch.equal(together.tensors()[name], tensor)


def test_merging_leaves_the_other_alone():
    other, mine = counted(0), UsageCounter(LANGUAGES)
    mine.merge(other.tensors())
    mine.merge(other.tensors())
    assert other.layers()[0].edges == 200
    mine.reset()
    assert mine.layers() == ()


def test_scales_are_averaged_over_calls_and_unknown_ones_stay_unknown():
    layer = counted(0, 1).layers()[0]
    assert layer.logit_rms == pytest.approx(((1 + 4) / 2) ** 0.5)
    assert layer.router_entropy is None


def test_the_file_holds_what_was_counted(tmp_path):
    counts = counted(0, 1)
    counts.write(tmp_path / "usage.json")
    usage = read_usage(tmp_path / "usage.json")
    assert usage.languages == LANGUAGES
    for read, layer in zip(usage.layers, counts.layers(), strict=True):
        assert np.array_equal(read.counts, layer.counts)
        assert np.array_equal(read.dropped, layer.dropped)
        assert (read.layer, read.dropped_late, read.logit_rms) == (
            layer.layer, layer.dropped_late, layer.logit_rms,
        )  # fmt: skip


def test_a_value_that_json_lacks_is_left_out_of_the_file(tmp_path):
    counts = UsageCounter(LANGUAGES)
    expert, language = edges(0)
    counts.add_edges(
        "a",
        expert=expert,
        language=language,
        num_experts=4,
        logit_stats=LogitStats(logit_rms=float("nan")),
    )
    counts.write(tmp_path / "usage.json")
    json.loads((tmp_path / "usage.json").read_text(), parse_constant=pytest.fail)
    assert read_usage(tmp_path / "usage.json").layers[0].logit_rms is None


def test_a_model_without_experts_writes_an_empty_file(tmp_path):
    UsageCounter(LANGUAGES).write(tmp_path / "usage.json")
    assert read_usage(tmp_path / "usage.json").layers == ()


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 9}', '{"format": 1, "languages": ["a"], "layers": [{"layer": "x"}]}'],
)
def test_a_file_that_is_no_usage_file_is_named(tmp_path, text):
    (tmp_path / "usage.json").write_text(text)
    with pytest.raises(DataError, match=r"usage\.json"):
        read_usage(tmp_path / "usage.json")
