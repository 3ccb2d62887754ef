"""Known corpora: a corpus by its folder, or by its name among those built in the data home."""

from pathlib import Path

from moesaic.core.errors import DataError, did_you_mean
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_manifest import CORPUS_MANIFEST
from moesaic.corpus.corpus_recipes import NAMED_CORPORA
from moesaic.corpus.data_home import corpora_dir


def open_known_corpus(which: str) -> Corpus:
    """Open a corpus by folder or name; nothing is built. Raises DataError with the nearest name."""
    for folder in (Path(which), corpora_dir() / which):
        if (folder / CORPUS_MANIFEST).is_file():
            return Corpus.open(folder)
    if which in NAMED_CORPORA:
        raise DataError(f"{which} is not built yet: run `moesaic data build {which}`")
    if which.endswith((".yaml", ".yml")) and Path(which).is_file():
        raise DataError(
            f"{which} is the recipe of a corpus: build it with `moesaic data build {which}`, then "
            "use the name in it"
        )
    built = [path.parent.name for path in corpora_dir().glob(f"*/{CORPUS_MANIFEST}")]
    known = sorted({*NAMED_CORPORA, *built})
    raise DataError(
        f'there is no corpus "{which}" here or in {corpora_dir()}{did_you_mean(which, known)} '
        f"(known: {', '.join(known)})"
    )
