"""Error classes for user errors: messages give the thing, what was found, what was expected."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input; the command line prints it and exits with code 2."""


class ConfigError(UserError, ValueError):
    """A config that cannot be used. ``problems`` holds one finished sentence per wrong key.

    Also a ValueError, so that one raised inside a pydantic validator is given its path.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


class FileError(UserError):
    """A file or directory that the operating system does not let us read or write."""


class DataError(UserError):
    """A corpus, file or language that cannot be read as asked."""


class CheckpointError(UserError):
    """A checkpoint or run directory that is missing, incomplete, altered or of another config."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``'; did you mean "x"?'`` for the closest known name, or an empty string."""
    folded = {str(k).casefold(): str(k) for k in known}  # "topk" is close to "TopK"
    close = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.5)
    return f'; did you mean "{folded[close[0]]}"?' if close else ""


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """Return the first names and the number of the others: ``a, b and 3 more``."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def printable(text: str, *, limit: int = 60) -> str:
    """Return ``text`` for one line of a message: shortened, control characters as escapes."""
    short = text if len(text) <= limit else text[: limit - 3] + "..."
    if short.isprintable():
        return short
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)
