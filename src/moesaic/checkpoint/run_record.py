"""Run record: ``run.json`` of a run directory, against which its files are checked as a whole.

It contains the config that the run was trained with, size and hash of every file that translation
reads, and the plug-ins (Python files given with ``--use``) that define parts of the config. The
weights name their tokenizer and model config as well, in the metadata of ``model.safetensors``, so
that files copied one by one are checked too.

    {"format": 1, "config": {...}, "files": {"tokenizer.json": {"bytes": 9, "sha256": "..."}},
     "plugins": [{"name": "my_gate.py", "sha256": "...", "choices": ["MyGate"], "stored": true}]}
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from moesaic.checkpoint.full_checkpoint import MAX_SHOWN_DIFFERENCES, config_differences
from moesaic.checkpoint.manifest import file_problem
from moesaic.checkpoint.plugins import Plugin, require_loaded
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import read_header
from moesaic.core.config_upgrade import upgrade_config
from moesaic.core.errors import CheckpointError, UserError, printable
from moesaic.core.file_reader import MIB, FileEntry, FileKind, FileShape, parse_json
from moesaic.core.files import copy_files, sha256, write_json
from moesaic.core.yaml_reader import read_yaml_file

RUN_RECORD_FILE = FileKind(
    name="record of a run",
    max_bytes=16 * MIB,
    error=CheckpointError,
    way_out="`moesaic ckpt adopt RUN` writes a new one, if you trust the files of the run",
)
RECORDED_FILES = (
    "tokenizer.json",
    "vocabulary.json",
    "text_rules.json",
    "directions.json",
    "model.safetensors",
    "adapter.safetensors",
)
TOKENIZER_KEY, MODEL_KEY = "moesaic_tokenizer", "moesaic_model_config"


class RunRecord(FileShape):
    """The config (plain), the entries of files by name, and the plug-ins of a run."""

    kind: ClassVar[FileKind] = RUN_RECORD_FILE
    format: Literal[1] = 1
    config: dict[str, Any]
    files: dict[str, FileEntry]
    plugins: tuple[Plugin, ...] = ()


def read_run_record(run: RunDir) -> RunRecord | None:
    """Return the record of a run; None for a run of an older version, which has none."""
    if not run.record.exists():
        return None
    found = RunRecord.read(run.record)
    if unknown := sorted(set(found.files) - set(RECORDED_FILES)):
        raise RUN_RECORD_FILE.problem(run.record, f"files.{unknown[0]}: no file of a run")
    return found


def write_run_record(
    run: RunDir,
    *,
    config: Mapping[str, Any],
    plugins: tuple[Plugin, ...],
    known: Mapping[str, FileEntry | None] | None = None,
) -> RunRecord:
    """Record the files of a run as they are now, and its plug-ins.

    ``known`` has entries of files that are not looked at; None for one that has no entry.
    """
    files = {
        name: FileEntry(bytes=(run.path / name).stat().st_size, sha256=sha256(run.path / name))
        for name in RECORDED_FILES
        if name not in (known or {}) and (run.path / name).is_file()
    }
    files |= {name: entry for name, entry in (known or {}).items() if entry is not None}
    record = RunRecord(config=dict(config), files=files, plugins=plugins)
    write_json(run.record, record.model_dump())
    return record


def rewrite_run_record(run: RunDir, *, config: Mapping[str, Any]) -> RunRecord:
    """Record the files of a run as they are now; its plug-ins stay those of its record."""
    before = read_run_record(run)
    return write_run_record(run, config=config, plugins=before.plugins if before else ())


def copy_beside_weights(run: RunDir, *, to: RunDir) -> tuple[Plugin, ...]:
    """Copy what a model needs beside weights and config to another directory; return its plug-ins.

    That is the tokenizer, the text rules, the trained directions, plug-ins, and ``imported/``.
    """
    weights = (run.model.name, run.adapter.name)
    copy_files((run.path / name for name in RECORDED_FILES if name not in weights), to=to.path)
    for folder in (run.imported, run.plugins):
        if folder.is_dir():
            copy_files(folder.iterdir(), to=to.path / folder.name)
    record = read_run_record(run)
    return record.plugins if record else ()


def weights_metadata(run: RunDir, *, model: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of exported weights: hash of their tokenizer if any, model config."""
    tokenizer = {TOKENIZER_KEY: sha256(run.tokenizer)} if run.tokenizer.is_file() else {}
    return tokenizer | {MODEL_KEY: json.dumps(model, ensure_ascii=False, separators=(",", ":"))}


