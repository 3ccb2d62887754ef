"""Record what a run is trained on: ``directions.json``, and a note if nothing is held out."""

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.trained_directions import (
    TrainedDirections,
    TrainedStream,
    read_trained_directions,
)
from moesaic.data.mixture import Mixture
from moesaic.train.prepare_data import PreparedData
from moesaic.train.run import Run


def record_directions(run: Run, *, prepared: PreparedData, run_dir: RunDir) -> list[str]:
    """Write the streams of the data mixture to ``run_dir``; return notes. Rank 0 only.

    Streams that are recorded there already, of the run that this one started from, are kept.
    """
    record = trained_directions(run, prepared=prepared)
    if earlier := read_trained_directions(run_dir.directions):
        record = record.with_earlier(earlier)
    record.write(run_dir.directions)
    if run.validation.every and not record.valid_rows:
        return [
            "the validation split has no rows for these tasks: there will be no validation loss "
            "and no best checkpoint (the split is by a hash of the source; more text fills it)"
        ]
    return []


def trained_directions(run: Run, *, prepared: PreparedData) -> TrainedDirections:
    """Return the streams that the mixture of a run draws from."""
    shards, languages = prepared.shards, prepared.tokenizer.languages
    mixture = Mixture(run.mixture, shards=shards, languages=languages, seed=run.seed)
    held_out: dict[tuple[str, str, str, str], int] = {}
    for name, task in zip(mixture.task_names, mixture.tasks, strict=True):
        for split in ("valid", "test"):
            for stream in task.streams(shards, languages=languages, split=split):
                key = split, name, stream.source_language, stream.target_language
                held_out[key] = stream.size
    return TrainedDirections(
        corpus=prepared.corpus_name,
        fingerprint=prepared.corpus_fingerprint,
        streams=tuple(
            TrainedStream(
                task=row.task,
                source=row.source_language,
                target=row.target_language,
                rows=row.size,
                valid_rows=held_out.get(("valid", *key), 0),
                test_rows=held_out.get(("test", *key), 0),
                share=round(row.expected, 6),
            )
            for row in mixture.frequencies(mixture.initial_counts())
            for key in [(row.task, row.source_language, row.target_language)]
        ),
    )
