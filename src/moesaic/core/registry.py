"""Registry of named factory functions (recipes, presets)."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from moesaic.core.errors import UserError, did_you_mean

T = TypeVar("T")
Factory = Callable[..., T]


class Registry(Generic[T]):
    """Named functions that return a ``T``, listed with the first line of their docstrings."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._factories: dict[str, Factory[T]] = {}

    def register(self, name: str | None = None) -> Callable[[Factory[T]], Factory[T]]:
        """Register the decorated function as ``name`` (default: its own name), ``-`` for ``_``.

        Raises ValueError for a second function of one name or a function without a docstring.
        """

        def enter(function: Factory[T]) -> Factory[T]:
            key = (name or function.__name__).replace("_", "-")
            places = [_qualified_name(f) for f in (self._factories.get(key, function), function)]
            if places[0] != places[1]:  # equal for a reloaded module
                raise ValueError(f'two {self.kind}s "{key}": {places[0]}, {places[1]}')
            if not function.__doc__:
                raise ValueError(f'{self.kind} "{key}" needs a docstring: its first line is listed')
            self._factories[key] = function
            return function

        return enter

    def __getitem__(self, name: str) -> Factory[T]:
        """Return the function of that name. Raises UserError with the nearest name."""
        key = name.replace("_", "-")
        if key not in self._factories:
            raise UserError(
                f'there is no {self.kind} "{name}"{did_you_mean(key, self._factories)} '
                f"(known: {', '.join(sorted(self._factories)) or 'none'})"
            )
        return self._factories[key]

    def __call__(self, name: str, **settings: Any) -> T:
        """Call the function of that name: ``recipe("demo", seed=2)``."""
        return self[name](**settings)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.replace("_", "-") in self._factories

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._factories))

    def __len__(self) -> int:
        return len(self._factories)

    def descriptions(self) -> dict[str, str]:
        """Return name -> first docstring line, in the order of the names."""
        return {
            name: (self._factories[name].__doc__ or "").strip().splitlines()[0] for name in self
        }


def _qualified_name(function: Callable[..., object]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