def run_problems(run: RunDir) -> list[str]:
    """Return how the files that translation reads differ from those that were trained together."""
    record = read_run_record(run)
    config = read_yaml_file(run.config)
    recorded = {} if record is None else record.files
    problems = []
    if record is not None:
        problems += _config_problems(record.config, config, owner="the run was trained with")
    for name, entry in recorded.items():
        problems += [file_problem(run.path / name, entry=entry, listed_in=run.record.name)]
    if run.model.is_file() and run.model.name not in recorded:
        problems += _metadata_problems(run, config=config)
    return [problem for problem in problems if problem]


def require_unchanged(run: RunDir) -> None:
    """Raise CheckpointError unless tokenizer, config and weights belong together."""
    if problems := run_problems(run):
        raise CheckpointError(
            f"{run.path}: {'; '.join(problems)}. Restore the files, or, if you changed them on "
            f"purpose: moesaic ckpt adopt {run.path}"
        )


def hash_weights(run: RunDir, *, expected: str | None) -> str:
    """Return the hash of the weights of a run; reads the whole file.

    Raises CheckpointError unless it is ``expected``, if given: that of what adapters were trained
    beside.
    """
    found = sha256(run.model)  # the file may have been replaced since its record
    if expected not in (None, found):
        raise CheckpointError(
            f"{run.model}: it has the hash {found[:12]}, expected {str(expected)[:12]}: the "
            "adapters were trained beside other weights. Restore that file"
        )
    return found


def checked_weights_hash(run: RunDir) -> str:
    """Return the hash of the weights of a run that ``require_unchanged`` has just hashed."""
    record = read_run_record(run)
    entry = record.files.get(run.model.name) if record else None
    return hash_weights(run, expected=None) if entry is None else entry.sha256


def require_plugins(run: RunDir) -> None:
    """Raise CheckpointError that names each plug-in of the run that is not loaded."""
    if run.record.exists() and (record := read_run_record(run)) is not None:
        require_loaded(record.plugins, run=run.path, folder=run.plugins)


def adopt_files(run: RunDir) -> RunRecord:
    """Record the present files of a run as those that belong together; keep its plug-ins."""
    run.require_weights()
    read_header(run.weights)
    config = read_yaml_file(run.config)
    if not isinstance(config, dict):
        raise CheckpointError(f"{run.config}: expected a mapping of the run's fields")
    try:
        old = read_run_record(run)
    except UserError:
        old = None
    return write_run_record(run, config=config, plugins=old.plugins if old else ())


def _metadata_problems(run: RunDir, *, config: Any) -> list[str]:
    metadata, problems = read_header(run.model).metadata, []
    has_tokenizer = TOKENIZER_KEY in metadata and run.tokenizer.is_file()
    if has_tokenizer and metadata[TOKENIZER_KEY] != sha256(run.tokenizer):
        problems.append(f"{run.tokenizer.name} is not the one that {run.model.name} was made with")
    if MODEL_KEY in metadata and isinstance(config, dict):
        trained = parse_json(metadata[MODEL_KEY].encode(), kind=RUN_RECORD_FILE, where=run.model)
        owner = f"{run.model.name} was made with"
        problems += _config_problems(
            {"model": trained}, {"model": config.get("model")}, owner=owner
        )
    return problems


def _config_problems(trained: Any, found: Any, *, owner: str) -> list[str]:
    """Compare two configs by value. A key that only the present one has is of a newer version."""
    old, _ = upgrade_config(trained)
    new, _ = upgrade_config(found)
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return [f"config.yaml is no mapping, {owner} one"]
    lines = [
        f"{printable(key)}: {printable(after)}, {owner} {printable(before)}"
        for key, (before, after) in config_differences(old, new).items()
        if before != "-"
    ]
    shown = lines[:MAX_SHOWN_DIFFERENCES]
    more = [f"and {len(lines) - len(shown)} more"] if len(lines) > len(shown) else []
    return [f"config.yaml has {line}" for line in shown] + more
