"""Model export: final weights (``model.safetensors``) or adapter, and the model card of a run."""

from collections.abc import Iterable
from pathlib import Path

from moesaic.checkpoint.checkpoint_directory import CheckpointPaths
from moesaic.checkpoint.model_card import ModelCard, card_parameters, card_task
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import rewrite_run_record, weights_metadata
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.checkpoint.streamed_export import export_checkpoint_weights
from moesaic.checkpoint.trained_directions import TrainedStream, read_trained_directions
from moesaic.core.files import atomic_write
from moesaic.core.units import show_count
from moesaic.corpus.languages import resolve_language
from moesaic.data.batch import TARGET_LANGUAGE
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.train.trainer import Trainer
from moesaic.train.warm_start import WeightsOfRun


def export_model(trainer: Trainer, *, run_dir: RunDir, tokens: float) -> None:
    """Write the weights, or an adapter of other weights, and the model card. Collective."""
    run, world, parallel_model = trainer.run, trainer.world, trainer.parallel_model
    metadata = run_on_rank0(world, lambda: weights_metadata(run_dir, model=run.model.to_dict()))
    path = run_dir.adapter if run.trainable.keeps_base else run_dir.model
    if not parallel_model.is_replicated:  # the weights of the checkpoint that was just saved
        export_checkpoint_weights(
            path,
            source=CheckpointPaths(run_dir.checkpoints, trainer.step, 0).final,
            dtypes=dict.fromkeys(parallel_model.sharding_plan, run.precision.parameter_dtype),
            metadata=metadata,
            world=world,
        )

    def write() -> None:
        if parallel_model.is_replicated:
            trainer.optimizer.catch_up()
            write_tensors(path, tensors=parallel_model.saved_weights(), metadata=metadata)
        if run.trainable.keeps_base:  # merged with an earlier adapter
            run_dir.model.unlink(missing_ok=True)
        # its plug-ins are recorded as they were when they were loaded
        rewrite_run_record(run_dir, config=run.to_dict())
        atomic_write(run_dir.card, model_card(trainer, run_dir=run_dir, tokens=tokens).text())

    run_on_rank0(world, write)


def model_card(trainer: Trainer, *, run_dir: RunDir, tokens: float) -> ModelCard:
    """Return the model card: parameters, training data, steps and best validation loss."""
    run, best = trainer.run, trainer.event_log.best
    languages = trainer.data.labels.get(TARGET_LANGUAGE, ())
    facts = {
        "steps": f"{trainer.step:,}",
        "training tokens (both sides)": show_count(tokens),
        "tasks": ", ".join(run.data.task_names()),
    }
    if isinstance(run.initial_weights, WeightsOfRun):
        facts["started from"] = Path(run.initial_weights.path).name
    if run.trainable.keeps_base:
        facts["trained"] = f"{type(run.trainable).__name__}, saved alone"
    notes = ["The licences of the training text are those of its sources, listed above."]
    record = read_trained_directions(run_dir.directions)
    own = _languages_of(s for s in record.streams if s.share) if record else set[str]()
    if own and own < set(languages):
        facts["languages trained here"] = ", ".join(map(_bcp47, sorted(own)))
        notes.append("Listed is the whole corpus; read were the languages trained here.")
    if best.step:
        facts["best validation loss"] = f"{best.loss:.3f} at step {best.step:,}"
    return ModelCard(
        name=run.name,
        languages=[_bcp47(code) for code in languages],
        licence="other",
        task=card_task(run.model),
        parameters=card_parameters(run.model),
        sources=run.data.sources(run_dir),
        facts=facts,
        notes=notes,
    )


def _languages_of(streams: Iterable[TrainedStream]) -> set[str]:
    return {code for stream in streams for code in (stream.source, stream.target)}


def _bcp47(code: str) -> str:
    return resolve_language(code).bcp47
