"""What ``moesaic eval`` scores of a language model: held-out documents, or texts of the user's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console

from moesaic.checkpoint.run_directory import RunDir
from moesaic.cli.evaluated_run import EvaluatedRun
from moesaic.cli.shared_options import print_table, show_progress
from moesaic.cli.styled_text import styled
from moesaic.core.errors import DataError, UserError
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Text
from moesaic.corpus.sources.document_files import (
    DocumentFiles,
    Documents,
    DomainOfFile,
    DomainOfFolder,
)
from moesaic.evaluate.bootstrap import ScoreInterval
from moesaic.evaluate.perplexity import DocumentLoss, PerplexitySummary, group_perplexities
from moesaic.report.html_report import write_report
from moesaic.serve.document_loss import document_losses
from moesaic.serve.text_generator import TextGenerator

_MAX_GROUPS = 20  # of a table in the terminal
_CHUNK = 2000  # documents in memory at once


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Which texts are scored.

    ``path`` is a file, folder or pattern of the user's, None for a ``split`` of the run's corpus.
    ``language`` is the only one that is scored, or that of the user's texts; empty: any. ``limit``
    is the most documents of each language.
    """

    path: str | None
    language: str
    split: str
    limit: int | None
    resamples: int

    @property
    def is_headline(self) -> bool:
        """Whether the result is that of the run: of the test split, whole."""
        return (self.path, self.language, self.split, self.limit) == (None, "", "test", None)


def is_language_model(evaluated: EvaluatedRun) -> bool:
    """Whether a run has no encoder and was trained on no translation."""
    record = evaluated.record
    decoder_only = not evaluated.config.model.encoder.layers
    return decoder_only and record is not None and not record.directions


def score_texts(
    evaluated: EvaluatedRun, request: TextRequest, *, refused: Sequence[str] = ()
) -> PerplexitySummary:
    """Return the perplexity of texts; that of the run's test split is written into the run.

    Raises UserError: ``refused`` options were given, or there is no text to score.
    """
    if refused:
        raise UserError(
            f"{evaluated.path} is a language model, which is scored on texts: {refused[0]} does "
            "not fit (--texts PATH, or the held-out part of its corpus)"
        )
    generator = TextGenerator.open(evaluated.path)
    notes: list[str] = []
    if request.path is None:
        found = evaluated.corpus()
        notes += [found.note] if found.note else []
        texts, name = _corpus_texts(found.corpus, generator, request), request.split
    else:
        texts, name = _user_texts(request.path, language=request.language), request.path
    window = generator.window
    losses: list[DocumentLoss] = []
    limited = _limited(texts, request.limit)
    while chunk := list(islice(limited, _CHUNK)):
        losses += document_losses(generator, chunk, window=window, stride=max(1, window // 2))
        show_progress(f"{len(losses):,} documents scored")
    if not losses:
        raise DataError(
            f"{name}: no text to score; score a larger split (--split train) or texts of your own "
            "(--texts PATH)"
        )
    summary = PerplexitySummary(
        run=evaluated.path.resolve().name,
        texts=name,
        window=window,
        stride=max(1, window // 2),
        groups=group_perplexities(losses, resamples=request.resamples),
        notes=tuple(notes),
    )
    if request.is_headline:
        summary.write(RunDir(evaluated.path).perplexity)
        write_report(evaluated.path)
    return summary


def show_perplexities(summary: PerplexitySummary, console: Console) -> None:
    """Print a row for each group of documents."""
    title = styled(
        "perplexity and bits per byte [dim](95 % interval over documents)[/] of {texts}, in "
        "windows of {window} tokens",
        texts=summary.texts,
        window=summary.window,
    )
    many = len(summary.groups) > _MAX_GROUPS
    shown = [g for g in summary.groups if not (many and g.language and g.domain)]
    rows = [
        (
            group.name,
            f"{group.documents:,}",
            f"{group.tokens:,}",
            *_interval(group.perplexity, 2),
            *_interval(group.bits_per_byte, 3),
        )
        for group in shown
    ]
    columns = ("texts", "documents", "tokens", "perplexity", "", "bits per byte", "")
    print_table(console, columns, rows, title=title)
    if len(shown) < len(summary.groups):
        console.print("each domain in each language: --json, and the report", style="dim")
    for note in summary.notes:
        console.print(styled("[dim]{note}[/]", note=note))


def _interval(score: ScoreInterval, digits: int) -> tuple[str, str]:
    return f"{score.score:.{digits}f}", f"{score.low:.{digits}f} to {score.high:.{digits}f}"


def _corpus_texts(corpus: Corpus, generator: TextGenerator, request: TextRequest) -> Iterator[Text]:
    known = generator.tokenizer.languages
    codes = [code for code in corpus.languages if code in known]
    if request.language:
        codes = [resolve_language(request.language).code]
    for code in codes:
        yield from corpus.iter_texts(code, split=request.split)


def _user_texts(path: str, *, language: str) -> Iterator[Text]:
    rule = DomainOfFile() if Path(path).is_file() else DomainOfFolder()
    source = Documents(files=(DocumentFiles(path=path, domain=rule, language=language),))
    for source_file in source.fetch(progress=show_progress):
        if not source_file.missing_reason:
            yield from source.read(source_file, wanted=lambda _: True)


def _limited(texts: Iterator[Text], limit: int | None) -> Iterator[Text]:
    counts: dict[str, int] = {}
    for text in texts:
        counts[text.language] = counts.get(text.language, 0) + 1
        if limit is None or counts[text.language] <= limit:
            yield text
