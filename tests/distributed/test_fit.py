"""Times become a line."""

import pytest

from moesaic.core.errors import UserError
from moesaic.distributed.communication_cost import LinearCost, fit_cost


def test_times_on_a_line_are_explained_whole() -> None:
    fitted = fit_cost(
        [1, 10, 100, 1000], [LinearCost(0.5, 0.02).seconds(n) for n in (1, 10, 100, 1000)]
    )
    assert fitted.cost.alpha == pytest.approx(0.5)
    assert fitted.cost.beta == pytest.approx(0.02)
    assert fitted.r_squared == pytest.approx(1)


def test_a_line_goes_between_times_that_scatter() -> None:
    fitted = fit_cost([0, 0, 2, 2], [1, 3, 5, 7])
    assert fitted.cost == LinearCost(2, 2)
    assert fitted.r_squared == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("seconds", "expected"), [([3, 2, 1], LinearCost(2, 0)), ([0, 1, 3], LinearCost(0, 1))]
)
def test_no_cost_is_negative(seconds: list[float], expected: LinearCost) -> None:
    assert fit_cost([0, 1, 2] if expected.beta == 0 else [0.0, 1.0, 3.0], seconds).cost == expected


def test_a_negative_start_is_no_start() -> None:
    fitted = fit_cost([1, 2, 3], [0.5, 2, 3.5])
    assert fitted.cost == LinearCost(0, pytest.approx(15 / 14))


def test_one_size_is_refused() -> None:
    with pytest.raises(UserError, match="2 times of 1 different sizes"):
        fit_cost([4, 4], [1, 2])
