"""The names that ``import moesaic`` offers."""

import pytest

import moesaic


@pytest.mark.parametrize("name", moesaic.__all__)
def test_a_public_name_is_imported_on_first_use(name: str) -> None:
    assert getattr(moesaic, name) is not None
    assert name in dir(moesaic)


def test_a_name_that_is_not_public_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moesaic.nothing
