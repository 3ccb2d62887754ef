"""Routes of translations: a text and what it became are read again, both sides at once.

Reading a finished translation routes each token as writing it did, where routing depends on the
token and what came before it alone.
"""

from collections.abc import Iterator, Sequence

from moesaic.evaluate.experts import record_routes
from moesaic.moe.routes import LayerRoutes
from moesaic.serve.translator import Translator

CHUNK = 256  # sentences read at a time


def translation_routes(
    translator: Translator,
    texts: Sequence[str],
    *,
    translations: Sequence[str],
    source: str,
    target: str,
) -> Iterator[tuple[LayerRoutes, ...]]:
    """Yield the routes of up to ``CHUNK`` texts at a time, in order; empty ones have none."""
    pairs = [(a, b) for a, b in zip(texts, translations, strict=True) if a.strip()]
    for start in range(0, len(pairs), CHUNK):
        sources, targets = zip(*pairs[start : start + CHUNK], strict=True)
        batch = translator.batch(sources, targets=targets, source=source, target=target)
        yield record_routes(translator.model, batch)
