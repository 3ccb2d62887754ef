"""What the commands eval, curve, report and demo score: a run, its corpus and its directions."""

from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.trained_directions import (
    LanguageDirection,
    TrainedDirections,
    read_trained_directions,
)
from moesaic.core.errors import DataError, UserError, listed
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.join_pairs import can_be_read
from moesaic.corpus.languages import ENGLISH, precise_tag, resolve_language
from moesaic.evaluate.testset import TestSet, corpus_testsets, unscored_directions
from moesaic.recipes.lookup import find_recipe
from moesaic.train.find_corpus import FoundCorpus, find_corpus
from moesaic.train.run import Run
from moesaic.train.text_data import TextData, require_text


@dataclass(frozen=True, slots=True)
class TestSelection:
    """Test sets, a note on each thing that cannot be scored, and the run's corpus if known."""

    __test__ = False  # pytest: a value, not a test

    tests: list[TestSet]
    notes: tuple[str, ...] = ()
    corpus: Corpus | None = None

    def replace_corpus(self, corpus: Corpus | None, note: str) -> "TestSelection":
        """Return a copy with a corpus and a further note; an empty one is left out."""
        return TestSelection(self.tests, (*self.notes, *filter(None, (note,))), corpus)


@dataclass(frozen=True, slots=True)
class DirectionChoice:
    """The source and target language that the user asked for, as codes; empty: any.

    ``tags`` are what was asked for where that says more than the code: ``de-AT``.
    """

    source: str = ""
    target: str = ""
    tags: tuple[str, ...] = ()

    @classmethod
    def parse(cls, source: str | None, target: str | None) -> "DirectionChoice":
        """Accept any spelling of a language. Raises UserError for an unknown one."""
        tags = tuple(precise_tag(text) if text else "" for text in (source, target))
        codes = (resolve_language(tag).code if tag else "" for tag in tags)
        return cls(*codes, tags=tags)

    def tags_of(self, direction: LanguageDirection) -> LanguageDirection:
        """Return the tags of a direction, by which a file's texts are chosen."""
        source, target = (
            tag or code for tag, code in zip(self.tags or ("", ""), direction, strict=True)
        )
        return source, target

    def includes(self, direction: LanguageDirection) -> bool:
        pairs = zip((self.source, self.target), direction, strict=True)
        return all(not asked or asked == found for asked, found in pairs)

    def __str__(self) -> str:
        parts = [f"from {self.source}" if self.source else "", f"into {self.target}"]
        return " ".join(parts[: 2 if self.target else 1]).strip()


