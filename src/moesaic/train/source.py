"""CorpusSource: where the text of a run comes from."""

from pathlib import Path

from moesaic.core.config import Choice
from moesaic.data.build import build_corpus
from moesaic.data.builders.named import CorpusRecipe
from moesaic.data.corpus import Corpus


class CorpusSource(Choice):
    """Family: ``Catalogue`` (a corpus with a name), ``BuiltCorpus``, ``CorpusFolder`` (on disk)."""

    def open(self) -> Corpus:
        """Return the corpus, building it first where that is possible. Raises DataError."""
        raise NotImplementedError


class NamedCorpus(CorpusSource):
    """A corpus with a name, e.g. ``catalogues-small``; built once, under the data home."""

    name: str

    def open(self) -> Corpus:
        return build_corpus(self.name)


class BuiltCorpus(CorpusSource):
    """A corpus built by a recipe of one's own (one's files, say), once, under the data home."""

    recipe: CorpusRecipe

    def open(self) -> Corpus:
        return build_corpus(self.recipe)


class CorpusFolder(CorpusSource):
    """A corpus directory (with its ``corpus.json``), for text of one's own."""

    path: str

    def open(self) -> Corpus:
        return Corpus.open(Path(self.path))
