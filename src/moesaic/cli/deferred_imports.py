"""Imports of a command that wait until its options are known.

``--help`` and a wrong option then need neither torch nor the packages above it::

    with deferred():
        from moesaic.recipes.lookup import find_recipe

Where ``main`` has asked for it (``CommandImports``), such a statement only notes its names; they
are imported just before the command runs. Everywhere else it is an ordinary import. The names may
be used in functions, not at the level of the module.
"""

import builtins
import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Self

_ABSENT = object()


class CommandImports:
    """Context in which the imports of ``deferred()`` wait for ``finish``."""

    _current: "CommandImports | None" = None

    def __init__(self) -> None:
        self.finished = False
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        CommandImports._current = self
        return self

    def __exit__(self, *_: object) -> None:
        CommandImports._current = None

    def finish(self) -> None:
        """Import what waits and give the modules its names."""
        while self._waiting:
            names = self._waiting.pop()
            for name, value in list(names.items()):
                if isinstance(value, _DeferredName):
                    names[name] = value.resolve()
        self.finished = True

    def defer(
        self,
        module: str,
        importer: dict[str, Any],
        _: object = None,
        wanted: tuple[str, ...] | None = (),
        __: int = 0,
    ) -> Any:
        """Stand in for ``__import__``: ``importer`` are the globals of the module that imports."""
        if not any(importer is known for known in self._waiting):
            self._waiting.append(importer)
        return _DeferredModule(module) if wanted else _DeferredName(module, None)


class _DeferredName:
    def __init__(self, module: str, name: str | None) -> None:
        self._module, self._name = module, name

    def __or__(self, _: object) -> "_DeferredName":  # in an annotation: ``Run | None``
        return self

    __ror__ = __or__

    def resolve(self) -> Any:
        module = importlib.import_module(self._module)
        if self._name is None:
            return module
        found = getattr(module, self._name, _ABSENT)
        if found is _ABSENT:
            return importlib.import_module(f"{self._module}.{self._name}")
        return found


class _DeferredModule(ModuleType):
    """What ``from module import name`` sees: any name, without an import."""

    def __getattr__(self, name: str) -> _DeferredName:
        return _DeferredName(self.__name__, name)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Context around import statements at the top of a command's module."""
    current = CommandImports._current
    if current is None or current.finished:
        yield
        return
    original = builtins.__import__
    builtins.__import__ = current.defer
    try:
        yield
    finally:
        builtins.__import__ = original


def finish_imports() -> None:
    """Import what waits, if anything does: a command is about to run."""
    if CommandImports._current is not None:
        CommandImports._current.finish()
