"""Find the corpus of a run where it lies now: nothing is built and nothing downloaded.

A run may have been moved, or be used from another folder than it was trained in. The corpus is
looked for at its path, relative to the run directory and the folders above it, and by its name in
the data home and in the user's data folder; the fingerprint in the run's ``directions.json``
decides whether it is the same one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.trained_directions import read_trained_directions
from moesaic.core.errors import DataError, listed
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_manifest import CORPUS_MANIFEST
from moesaic.corpus.data_home import corpora_dir, user_data_home
from moesaic.corpus.sources.text_source import Progress, ignore_progress
from moesaic.train.corpus_source import CorpusSource


@dataclass(frozen=True, slots=True)
class FoundCorpus:
    """A corpus, and ``note``: a sentence if it may not be the one that was trained on, or empty."""

    corpus: Corpus
    note: str = ""


def find_corpus(source: CorpusSource, *, run_dir: RunDir, given: Path | None = None) -> FoundCorpus:
    """Return the corpus of a run, or the one at ``given``, without building anything.

    Raises DataError with the places that were searched and the way out.
    """
    trained = read_trained_directions(run_dir.directions)
    fingerprint = trained.fingerprint if trained else ""
    if given is not None:
        corpus = Corpus.open(given)
        other = bool(fingerprint) and corpus.fingerprint != fingerprint
        note = (
            f"{given} is not the corpus that {run_dir.path} was trained on (another content): its "
            "held-out rows may be rows that were trained on"
        )
        return FoundCorpus(corpus, note if other else "")
    searched: list[str] = []
    for place in _places(source, run_dir=run_dir):
        if not (place / CORPUS_MANIFEST).is_file():
            searched.append(str(place))
            continue
        corpus = Corpus.open(place)
        if not fingerprint or corpus.fingerprint == fingerprint:
            return FoundCorpus(corpus)
        searched.append(f"{place} (a corpus, but not the one that was trained on)")
    raise DataError(_not_found(source, run_dir=run_dir, searched=searched))


def open_run_corpus(
    source: CorpusSource, *, run_dir: RunDir, progress: Progress = ignore_progress
) -> Corpus:
    """Return the corpus to train on: where the config says, or else where ``find_corpus`` is.

    A run that is resumed from another folder finds the corpus of its relative path.
    """
    folder = source.folder()
    if run_dir.directions.is_file() and folder is not None and not folder.is_dir():
        try:
            return find_corpus(source, run_dir=run_dir).corpus
        except DataError:
            pass  # opening it builds it, or raises the error that fits
    return source.open(progress)


def _places(source: CorpusSource, *, run_dir: RunDir) -> Iterator[Path]:
    """Yield the directories where the corpus may be, the likeliest first."""
    folder = source.folder()
    if folder is None:
        return
    run = run_dir.path.resolve()
    tries = [folder]
    if not folder.is_absolute():
        tries += [above / folder for above in (run, *run.parents)]
    tries += [corpora_dir() / folder.name, user_data_home() / "corpora" / folder.name]
    tries += [above / "data" / "corpora" / folder.name for above in run.parents]
    seen = set()
    for place in tries:
        if place.absolute() not in seen:
            seen.add(place.absolute())
            yield place


def _not_found(source: CorpusSource, *, run_dir: RunDir, searched: list[str]) -> str:
    folder = source.folder()
    name = folder.name if folder else type(source).__name__
    return (
        f"the corpus of {run_dir.path}, {name}, was not found"
        + (f" (searched: {listed(searched, most=4)})" if searched else "")
        + ": give its directory with --corpus DIR, or build it with `moesaic data build`. Your own "
        "test set needs no corpus: --pairs FILE --from LANGUAGE --to LANGUAGE"
    )
