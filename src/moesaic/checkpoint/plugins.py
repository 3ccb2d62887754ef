"""Plug-ins of a run: Python files of the user that define parts of its config.

A plug-in is found by the class of a config value: one that a file outside of moesaic defines, given
with ``--use FILE.py`` or imported in Python. Its name and hash are recorded, and its text if it is
small. A stored plug-in is never run unless it is given with ``--use`` again.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from moesaic.core.config import Choice, Config
from moesaic.core.errors import CheckpointError, UserError, printable
from moesaic.core.file_reader import KIB, FileKind, FileShape, Sha256, read_bytes
from moesaic.core.files import atomic_write, sha256

MAX_STORED_BYTES = 64 * KIB
_NAME = r"^[\w.-]{1,100}\.py$"
PLUGIN_FILE = FileKind(
    name="plug-in (a Python file)", max_bytes=MAX_STORED_BYTES, error=CheckpointError
)


class Plugin(FileShape):
    """A Python file, the classes of the config that it defines, and whether a run has its text."""

    name: str = Field(pattern=_NAME)
    sha256: Sha256
    choices: tuple[str, ...]
    stored: bool


def record_plugins(config: Config, folder: Path) -> tuple[Plugin, ...]:
    """Return the plug-ins that a config needs; write those of at most 64 KiB to ``folder``.

    Raises UserError: a file name that a record of a run may not have.
    """
    by_file: dict[Path, set[str]] = {}
    for cls in _classes(config):
        file = _file_of(cls)
        if file is not None:
            by_file.setdefault(file, set()).add(cls.__name__)
    return tuple(
        _record(file, tuple(sorted(names)), folder) for file, names in sorted(by_file.items())
    )


def require_loaded(plugins: tuple[Plugin, ...], *, run: Path, folder: Path) -> None:
    """Raise CheckpointError for a plug-in that is not loaded, or is another file of that name."""
    loaded = {
        name: file
        for members in Choice.families.values()
        for name, cls in members.items()
        if (file := _file_of(cls)) is not None
    }
    for plugin in plugins:
        missing = [name for name in plugin.choices if name not in loaded]
        others = {loaded[name] for name in plugin.choices if name in loaded}
        changed = [file for file in sorted(others) if sha256(file) != plugin.sha256]
        if not missing and not changed:
            continue
        what = f"{printable(plugin.name)} (it defines {printable(', '.join(plugin.choices))})"
        stored = folder / plugin.name
        if plugin.stored and stored.is_file():
            way_out = f"Read {stored}, and, if you trust it: --use {stored}"
        else:
            way_out = f"Give the file with --use; its SHA-256 is {plugin.sha256}"
        if missing:
            raise CheckpointError(f"{run} needs the plug-in {what}, which is not loaded. {way_out}")
        raise CheckpointError(f"{run} was trained with another {what} than {changed[0]}. {way_out}")


def _classes(value: object) -> Iterator[type[Config]]:
    if isinstance(value, Config):
        if isinstance(value, Choice):
            yield type(value)
        for name in type(value).model_fields:
            yield from _classes(getattr(value, name))
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _classes(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _classes(inner)


def _file_of(cls: type) -> Path | None:
    """Return the Python file that defines a class, unless it is a part of moesaic."""
    if cls.__module__.partition(".")[0] == "moesaic":
        return None
    name = vars(sys.modules.get(cls.__module__, sys)).get("__file__")
    file = Path(name) if isinstance(name, str) else None
    return file if file is not None and file.is_file() and file.suffix == ".py" else None


def _record(file: Path, choices: tuple[str, ...], folder: Path) -> Plugin:
    if not re.fullmatch(_NAME, file.name):
        raise UserError(
            f"--use {printable(file.name)}: a run cannot record this name, expected letters, "
            "digits, _, . and -, at most 103 characters; rename the file"
        )
    stored = file.stat().st_size <= MAX_STORED_BYTES
    if stored and (folder / file.name).resolve() != file.resolve():
        atomic_write(folder / file.name, read_bytes(file, PLUGIN_FILE))
    return Plugin(name=file.name, sha256=sha256(file), choices=choices, stored=stored)
