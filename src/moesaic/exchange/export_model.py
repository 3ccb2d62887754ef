"""Export: a model directory becomes one that ``from_pretrained`` of transformers loads.

A family can hold a model if its mapping, written and read again, gives a config of the same model
(``same_model.py``). Weights are read and written some rows at a time.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.checkpoint.checkpoint_directory import Disk
from moesaic.checkpoint.model_card import add_to_card
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import require_unchanged
from moesaic.checkpoint.safetensors_io import serialize_chunks
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.core.file_reader import read_json_mapping
from moesaic.core.files import atomic_write, copy_files, new_directory, write_json
from moesaic.core.shapes import Tensor
from moesaic.data.collators import EncoderDecoderCollator
from moesaic.data.tokenizer import Tokenizer
from moesaic.exchange.config_entries import LENGTH
from moesaic.exchange.config_mapping import differences
from moesaic.exchange.families import FAMILIES, family_of
from moesaic.exchange.family import Family
from moesaic.exchange.hf_directory import (
    CONFIG,
    INDEX,
    WEIGHTS,
    carried_files,
    read_hf_config,
)
from moesaic.exchange.same_model import canonical, resolved
from moesaic.exchange.tensor_files import PutTogether, TensorFiles
from moesaic.model.config import ModelConfig
from moesaic.serve.imported_generation import GENERATION, GENERATION_FILE
from moesaic.serve.open_run import read_collator, read_model_config

SHARD_BYTES = 5 * 10**9
DEFAULT_LENGTH = 4096  # that their config names for a model without a longest row
SHAPED_RECIPES = {"encoder": "nllb-shaped", "decoder": "mixtral-shaped"}  # of exportable models
_ROLES = ("pad", "bos", "eos")


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """What was written: family, layout, number and size of the tensors, and what to mind."""

    family: str
    layout: str
    tensors: int
    bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExportSource:
    """A run with weights, its model, the family that can hold it, and the config it came with.

    ``before`` is the ``config.json`` of an imported model, empty for others.
    """

    run: RunDir
    model: ModelConfig
    family: Family
    before: Mapping[str, Any]


def export_model(
    run: Path, *, out: Path, layout: str | None = None, shard_bytes: int = SHARD_BYTES
) -> ExportedModel:
    """Write the directory ``out`` with a model in the files of Hugging Face transformers.

    Args:
        run: The directory of a finished run or of an imported model.
        out: Must not exist yet.
        layout: The names of expert tensors, ``fused`` or ``per-expert``; None: as published.
        shard_bytes: Of weights in a file, if a tensor is not larger.

    Raises:
        CheckpointError: No family can hold the model; the first part without an equivalent and
            the nearest family are named.
        FileError: ``out`` exists.
    """
    return write_export(open_for_export(run), out=out, layout=layout, shard_bytes=shard_bytes)


def write_export(
    source: ExportSource, *, out: Path, layout: str | None = None, shard_bytes: int = SHARD_BYTES
) -> ExportedModel:
    """Write the directory ``out`` with a model that is open; otherwise as ``export_model``."""
    directory, model, family, before = source.run, source.model, source.family, source.before
    if layout is not None and layout not in family.layouts:
        known = ", ".join(family.layouts)
        raise CheckpointError(f"{family.model_type} has no layout {layout!r}, expected {known}")
    layout = layout or next(iter(family.layouts))
    pieces = family.pieces(model, layout=layout)
    files = TensorFiles([directory.model])
    put_together = PutTogether([piece.reversed() for piece in pieces], files)
    tokenizer = Tokenizer.load(directory.tokenizer) if directory.tokenizer.is_file() else None
    with new_directory(out) as part:
        dtype = str(next(iter(put_together.targets.values())).dtype).removeprefix("torch.")
        config = hf_config(family, model, before=before) | {"dtype": dtype}
        fixed = family.mapping.write(resolved(model))
        ids = _write_tokenizer(directory, part, tokenizer=tokenizer, fixed=fixed)
        write_json(part / CONFIG, _with_ids(config, ids))
        _write_shards(part, put_together, shard_bytes=shard_bytes)
        notes = tuple(_notes(source, tokenizer))
        _write_card(directory, part, facts=[f"{family.architecture}, {layout}", *notes])
    targets = put_together.targets
    return ExportedModel(family.model_type, layout, len(targets), _bytes(targets), notes)


def open_for_export(run: Path) -> ExportSource:
    """Open what is exported. Raises CheckpointError if no family can hold it."""
    directory = RunDir.open(run)
    directory.require_whole_weights()
    return open_without_weights(directory)


def open_without_weights(run: RunDir) -> ExportSource:
    """Open a run that may have an adapter alone. Raises CheckpointError as ``open_for_export``."""
    require_unchanged(run)
    model = read_model_config(run)
    before = read_hf_config(run.imported) if run.imported.is_dir() else {}
    return ExportSource(run, model, find_family(model, first=before.get("model_type")), before)


def find_family(model: ModelConfig, *, first: object = None) -> Family:
    """Return the family that can hold a model; ``first`` is tried before the others.

    Raises CheckpointError with what the nearest family has no equivalent of.
    """
    encoder = bool(model.encoder.layers)
    every = FAMILIES.values()
    families = [f for f in every if bool(f.mapping.template.encoder.layers) == encoder]
    if first in FAMILIES:
        families.insert(0, family_of(first))
    found: dict[str, list[str]] = {}
    unreadable: dict[str, list[str]] = {}
    for family in families:
        try:
            found[family.model_type] = _not_held(model, family)
        except ConfigError as error:  # a config that lacks a key is farther than one that differs
            unreadable[family.model_type] = list(error.problems)
    found = found or unreadable
    nearest = min(found, key=lambda name: len(found[name]))
    if not found[nearest]:
        return FAMILIES[nearest]
    recipe = SHAPED_RECIPES["encoder" if encoder else "decoder"]
    raise CheckpointError(
        f"no model of transformers that we write has {found[nearest][0].partition(',')[0]}. The "
        f"nearest is {nearest}, which differs so: {'; '.join(found[nearest])}. The recipe {recipe} "
        "trains a model that can be exported"
    )


def hf_config(
    family: Family, model: ModelConfig, *, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return their config of a model; keys that we do not have are as ``before``."""
    kept = dict(before or {}) if (before or {}).get("model_type") == family.model_type else {}
    replaced = {"rope_theta", "rope_scaling", "torch_dtype", "quantization_config"}
    kept = {key: value for key, value in kept.items() if key not in replaced}
    about = {"model_type": family.model_type, "architectures": [family.architecture]}
    return {LENGTH: DEFAULT_LENGTH} | kept | family.mapping.write(resolved(model)) | about


