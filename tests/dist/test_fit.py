"""Times become a line."""

import pytest

from moesaic.core.errors import UserError
from moesaic.dist.fit import Cost, fit


def test_times_on_a_line_are_explained_whole() -> None:
    fitted = fit([1, 10, 100, 1000], [Cost(0.5, 0.02).seconds(n) for n in (1, 10, 100, 1000)])
    assert fitted.cost.alpha == pytest.approx(0.5)
    assert fitted.cost.beta == pytest.approx(0.02)
    assert fitted.explained == pytest.approx(1)


def test_a_line_goes_between_times_that_scatter() -> None:
    fitted = fit([0, 0, 2, 2], [1, 3, 5, 7])
    assert fitted.cost == Cost(2, 2)
    assert fitted.explained == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("seconds", "expected"), [([3, 2, 1], Cost(2, 0)), ([0, 1, 3], Cost(0, 1))]
)
def test_no_cost_is_negative(seconds: list[float], expected: Cost) -> None:
    assert fit([0, 1, 2] if expected.beta == 0 else [0.0, 1.0, 3.0], seconds).cost == expected


def test_a_negative_start_is_no_start() -> None:
    fitted = fit([1, 2, 3], [0.5, 2, 3.5])
    assert fitted.cost == Cost(0, pytest.approx(15 / 14))


def test_one_size_is_refused() -> None:
    with pytest.raises(UserError, match="2 times of 1 different sizes"):
        fit([4, 4], [1, 2])
