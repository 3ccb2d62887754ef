"""Python files of the user (``--use``): their classes become choices of configs."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from moesaic.core.errors import UserError


def import_user_files(files: Sequence[Path] | None) -> None:
    """Import Python files, which registers the config choices, recipes, ... that they define.

    Raises UserError: no such file, or one that cannot be imported, with its line.
    """
    for file in files or ():
        _import_user_file(file)


def _import_user_file(file: Path) -> None:
    if not file.is_file():
        what = "is a folder, expected a Python file" if file.is_dir() else "there is no such file"
        raise UserError(f"--use {file}: {what}")
    if file.suffix != ".py":
        raise UserError(f"--use {file}: expected a Python file, with a name that ends in .py")
    name = f"moesaic_user_{file.stem}_{_short_hash(str(file.resolve()))}"  # hides no other module
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a SystemExit of the file as well
        del sys.modules[name]
        raise UserError(f"--use {file}: {_describe(error, file)}") from error


def _describe(error: BaseException, file: Path) -> str:
    """Return ``line 3: NameError: ...``, the last line of the file that the error went through."""
    reason = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}" if error.lineno else f"not Python: {reason}"
    if isinstance(error, UserError):
        return reason
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}{f': {reason}' if reason else ''}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
