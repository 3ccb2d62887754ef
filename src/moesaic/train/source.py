"""CorpusSource: where the text of a run comes from."""

from pathlib import Path

from moesaic.core.config import Choice
from moesaic.data.build import build
from moesaic.data.corpus import Corpus


class CorpusSource(Choice):
    """Family: ``Catalogue`` (a corpus we know how to build) or ``CorpusFolder`` (one on disk)."""

    def open(self) -> Corpus:
        """Return the corpus, building it first where that is possible. Raises DataError."""
        raise NotImplementedError


class Catalogue(CorpusSource):
    """A corpus with a name, e.g. ``catalogues-small``; built once, under the data home."""

    name: str

    def open(self) -> Corpus:
        return build(self.name)


class CorpusFolder(CorpusSource):
    """A corpus directory (with its ``corpus.json``), for text of one's own."""

    path: str

    def open(self) -> Corpus:
        return Corpus.open(Path(self.path))
