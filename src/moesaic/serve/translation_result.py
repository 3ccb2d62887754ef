"""Translation results: the answer to a text, its alternatives, and what went wrong with it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moesaic.core.errors import listed


@dataclass(frozen=True, slots=True)
class Alternative:
    """One hypothesis of a search: its text and its length-normalised log-probability."""

    text: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslationResult:
    """The best hypothesis of a text, and all of them (``alternatives``, the best one included).

    Of a text that was split, texts are joined and scores are means over its parts.

    ``parts``: how many parts it was translated in, ``forced_cuts`` of them cut off elsewhere than
    at the end of a sentence. ``truncated``: only the beginning of the source was translated.
    ``finished``: false if the output was cut off at the maximum length. ``repeats``: the output
    repeats a passage again and again, and the source does not. ``trained``: whether the model was
    trained in this direction; None if the run has no record of it.
    """

    text: str
    score: float
    alternatives: tuple[Alternative, ...] = ()
    truncated: bool = False
    finished: bool = True
    repeats: bool = False
    parts: int = 1
    forced_cuts: int = 0
    trained: bool | None = None


# what is said of results, and which it is true of
_NOTES: tuple[tuple[str, Callable[[TranslationResult], bool]], ...] = (
    ("longer than the model's limit: translated in parts and joined", lambda r: r.parts > 1),
    ("cut elsewhere than at the end of a sentence, for want of one", lambda r: r.forced_cuts > 0),
    ("longer than the model's limit: only the beginning was translated", lambda r: r.truncated),
    ("the translation was cut off at the length limit", lambda r: not r.finished),
    (
        "the translation repeats a passage again and again (no_repeat_ngram_size of the search "
        "blocks this)",
        lambda r: r.repeats,
    ),
)


def describe_results(results: Sequence[TranslationResult]) -> Iterator[str]:
    """Yield a sentence for each limit or fault that results met, with their lines' numbers."""
    for what, is_true in _NOTES:
        lines = [number for number, result in enumerate(results, start=1) if is_true(result)]
        if lines:
            plural = "s" if len(lines) > 1 else ""
            shown = listed(map(str, lines))
            yield f"line{plural} {shown} ({len(lines)} of {len(results)}): {what}"
