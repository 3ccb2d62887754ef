import pytest

from moesaic.core.errors import CheckpointError, ConfigError, DataError, UserError, did_you_mean


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("topk", '; did you mean "TopK"?'),
        ("TOPK", '; did you mean "TopK"?'),
        ("TopKK", '; did you mean "TopK"?'),
        ("expert_choise", '; did you mean "ExpertChoice"?'),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_the_nearest_name_is_offered_and_a_far_one_is_not(name: str, hint: str) -> None:
    assert did_you_mean(name, ["TopK", "ExpertChoice", "Hash"]) == hint


def test_nothing_is_near_to_nothing() -> None:
    assert did_you_mean("x", []) == ""


def test_every_error_of_ours_is_a_user_error() -> None:
    assert all(issubclass(e, UserError) for e in (ConfigError, DataError, CheckpointError))


def test_a_config_error_holds_one_sentence_per_problem() -> None:
    error = ConfigError(["a: one", "b: two"])
    assert error.problems == ("a: one", "b: two")
    assert str(error) == "a: one; b: two"
