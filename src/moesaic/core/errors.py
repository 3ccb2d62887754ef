"""Errors a user can act on: what it is about, what was found, what was expected, the way out."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave us. The command line prints it as one paragraph, exit code 2."""


class ConfigError(UserError):
    """A config that cannot be used. ``problems`` holds one finished sentence per wrong key."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class DataError(UserError):
    """A corpus, file or language that cannot be read as asked."""


class CheckpointError(UserError):
    """A checkpoint or run directory that is missing, incomplete, altered or of another config."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``'; did you mean "x"?'`` for the closest known name, or an empty string."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if not close:  # difflib is case-sensitive: "topk" is still clearly "TopK"
        folded = {n.casefold(): n for n in names}
        close = [
            folded[c] for c in difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.5)
        ]
    return f'; did you mean "{close[0]}"?' if close else ""
