"""Clean-up after a failed start: what a job wrote in its run directory is removed again.

The next try then finds the directory as the first one did. What was there before stays: files of
the user, and the run that was to be resumed.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.files import atomic_write
from moesaic.distributed.world import World


@contextmanager
def nothing_left_on_failure(run_dir: RunDir, *, world: World) -> Iterator[None]:
    """Remove the files of a run that the body made, on any exception in it, on rank 0.

    The job must hold the run's lock, which is not touched. A config that was replaced is restored.
    """
    if world.rank:
        yield
        return
    before = {path for path in run_dir.paths() if path.exists()}
    config = run_dir.config.read_bytes() if run_dir.config.is_file() else None
    try:
        yield
    except BaseException:
        with suppress(OSError):  # an error of the clean-up must not replace the first one
            for path in {*run_dir.paths()} - before - {run_dir.lock}:
                _remove(path)
            if config is not None and run_dir.config.read_bytes() != config:
                atomic_write(run_dir.config, config)
        raise


@contextmanager
def empty_folders_removed(path: Path) -> Iterator[None]:
    """Remove the folders of ``path`` that are missing now, if they are empty after the body."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    finally:
        with suppress(OSError):  # the first that is not empty ends it
            for folder in missing:
                folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
