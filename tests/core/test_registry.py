import pytest

from moesaic.core.errors import UserError
from moesaic.core.registry import Registry


def filled() -> Registry[int]:
    numbers: Registry[int] = Registry("number")

    @numbers.register()
    def the_answer(*, plus: int = 0) -> int:
        """Return the answer.

        More about it.
        """
        return 42 + plus

    @numbers.register("pi")
    def three() -> int:
        """About 3."""
        return 3

    return numbers


def test_a_function_is_found_by_its_name() -> None:
    numbers = filled()
    assert numbers("the-answer") == numbers("the_answer") == 42
    assert numbers("the-answer", plus=1) == 43
    assert numbers["pi"]() == 3
    assert list(numbers) == ["pi", "the-answer"]
    assert "pi" in numbers
    assert "three" not in numbers
    assert len(numbers) == 2


def test_a_listing_shows_first_lines() -> None:
    assert filled().descriptions() == {"pi": "About 3.", "the-answer": "Return the answer."}


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match='no number "the-anser"; did you mean "the-answer"') as e:
        filled()("the-anser")
    assert "known: pi, the-answer" in str(e.value)


def test_two_functions_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match='two numbers "pi"'):
        filled().register("pi")(test_a_listing_shows_first_lines)


def test_the_same_function_may_come_again() -> None:
    numbers = filled()
    numbers.register("pi")(numbers["pi"])
    assert len(numbers) == 2


def test_a_function_without_a_docstring_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a docstring"):
        filled().register("bare")(test_the_same_function_may_come_again)
