"""Whether a checkpoint belongs to a config: every key that differs is named with both values."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moesaic.core.errors import CheckpointError
from moesaic.core.text import iter_leaves

MAX_SHOWN_DIFFERENCES = 8


def config_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return ``{path: (saved, current)}`` of two plain configs; "-" where one has no value."""
    old = {path: str(value) for path, value in iter_leaves(dict(saved), "")}
    new = {path: str(value) for path, value in iter_leaves(dict(current), "")}
    paths = [*old, *(p for p in new if p not in old)]
    return {p: (old.get(p, "-"), new.get(p, "-")) for p in paths if old.get(p) != new.get(p)}


def require_same_config(
    saved: Mapping[str, Any], *, current: Mapping[str, Any], where: Path, ignored: Iterable[str] = ()
) -> None:
    """Raise CheckpointError unless the two plain configs agree.

    ``free`` are paths (``steps``, ``log``: with all that is under them) that may change on resume.
    """
    ignored = tuple(ignored)
    wrong = {
        path: values
        for path, values in config_differences(saved, current).items()
        if not any(path == f or path.startswith(f + ".") for f in ignored)
    }
    if wrong:
        lines = [
            f"{path}: {old} in the checkpoint, {new} now" for path, (old, new) in wrong.items()
        ]
        more = f"; and {len(lines) - MAX_SHOWN_DIFFERENCES} more" if len(lines) > MAX_SHOWN_DIFFERENCES else ""
        raise CheckpointError(
            f"{where} was saved with another config: {'; '.join(lines[:MAX_SHOWN_DIFFERENCES])}{more}. "
            "Resume with the config of the run, or train into a new directory."
        )
