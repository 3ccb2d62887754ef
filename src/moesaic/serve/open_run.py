"""Opening a run for translation: model, tokenizer, limits, text rules, trained directions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import require_plugins, require_unchanged
from moesaic.checkpoint.trained_directions import TrainedDirections, read_trained_directions
from moesaic.core.config_upgrade import upgrade_config
from moesaic.core.errors import CheckpointError
from moesaic.core.yaml_reader import read_yaml_file
from moesaic.corpus.text_rules import TextRules, read_text_rules
from moesaic.data.collators import Collator
from moesaic.data.tokenizer import Tokenizer
from moesaic.model.config import ModelConfig
from moesaic.model.head import LanguageModelHead
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.model.transformer import Transformer
from moesaic.model.weights import describe_nonfinite, require_fitting_weights
from moesaic.parallel.trained_weights import TrainedWeights, find_weights
from moesaic.serve.imported_generation import (
    ImportedGeneration,
    read_imported_generation,
)
from moesaic.serve.source_text import TranslationLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedRun:
    """What translation needs of a run; ``trained`` is None for runs that have no record of it.

    ``generation`` are the settings that an imported model came with.
    """

    model: Transformer
    tokenizer: Tokenizer
    limits: TranslationLimits
    text_rules: TextRules
    trained: TrainedDirections | None
    collator: Collator | None
    generation: ImportedGeneration = field(default_factory=ImportedGeneration)


def open_run(path: Path, *, weights: Path | None = None, device: str = "cpu") -> OpenedRun:
    """Open a finished run, or one in progress with the ``weights`` of a checkpoint.

    Raises CheckpointError naming what is missing, does not fit, or is not finite.
    """
    run = RunDir.open(path)
    _require_language_model(run)
    if weights is None:
        run.require_text_model()
    model, config = open_weights_alone(run, weights=weights, device=device), read_run_config(run)
    generation = read_imported_generation(run.imported)
    tokenizer = Tokenizer.load(run.tokenizer).with_ends(generation.ends)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{run.tokenizer}: {tokenizer.vocab_size} tokens, but the model has "
            f"{model.config.vocab_size}: it belongs to another run"
        )
    return OpenedRun(
        model=model,
        tokenizer=tokenizer,
        limits=_read_limits(config, where=run.config),
        text_rules=read_text_rules(run.text_rules),
        trained=read_trained_directions(run.directions),
        collator=read_collator(run),
        generation=generation,
    )


def open_weights_alone(run: RunDir, *, weights: Path | None, device: str) -> Transformer:
    """Return the model of a run; ``weights`` are those of a checkpoint instead of its own.

    Raises CheckpointError.
    """
    if weights is None:
        run.require_weights()
    require_plugins(run)
    require_unchanged(run)
    stored = find_weights(run, config=read_run_config(run), weights=weights)
    return _load_model(read_model_config(run), stored, device=device).eval()


def _require_language_model(run: RunDir) -> None:
    """Raise CheckpointError for a run whose head predicts no text."""
    model = read_run_config(run).get("model")
    head = model.get("head", {}) if isinstance(model, dict) else {}
    kind = head.get("kind") if isinstance(head, dict) else None
    if kind not in (None, LanguageModelHead.__name__):
        raise CheckpointError(
            f"{run.path}: its head is {kind}, which writes no text, expected LanguageModelHead; "
            f"its scores: moesaic eval {run.path}"
        )


def read_run_config(run: RunDir) -> dict[str, Any]:
    """Return the config of a run, upgraded to this version. Raises CheckpointError."""
    config = read_yaml_file(run.config)
    if not isinstance(config, dict):
        raise CheckpointError(f"{run.config}: expected a mapping, found {type(config).__name__}")
    upgraded, _ = upgrade_config(config)
    assert isinstance(upgraded, dict)
    return upgraded


def read_model_config(run: RunDir) -> ModelConfig:
    """Return the config of a run's model. Raises CheckpointError."""
    config = read_run_config(run)
    if not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{run.config}: it has no model; is it the config of a run?")
    return ModelConfig.from_dict(config["model"])


def _loader_config(config: dict[str, Any]) -> dict[str, Any]:
    data = config.get("data")
    loader = data.get("loader") if isinstance(data, dict) else None
    return loader if isinstance(loader, dict) else {}


def read_collator(run: RunDir) -> Collator | None:
    """Return how rows were made in training; None for a run that does not say."""
    found = _loader_config(read_run_config(run)).get("collator")
    return None if found is None else Collator.from_dict(found)


def _read_limits(config: dict[str, Any], *, where: Path) -> TranslationLimits:
    loader = _loader_config(config)
    limits = {name: loader[name] for name in ("max_source", "max_target") if name in loader}
    for name, value in limits.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 2:
            raise CheckpointError(
                f"{where}: data.loader.{name} is {value!r:.60}, expected a whole number "
                "of at least 2"
            )
    return TranslationLimits(**limits)


def _load_model(config: ModelConfig, stored: TrainedWeights, *, device: str) -> Transformer:
    """Build a model once its weights fit: a config may ask for any size, a file has its own."""
    where = stored.paths[-1]
    try:
        _require_size(config, stored.shapes)
        model = stored.load(config, device=device)
    except CheckpointError as error:
        raise CheckpointError(f"{where} and config.yaml beside it: {error}") from error
    wrong = describe_nonfinite(model)
    if wrong:
        raise CheckpointError(
            f"{where}: the weights hold {wrong}, expected finite numbers: training diverged or the "
            "file was changed; use the weights of an earlier checkpoint"
        )
    return model


def _require_size(config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError if a config asks for more than its weights have, before it takes it."""
    layers = config.encoder.layers + config.decoder.layers
    if layers > len(shapes):  # thousands of modules take a minute to make, on any device
        raise CheckpointError(
            f"{layers:,} layers, but {len(shapes):,} tensors: the config describes a far larger "
            "model; restore the file that differs"
        )
    if count_parameters(config).total > sum(map(math.prod, shapes.values())):
        require_fitting_weights(Transformer.without_values(config), shapes)
