"""The Jaccard index of character 3-grams, by its definition."""

from moesaic.corpus.split import character_trigrams


def jaccard(a: str, b: str) -> float:
    """Return the Jaccard index of two texts: shared 3-grams over all 3-grams."""
    first, second = character_trigrams(a), character_trigrams(b)
    return len(first & second) / len(first | second)
