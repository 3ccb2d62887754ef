import pytest
import torch
from checkpoint_samples import FORMS, file_with, rewritten, snapshot, written

from moesaic.checkpoint.integrity import IntegrityProblem, check_checkpoint

FORM = pytest.mark.parametrize("form", FORMS)


def with_experts(change):
    up = snapshot().files["model"]["up"].clone()
    change(up)
    return snapshot(up=up)


@FORM
def test_a_sound_checkpoint_has_no_finding(tmp_path, form):
    assert check_checkpoint(written(tmp_path, form)) == []


@FORM
def test_a_nan_and_an_infinity_are_found_in_their_expert(tmp_path, form):
    def spoil(up):
        up[2, 0, 0], up[2, 1, 1], up[3, 2, 1] = float("nan"), float("nan"), float("-inf")

    assert check_checkpoint(written(tmp_path, form, with_experts(spoil))) == [
        IntegrityProblem("model/up/expert-0002", "2 NaN of 6 values"),
        IntegrityProblem("model/up/expert-0003", "1 infinite of 6 values"),
    ]
    half = snapshot(half=torch.tensor([1.0, float("inf"), 0.0]).bfloat16())
    assert check_checkpoint(written(tmp_path / "half", form, half)) == [
        IntegrityProblem("model/half", "1 infinite of 3 values")
    ]


@FORM
def test_an_expert_of_zeros_and_one_that_is_another_are_found(tmp_path, form):
    def spoil(up):
        up[1], up[3] = 0.0, up[0]

    assert check_checkpoint(written(tmp_path, form, with_experts(spoil))) == [
        IntegrityProblem("model/up/expert-0001", "every value is zero", uncertain=True),
        IntegrityProblem(
            "model/up/expert-0003", "the same values as model/up/expert-0000", uncertain=True
        ),
    ]


def test_before_the_first_step_experts_may_be_alike(tmp_path):
    made = snapshot(step=0, up=torch.zeros(4, 3, 2))
    assert check_checkpoint(written(tmp_path, "three shards", made)) == []


@FORM
def test_an_altered_file_is_named_and_no_tensor_is_read_from_it(tmp_path, form):
    path = written(tmp_path, form)
    file = sorted(path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    (found,) = check_checkpoint(path)
    assert (found.location, found.uncertain) == (file.name, False)
    assert "altered" in found.message
    file.unlink()
    assert check_checkpoint(path) == [IntegrityProblem(file.name, "is missing")]


def index_change(name, change):
    """Change the blocks of one tensor in an index."""

    def changed(body):
        for _, tensor, stored in body["tensors"]:
            if tensor == name:
                change(stored["blocks"])
        return body

    return changed


INDEX_DAMAGE = {
    "a missing expert": ("up", lambda b: b.pop(2), "expert 2 is missing"),
    "an expert twice": (
        "up",
        lambda b: b.append(b[1]),
        "[1, 3, 2] at [1, 0, 0] of {1} and [1, 3, 2] at [1, 0, 0] of {1} overlap",
    ),
    "an expert under another number": ("up", lambda b: b[0][1].__setitem__(0, 3), "overlap"),
    "a hole": ("dense", lambda b: b[0][2].__setitem__(0, 4), "it is covered for 16 of 20 values"),
    "out of bounds": ("dense", lambda b: b[0][1].__setitem__(1, 1), "is outside of [5, 4]"),
    "no block": ("dense", lambda b: b.clear(), "it is missing"),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_an_index_that_does_not_add_up_is_named_by_tensor_and_expert(tmp_path, damage):
    name, change, message = INDEX_DAMAGE[damage]
    path = written(tmp_path, "three shards")
    file = file_with(path, "model/up/expert-0001")
    rewritten(path, "index.json", index_change(name, change))
    found = [f for f in check_checkpoint(path) if f.location == f"model/{name}"]
    assert found
    assert message.replace("{1}", file) in found[0].message
    assert not found[0].uncertain


def test_a_shard_that_differs_from_the_index_is_named(tmp_path):
    path = written(tmp_path, "three shards")
    file = file_with(path, "model/dense")
    rewritten(path, file, lambda t: {k: v for k, v in t.items() if k != "model/dense"})
    (found,) = check_checkpoint(path)
    assert found.location == "model/dense"
    assert f"{file}: model/dense cannot be read" in found.message
    rewritten(path, file, lambda t: t | {"model/dense": torch.zeros(4, 5)})
    (found,) = check_checkpoint(path)
    assert "is torch.float32 [4, 5], expected torch.float32 [5, 4]" in found.message
