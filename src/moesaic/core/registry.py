"""Registry: a folder of named functions (recipes, presets), found by name, listed a line each."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from moesaic.core.errors import UserError, nearest

T = TypeVar("T")
Made = Callable[..., T]


class Registry(Generic[T]):
    """Named functions that make a ``T``. The first line of a docstring is what a listing shows."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._made: dict[str, Made[T]] = {}

    def register(self, name: str | None = None) -> Callable[[Made[T]], Made[T]]:
        """Decorate a function: it becomes ``name``, or its own name with ``-`` for ``_``.

        Raises ValueError for a second function of one name or a function without a docstring.
        """

        def enter(function: Made[T]) -> Made[T]:
            key = name or function.__name__.replace("_", "-")
            known = self._made.get(key, function)
            if _place(known) != _place(function):  # the same place again is a module loaded again
                raise ValueError(f'two {self.noun}s "{key}": {_place(known)}, {_place(function)}')
            if not function.__doc__:
                raise ValueError(f'{self.noun} "{key}" needs a docstring: its first line is listed')
            self._made[key] = function
            return function

        return enter

    def __getitem__(self, name: str) -> Made[T]:
        """Return the function of that name. Raises UserError with the nearest name."""
        key = name.replace("_", "-")
        if key not in self._made:
            raise UserError(
                f'there is no {self.noun} "{name}"{nearest(key, self._made)} '
                f"(known: {', '.join(sorted(self._made)) or 'none'})"
            )
        return self._made[key]

    def __call__(self, name: str, **settings: Any) -> T:
        """Make the named thing: ``recipe("demo", seed=2)``."""
        return self[name](**settings)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.replace("_", "-") in self._made

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._made))

    def __len__(self) -> int:
        return len(self._made)

    def lines(self) -> dict[str, str]:
        """Return name -> first docstring line, in the order of the names."""
        return {name: (self._made[name].__doc__ or "").strip().splitlines()[0] for name in self}


def _place(function: Callable[..., object]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