def _not_held(model: ModelConfig, family: Family) -> list[str]:
    """Return a sentence for each part of a model that a family has no equivalent of.

    Raises ConfigError if the family's config of it cannot be read back.
    """
    found = family.mapping.read(hf_config(family, model))
    return list(differences(canonical(model), canonical(found)))


def _with_ids(kept: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return a config of theirs with the ids of roles; several ends of a text stay as they were."""
    ends = kept.get("eos_token_id")
    several = isinstance(ends, list) and ids.get("eos_token_id") in ends
    return {**kept, **ids, **({"eos_token_id": ends} if several else {})}


def _write_tokenizer(
    run: RunDir, part: Path, *, tokenizer: Tokenizer | None, fixed: Mapping[str, Any]
) -> dict[str, int]:
    """Write tokenizer and generation config. Returns the ids of roles for ``config.json``.

    Raises CheckpointError if one is not that of ``fixed`` keys.
    """
    kept = [path for path in carried_files(run.imported) if path.name != CONFIG]
    copy_files([run.imported / GENERATION], to=part)
    if tokenizer is None:
        return {}
    known = tokenizer.vocabulary
    ids = {f"{role}_token_id": known.roles[role] for role in _ROLES if role in known.roles}
    if fixed.get("pad_token_id", known.pad) != known.pad:
        raise CheckpointError(
            f"the tokenizer pads with id {known.pad}, but the model's first position is "
            f"{fixed['pad_token_id'] + 1}: expected the id behind its padding"
        )
    collator = read_collator(run)
    if isinstance(collator, EncoderDecoderCollator):
        first = collator.frame.prompt[0]
        ids |= {"decoder_start_token_id": known.roles[first]} if first in known.roles else {}
    if any(path.name == "tokenizer.json" or path.suffix == ".model" for path in kept):
        copy_files(kept, to=part)
        return ids
    copy_files([run.tokenizer], to=part)
    names = {f"{r}_token": tokenizer.id_to_token(i) for r, i in known.roles.items()}
    write_json(
        part / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    )
    path = part / GENERATION
    before = read_json_mapping(path, GENERATION_FILE) if path.is_file() else {}
    write_json(path, _with_ids(before, ids))
    return ids


def _notes(source: ExportSource, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Yield what is otherwise where the model is loaded."""
    if source.family.transformers_note:
        yield source.family.transformers_note
    if tokenizer is not None and tokenizer.copies.slots:
        yield (
            "the tokenizer has copy units, which are of moesaic alone: a text with placeholders, "
            "tags or URLs is read otherwise there (data.tokenizer.copy_units=0 trains without)"
        )


def _write_card(run: RunDir, part: Path, *, facts: Sequence[str]) -> None:
    """Write the card of the run, as that of a model of transformers, with facts at its end."""
    if run.card.is_file():
        text = run.card.read_text(encoding="utf-8")
        card = RunDir(part).card
        atomic_write(card, text.replace("library_name: moesaic", "library_name: transformers", 1))
    for fact in facts:
        add_to_card(part, "exported", fact)


def _write_shards(part: Path, put_together: PutTogether, *, shard_bytes: int) -> None:
    """Write the weights as one file, or as several with an index."""
    disk, targets = Disk(), put_together.targets
    shards = list(_shards(targets, shard_bytes=shard_bytes))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = WEIGHTS if len(shards) == 1 else name
        chosen = {key: targets[key] for key in names}
        disk.write(part / name, chunks=serialize_chunks(chosen, read=put_together))
        places |= dict.fromkeys(names, name)
    if len(shards) > 1:
        total = {"metadata": {"total_size": _bytes(targets)}, "weight_map": places}
        (part / INDEX).write_text(json.dumps(total, indent=2) + "\n", encoding="utf-8")


def _shards(targets: Mapping[str, Tensor], *, shard_bytes: int) -> Iterator[Sequence[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in targets.items():
        own = tensor.numel() * tensor.element_size()
        if names and size + own > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _bytes(targets: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in targets.values())
