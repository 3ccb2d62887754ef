import math
from itertools import product

import pytest
import torch
from checkpoint_samples import FORMS, snapshot, written

from moesaic.checkpoint.checkpoint_diff import TensorDifference, diff_checkpoints

PAIRS = pytest.mark.parametrize(("one", "other"), list(product(FORMS, FORMS)))


def differing(one, other):
    return [found for found in diff_checkpoints(one, other) if not found.equal]


@PAIRS
def test_the_same_tensors_in_any_two_forms_are_the_same(tmp_path, one, other):
    left, right = written(tmp_path / "l", one), written(tmp_path / "r", other)
    found = list(diff_checkpoints(left, right))
    assert len(found) == 15
    assert all(difference.equal for difference in found)


@PAIRS
def test_a_difference_has_its_size_and_its_expert(tmp_path, one, other):
    up = snapshot().files["model"]["up"].clone()
    norm = up.double().norm()
    up[2, 1, 0] += 3.0
    up[0, 0, 0] -= 1.0
    left = written(tmp_path / "l", one)
    right = written(tmp_path / "r", other, snapshot(up=up))
    (found,) = differing(left, right)
    assert (found.name, found.expert, found.note) == ("model/up", 2, "")
    assert found.largest == pytest.approx(3.0)
    assert found.relative == pytest.approx(math.sqrt(10) / float(norm))


def test_the_reason_is_given_for_what_cannot_be_compared(tmp_path):
    changed = snapshot(dense=torch.zeros(4, 4), more=torch.zeros(1))
    left, right = written(tmp_path / "l", "whole"), written(tmp_path / "r", "three shards", changed)
    notes = {found.name: found.note for found in differing(left, right)}
    assert notes["model/dense"] == "torch.float32 [5, 4] and torch.float32 [4, 4]"
    assert notes["model/more"] == f"not in {left}"
    assert {name for name, note in notes.items() if note == f"not in {left}"} == {
        "model/more",
        "optimizer/m/more",
        "optimizer/step/more",
    }
    back = {found.name: found.note for found in differing(right, left)}
    assert back["model/more"] == f"not in {left}"


def test_a_nan_equals_a_nan_and_nothing_else(tmp_path):
    nan = torch.full((5, 4), float("nan"))
    left = written(tmp_path / "l", "whole", snapshot(dense=nan))
    right = written(tmp_path / "r", "whole", snapshot(dense=nan))
    assert differing(left, right) == []
    (found,) = differing(left, written(tmp_path / "s", "whole"))
    assert found.name == "model/dense"
    assert math.isnan(found.largest)


def test_zeros_that_changed_differ_infinitely():
    assert TensorDifference("x", largest=1.0, relative=math.inf).equal is False
