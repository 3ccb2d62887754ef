"""Join the pairs of two languages by a text that both share in a third one, the pivot."""

from collections.abc import Iterator

from moesaic.corpus.corpus import Corpus
from moesaic.corpus.languages import ENGLISH, resolve_language
from moesaic.corpus.pair import Pair


def has_direction(corpus: Corpus, source: str, target: str) -> bool:
    """Whether the corpus stores the pairs of a direction, or of its reverse."""
    return target in _stored_with(corpus, source)


def pivots(corpus: Corpus, source: str, target: str) -> list[str]:
    """Return the languages that are stored with both, English first."""
    both = _stored_with(corpus, source) & _stored_with(corpus, target) - {source, target}
    return sorted(both, key=lambda code: (code != ENGLISH, code))


def can_be_read(corpus: Corpus, source: str, target: str) -> bool:
    """Whether ``pairs_of_direction`` has anything to read: pairs, or a pivot to join them by."""
    ends = resolve_language(source).code, resolve_language(target).code
    return has_direction(corpus, *ends) or bool(pivots(corpus, *ends))


def pairs_of_direction(corpus: Corpus, source: str, target: str, *, split: str) -> Iterator[Pair]:
    """Yield the pairs of a direction; languages without pairs of their own are joined by a pivot.

    Of several translations of a pivot's text, the first is used. Raises DataError if the corpus has
    neither pairs of the direction nor a language to join them by.
    """
    ends = resolve_language(source).code, resolve_language(target).code
    between = [] if has_direction(corpus, *ends) else pivots(corpus, *ends)
    if not between:
        yield from corpus.iter_pairs(*ends, split=split)
        return
    seen: set[str] = set()
    for pivot in between:
        first: dict[str, Pair] = {}
        for pair in corpus.iter_pairs(pivot, ends[0], split=split):
            first.setdefault(pair.source, pair)
        for pair in corpus.iter_pairs(pivot, ends[1], split=split):
            other = first.get(pair.source)
            if other is not None and other.target not in seen:
                seen.add(other.target)
                yield Pair(other.target, pair.target, *ends, pair.origin, pair.licence)


def _stored_with(corpus: Corpus, code: str) -> set[str]:
    """Return the languages that have pairs with a language."""
    return {t if s == code else s for s, t in corpus.directions if code in (s, t)}
