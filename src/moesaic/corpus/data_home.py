"""The data home: the folder of downloaded packages, built corpora and token shards.

It is ``$MOESAIC_HOME`` if that is set; else ``data`` in the current folder, if moesaic has written
it (a project that keeps its data beside it); else ``moesaic`` in the user's data folder. See
``docs/decisions/0016-data-home-in-the-users-folder.md``.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from moesaic.core.errors import DataError

_PARTS = ("corpora", "packages", "shards")


@dataclass(frozen=True, slots=True)
class DataHome:
    """The data home, and the reason why it is this folder."""

    path: Path
    reason: str


def find_data_home() -> DataHome:
    """Return the data home; nothing is created.

    Raises DataError where neither ``$MOESAIC_HOME`` nor a home directory of the user is known.
    """
    given = os.environ.get("MOESAIC_HOME")
    if given:
        return DataHome(_expanded(given), "MOESAIC_HOME")
    here = Path("data")
    if any((here / part).is_dir() for part in _PARTS):
        return DataHome(here, "moesaic's data in this folder")
    return DataHome(user_data_home(), "the user's data folder")


def user_data_home() -> Path:
    """Return moesaic's folder among the user's data, whether it is the data home or not."""
    return _user_data_folder() / "moesaic"


def data_home() -> Path:
    """Return the path of the data home. Raises DataError as ``find_data_home``."""
    return find_data_home().path


def corpora_dir() -> Path:
    """Return the folder of built corpora."""
    return data_home() / "corpora"


def packages_dir() -> Path:
    """Return the folder of downloaded packages."""
    return data_home() / "packages"


def _user_data_folder() -> Path:
    """Return the folder for data by the XDG base directory specification, or the system's own."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _expanded("~/AppData/Local"))
    if sys.platform == "darwin":
        return _expanded("~/Library/Application Support")
    given = os.environ.get("XDG_DATA_HOME", "")
    # the specification: a relative path is invalid and to be ignored
    return Path(given) if os.path.isabs(given) else _expanded("~/.local/share")


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"{path}: the user's home directory is not known; set MOESAIC_HOME to a folder for "
            "packages, corpora and token shards"
        ) from error
