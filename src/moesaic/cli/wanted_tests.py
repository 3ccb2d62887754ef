"""Which test sets ``moesaic eval`` is asked for: held-out strings, a file, or a public test set."""

from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoint.run_directory import RunDir
from moesaic.cli.evaluated_run import DirectionChoice, EvaluatedRun, TestSelection
from moesaic.cli.shared_options import show_progress
from moesaic.core.errors import DataError, UserError, did_you_mean
from moesaic.corpus.split import SPLITS
from moesaic.corpus.text_rules import read_text_rules
from moesaic.evaluate.check_testset import normalise_testset
from moesaic.evaluate.testset import UDHR_NAME as UDHR
from moesaic.evaluate.testset import read_moses_testset, read_testset, udhr_testsets

NO_CORPUS = (
    "the run's corpus was not found: no translation memory was scored, and whether rows were "
    "trained on is not known (--corpus DIR says where it is)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedTests:
    """The options of ``moesaic eval`` that choose test sets."""

    pairs: Path | None
    moses: tuple[Path, Path] | None
    testset: str | None
    split: str
    limit: int | None
    choice: DirectionChoice

    @property
    def is_headline(self) -> bool:
        """Whether these are held-out strings: their scores are those of the run."""
        return not self._given() and self.split in SPLITS

    def find(self, run: EvaluatedRun) -> TestSelection:
        """Return the test sets, and the corpus of the run.

        Only held-out strings need the corpus. Raises UserError or DataError.
        """
        given = self._given()
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} were both given: choose one test set")
        if not given:
            return run.held_out_tests(
                run.corpus(), split=self.split, limit=self.limit, choice=self.choice
            )
        found = self._public_tests(run) if self.testset is not None else self._user_tests(run)
        return _with_corpus(found, run)

    def _given(self) -> list[str]:
        options = {"--pairs": self.pairs, "--moses": self.moses, "--testset": self.testset}
        return [name for name, value in options.items() if value is not None]

    def _public_tests(self, run: EvaluatedRun) -> TestSelection:
        assert self.testset is not None
        if self.testset.casefold() != UDHR:
            raise UserError(
                f'unknown test set "{self.testset}": expected {UDHR}'
                f"{did_you_mean(self.testset, [UDHR])} (splits of the run's corpus are chosen "
                "with --split)"
            )
        directions = run.chosen_directions(self.choice)
        tests, notes = udhr_testsets(directions, limit=self.limit, progress=show_progress)
        for note in notes:
            show_progress(note)
        rules = read_text_rules(RunDir(run.path).text_rules)
        return TestSelection([normalise_testset(t, rules) for t in tests], notes)

    def _user_tests(self, run: EvaluatedRun) -> TestSelection:
        source, target = direction = run.user_direction(self.choice)
        if self.pairs is not None:
            tags = self.choice.tags_of(direction)
            test = read_testset(self.pairs, source=tags[0], target=tags[1], limit=self.limit)
        else:
            assert self.moses is not None
            test = read_moses_testset(*self.moses, source=source, target=target, limit=self.limit)
        test = normalise_testset(test, read_text_rules(RunDir(run.path).text_rules))
        return TestSelection([test], run.untrained_note(direction))


def _with_corpus(selection: TestSelection, run: EvaluatedRun) -> TestSelection:
    """Return the selection with the run's corpus if it is found, or a note that it is not."""
    if run.given_corpus is not None:  # asked for: what is wrong with it is an error
        found = run.corpus()
        return selection.replace_corpus(found.corpus, found.note)
    try:
        found = run.corpus()
    except DataError:
        return selection.replace_corpus(None, NO_CORPUS)
    return selection.replace_corpus(found.corpus, found.note)