ANY_DIRECTION = DirectionChoice()


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """A run directory, its config and its record of trained directions (None: an older version).

    The corpus is looked for only when it is needed.
    """

    path: Path
    config: Run
    record: TrainedDirections | None
    given_corpus: Path | None = None

    @classmethod
    def open(cls, path: Path, *, corpus: Path | None = None) -> "EvaluatedRun":
        """Read the files of a run directory. Raises UserError if it is none."""
        folder = RunDir.open(path)
        record = read_trained_directions(folder.directions)
        return cls(path, find_recipe(str(path)), record, corpus)

    @property
    def text(self) -> TextData:
        """The data of a run on text. Raises UserError if it is other data."""
        return require_text(self.config.data, what=f"scoring translations of {self.path}")

    def corpus(self) -> FoundCorpus:
        """Find the corpus of the run; nothing is built. Raises DataError if it is not found."""
        return find_corpus(self.text.corpus, run_dir=RunDir(self.path), given=self.given_corpus)

    def trained_directions(self, corpus: Corpus | None = None) -> tuple[LanguageDirection, ...]:
        """Return the directions of translation that the run was trained on.

        They are recorded in the run directory; for runs of older versions they are read from the
        config and the corpus, and are unknown (empty) without a corpus.
        """
        if self.record is not None:
            return self.record.directions
        if corpus is None:
            return ()
        codes = [resolve_language(text).code for text in self.text.languages]
        found = [
            pair
            for weighted in self.text.mixture.tasks
            for pair in weighted.task.translated_pairs(corpus, languages=codes or corpus.languages)
        ]
        return tuple(dict.fromkeys(found))

    def trained_on(self, tests: list[TestSet], corpus: Corpus | None) -> bool:
        """Whether all of the test sets are of directions that the run was trained on."""
        return {(t.source, t.target) for t in tests} <= set(self.trained_directions(corpus))

    def held_out_tests(
        self,
        corpus: FoundCorpus,
        *,
        split: str = "test",
        limit: int | None = None,
        choice: DirectionChoice = ANY_DIRECTION,
    ) -> TestSelection:
        """Return the held-out strings of the directions that the run was trained on.

        A direction without strings is left out and said. Raises UserError if the run was trained on
        no translation, or if nothing is held out.
        """
        trained = self.trained_directions(corpus.corpus)
        chosen, notes = self._choose(trained, choice, corpus.corpus)
        tests = corpus_testsets(corpus.corpus, directions=chosen, split=split, limit=limit)
        missing = unscored_directions(tests, chosen)
        if missing:
            named = ", ".join(
                f"{s}-{t} ({_rows(corpus.corpus, s, t)} train rows)" for s, t in missing
            )
            notes.append(f"not scored, because the corpus has no {split} rows of it: {named}")
        if corpus.note:
            notes.append(corpus.note)
        return TestSelection(tests, tuple(notes), corpus.corpus)

    def user_direction(self, choice: DirectionChoice) -> LanguageDirection:
        """Return the direction of a test set of the user's: ``--to`` and, if not given, ``--from``.

        The source is then the one trained source of the target, or else English.
        """
        if not choice.target:
            raise UserError("--to is missing: which language are the references in? e.g. --to de")
        if choice.source:
            return choice.source, choice.target
        trained = {s for s, t in self.trained_directions() if t == choice.target}
        if len(trained) == 1:
            return trained.pop(), choice.target
        if trained and ENGLISH not in trained:
            raise UserError(
                f"--from is missing: the run translates into {choice.target} from "
                f"{', '.join(sorted(trained))}"
            )
        return ENGLISH, choice.target

    def chosen_directions(self, choice: DirectionChoice) -> list[LanguageDirection]:
        """Return the trained directions that were asked for, to be scored on a public test set.

        Raises UserError: no translation was trained, or not in this direction.
        """
        if self.record is None:
            corpus = self.corpus().corpus
            return self._choose(self.trained_directions(corpus), choice, corpus)[0]
        trained = self.record.directions
        if chosen := _included(choice, self.record.own_directions, trained):
            return chosen
        if choice.source and choice.target:
            return [(choice.source, choice.target)]
        raise DataError(self._not_trained(trained, choice))

    def untrained_note(self, direction: LanguageDirection) -> tuple[str, ...]:
        """Return a note if the run was never trained on a direction, as far as it is known."""
        if self.record is None or direction in self.record.directions:
            return ()
        return (_untrained_note(direction, self.record.directions),)

    def _choose(
        self, trained: tuple[LanguageDirection, ...], choice: DirectionChoice, corpus: Corpus
    ) -> tuple[list[LanguageDirection], list[str]]:
        """Return the directions to score, and notes on those that were not trained."""
        own = self.record.own_directions if self.record else ()
        chosen = _included(choice, own, trained)
        asked = (choice.source, choice.target)
        if chosen:
            return chosen, []
        if all(asked) and can_be_read(corpus, *asked):
            return [asked], [_untrained_note(asked, trained)]
        raise DataError(self._not_trained(trained, choice))

    def _not_trained(self, trained: tuple[LanguageDirection, ...], choice: DirectionChoice) -> str:
        if not trained:
            tasks = ", ".join(self.config.data.task_names())
            return (
                f"{self.path} was trained on no translation (its tasks: {tasks}), so it has no "
                "held-out translations to score; its validation loss is in the report "
                f"(moesaic report {self.path})"
            )
        return (
            f"{self.path} was not trained to translate {choice}: it was trained on "
            f"{listed(map('-'.join, trained))}. Give both --from and --to to score another "
            "direction of the corpus"
        )


def _included(
    choice: DirectionChoice, *groups: tuple[LanguageDirection, ...]
) -> list[LanguageDirection]:
    """Return what is chosen of the first group that has any of it."""
    found = ([direction for direction in group if choice.includes(direction)] for group in groups)
    return next(filter(None, found), [])


def _untrained_note(direction: LanguageDirection, trained: tuple[LanguageDirection, ...]) -> str:
    known = (
        f"trained: {listed(map('-'.join, trained))}"
        if trained
        else "it was trained on no translation"
    )
    return f"{'-'.join(direction)} is not a direction that the run was trained on ({known})"


def _rows(corpus: Corpus, source: str, target: str) -> int:
    try:
        return corpus.count(source, target, split="train")
    except DataError:  # joined by a pivot: counted nowhere
        return 0
