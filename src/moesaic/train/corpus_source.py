"""Corpus source: which parallel corpus a run reads, by name, by recipe or by folder."""

from pathlib import Path

from moesaic.core.config import Choice
from moesaic.core.names import FileName
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.data_home import corpora_dir
from moesaic.corpus.sources.text_source import Progress, ignore_progress


class CorpusSource(Choice):
    """Training text: ``NamedCorpus`` (by name), ``BuiltCorpus`` (a recipe), ``CorpusFolder``."""

    def open(self, progress: Progress = ignore_progress) -> Corpus:
        """Return the corpus, building it first if needed. Raises DataError.

        ``progress`` is called with a line of text after each file and part that is built.
        """
        raise NotImplementedError

    def folder(self) -> Path | None:
        """Return the directory of the corpus, whether it exists or not; None: not known.

        A relative path is from the folder where the run was trained.
        """
        return None


class NamedCorpus(CorpusSource):
    """A predefined corpus, e.g. ``catalogues-small``; built once, in the data directory."""

    name: FileName

    def open(self, progress: Progress = ignore_progress) -> Corpus:
        return build_corpus(self.name, progress=progress)

    def folder(self) -> Path:
        return corpora_dir() / self.name


class BuiltCorpus(CorpusSource):
    """A corpus built once from your own recipe (e.g. your own files)."""

    recipe: CorpusRecipe

    def open(self, progress: Progress = ignore_progress) -> Corpus:
        return build_corpus(self.recipe, progress=progress)

    def folder(self) -> Path:
        return corpora_dir() / self.recipe.name


class CorpusFolder(CorpusSource):
    """An existing corpus: its directory, or its name among the corpora in the data home."""

    path: str

    def open(self, progress: Progress = ignore_progress) -> Corpus:  # noqa: ARG002 - it is there
        return Corpus.open(self.folder())

    def folder(self) -> Path:
        named = corpora_dir() / self.path
        return named if not Path(self.path).exists() and named.is_dir() else Path(self.path)
