"""The data folders: packages, corpora and token shards under ``$MOESAIC_HOME``."""

import os
from pathlib import Path


def data_home() -> Path:
    """Return ``$MOESAIC_HOME``, or ``./data``."""
    return Path(os.environ.get("MOESAIC_HOME") or "data")


def corpora_dir() -> Path:
    """Return the folder of built corpora."""
    return data_home() / "corpora"


def packages_dir() -> Path:
    """Return the folder of downloaded packages."""
    return data_home() / "packages"
