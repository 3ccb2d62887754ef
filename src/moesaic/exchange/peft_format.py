"""Adapters in the format of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

A matrix of ours that holds several of theirs (queries, keys and values; gate and value) shares its
first factor, which is written once for each. Read, factors that differ become blocks of one. Of
experts that transformers keeps in one tensor, PEFT has the factors of all side by side
(``target_parameters``).

Letters: E experts, M inputs, N outputs, r rank.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import (
    checked_weights_hash,
    copy_beside_weights,
    require_plugins,
    weights_metadata,
    write_run_record,
)
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.core.errors import CheckpointError, printable
from moesaic.core.file_reader import MIB, FileKind, FileShape, read_json_mapping
from moesaic.core.files import atomic_write, new_directory, write_json
from moesaic.core.shapes import Float, Tensor
from moesaic.exchange.export_model import ExportSource, open_for_export, open_without_weights
from moesaic.exchange.family import FUSED
from moesaic.exchange.tensor_table import TensorPiece
from moesaic.nn.adapter import adapter_name
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.serve.open_run import read_run_config
from moesaic.train.run import Run
from moesaic.train.warm_start import WeightsOfRun

ADAPTER_CONFIG_FILE = FileKind(
    name="adapter_config.json of PEFT", max_bytes=16 * MIB, error=CheckpointError
)
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# what a LoraConfig must have for its adapter to be ours; a key that is absent has this value
EXPECTED: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}
_FUSED_ORDER = ("gate_up_proj", "down_proj")  # PEFT wraps the first, then the second around it


class AdapterSettings(FileShape):
    """What is read of PEFT's config: the rank ``r``, and ``lora_alpha`` with what divides it."""

    kind: ClassVar[FileKind] = ADAPTER_CONFIG_FILE
    r: int = Field(ge=1, le=1 << 20)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor of the product: alpha / r, or alpha / sqrt(r) (rank-stabilised)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True, slots=True)
class _Factors:
    """The two factors of one matrix of theirs: ``first`` [r, M] and ``second`` [N, r]."""

    first: Float[Tensor, "r M"]
    second: Float[Tensor, "N r"]


@dataclass(slots=True)
class _PeftTensors:
    """Factors by the names of PEFT's files, and the modules and parameters that have them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)

    def add(self, module: str, factors: _Factors) -> None:
        for part, tensor in (("A", factors.first), ("B", factors.second)):
            self.tensors[f"{PREFIX}{module}.lora_{part}.weight"] = tensor.contiguous()


def export_adapter(run: Path, *, out: Path) -> int:
    """Write the adapter of a run as the new directory ``out``; return the number of tensors.

    Raises CheckpointError: the run has no LoRA adapter, no family of transformers holds its model,
    or PEFT cannot express a part (each named).
    """
    directory = RunDir.open(run)
    config = _read_run(directory)
    if not isinstance(config.trainable, LoRA) or not directory.adapter.is_file():
        kind = type(config.trainable).__name__
        raise CheckpointError(
            f"{run}: trainable is {kind}, and PEFT's format holds low-rank adapters; expected a "
            "finished run of trainable=LoRA(...)"
        )
    pieces_of = _pieces_by_name(open_without_weights(directory))
    adapter, written = read_tensors(directory.adapter), _PeftTensors()
    for name, pieces in pieces_of.items():
        first, second = (adapter.get(adapter_name(name, part)) for part in "ab")
        if first is not None and second is not None:
            _write_matrix(written, pieces, first, second)
    decoder_only = not config.model.encoder.layers
    with new_directory(out) as part:
        write_tensors(part / WEIGHTS, tensors=written.tensors, metadata={"format": "pt"})
        described = {
            "r": config.trainable.rank,
            "lora_alpha": config.trainable.alpha,
            "lora_dropout": 0.0,
            "inference_mode": True,
            "task_type": "CAUSAL_LM" if decoder_only else "SEQ_2_SEQ_LM",
            "target_modules": sorted(written.modules),
            "target_parameters": sorted(written.parameters) or None,
        }
        write_json(part / CONFIG, dict(EXPECTED) | described)
    return len(written.tensors)


def import_adapter(directory: Path, *, base: Path, out: Path) -> int:
    """Write the run ``out``, with PEFT's adapter beside the model ``base``; return its matrices.

    Raises CheckpointError: a kind of adapter that is
    not plain LoRA, or tensors that are not of this model.
    """
    settings = read_adapter_config(directory)
    source = open_for_export(base)
    run, theirs = _read_run(source.run), read_tensors(directory / WEIGHTS)
    rank, scale = settings.r, settings.scale
    matrices = {}
    try:
        for name, pieces in _pieces_by_name(source).items():
            if found := list(_read_pieces(theirs, pieces, rank=rank)):
                matrices[name] = _joined(pieces, found)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / WEIGHTS}: its tensors do not fit {base} ({error})"
        ) from error
    if theirs or not matrices:
        name = min(theirs, default="no tensor")
        raise CheckpointError(f"{directory / WEIGHTS}: {name} is of no matrix of {base}")
    widest = max(first.shape[-1 if first.dim() == 3 else -2] for first, _ in matrices.values())
    choice = LoRA(rank=widest, alpha=scale * widest, targets=tuple(sorted(matrices)))
    adapter = {
        adapter_name(name, part): _padded(factor, dim=dim, rank=widest)
        for name, (first, second) in matrices.items()
        for part, factor, dim in zip(
            "ab", (first, second), (2, 1) if first.dim() == 3 else (0, 1), strict=True
        )
    }
    start = WeightsOfRun(path=str(source.run.path), sha256=checked_weights_hash(source.run))
    run = run.replace(name=out.name, initial_weights=start, trainable=choice)
    with new_directory(out) as part:
        made = RunDir(part)
        plugins = copy_beside_weights(source.run, to=made)
        atomic_write(made.config, run.to_yaml())
        metadata = weights_metadata(made, model=run.model.to_dict())
        write_tensors(made.adapter, tensors=adapter, metadata=metadata)
        write_run_record(made, config=run.to_dict(), plugins=plugins)
    return len(matrices)


def read_adapter_config(directory: Path) -> AdapterSettings:
    """Return the settings of a plain LoRA adapter. Raises CheckpointError: of another kind."""
    path = directory / CONFIG
    found = read_json_mapping(path, ADAPTER_CONFIG_FILE)
    for key, expected in EXPECTED.items():
        value = found.get(key, expected)
        if value != expected if expected else value:
            raise CheckpointError(
                f"{path}: {key}={printable(repr(value))}, expected {expected!r}: no plain LoRA"
            )
    return AdapterSettings.read(path)


def _read_run(run: RunDir) -> Run:
    require_plugins(run)
    return Run.from_dict(read_run_config(run))


def _pieces_by_name(source: ExportSource) -> dict[str, list[TensorPiece]]:
    """Return the pieces of each tensor of ours, by the names that transformers has in memory."""
    family = source.family
    layout = FUSED if FUSED in family.layouts else next(iter(family.layouts))
    by_name: dict[str, list[TensorPiece]] = {}
    for piece in family.pieces(source.model, layout=layout):
        by_name.setdefault(piece.target.name, []).append(piece)
    return by_name


def _module_of(piece: TensorPiece) -> str:
    """Return the linear map of theirs that a piece is the weight of. Raises CheckpointError."""
    module = piece.source.name.removesuffix(".weight")
    transposed = len(piece.target.shape) == 3
    if module == piece.source.name or piece.transposed != transposed or any(piece.source.offset):
        raise CheckpointError(
            f"{piece.target.name}: PEFT has no adapter of its place in {piece.source.name}: train "
            "other targets, or merge the adapter and export the model"
        )
    return module


def _write_matrix(
    written: _PeftTensors, pieces: Sequence[TensorPiece], first: Tensor, second: Tensor
) -> None:
    if len(pieces[0].source.shape) == 3:
        module = _fused_module(written, pieces[0])
        # [E, M, r] -> [E * r, M], and [E, r, N] -> [N, r * E], the expert changing fastest
        written.add(module, _Factors(first.mT.flatten(0, 1), second.permute(2, 1, 0).flatten(1)))
        return
    for piece in pieces:
        module, start, width = _module_of(piece), piece.target.offset, piece.target.shape
        if first.dim() == 3:
            outputs = slice(start[2], start[2] + width[2])
            of_expert = _Factors(first[start[0]].T, second[start[0], :, outputs].T)
        else:
            rows = second[start[0] : start[0] + width[0]]
            if piece.order is not None:
                rows = torch.empty_like(rows).index_copy_(0, torch.tensor(piece.order), rows)
            of_expert = _Factors(first, rows)
        written.modules.add(module)
        written.add(module, of_expert)


def _fused_module(written: _PeftTensors, piece: TensorPiece) -> str:
    """Note a tensor of all experts as a target; return its module as PEFT's file names it."""
    module, _, name = piece.source.name.rpartition(".")
    if name not in _FUSED_ORDER or not piece.transposed:
        raise CheckpointError(
            f"{piece.target.name}: {piece.source.name} is not stored as PEFT expects of experts, "
            "[experts, outputs, inputs]: merge the adapter and export the model"
        )
    written.parameters.add(piece.source.name)
    outer = f"{PREFIX}{module}.lora_A.weight"
    if name == _FUSED_ORDER[1] and outer in written.tensors:  # wrapped around the other
        for part in "AB":
            factor = written.tensors.pop(f"{PREFIX}{module}.lora_{part}.weight")
            written.tensors[f"{PREFIX}{module}.base_layer.lora_{part}.weight"] = factor
    return module


def _read_pieces(
    theirs: dict[str, Tensor], pieces: Sequence[TensorPiece], *, rank: int
) -> Iterator[tuple[TensorPiece, _Factors]]:
    """Yield the pieces of a matrix with an adapter, and remove what is read from ``theirs``."""
    if len(pieces[0].source.shape) == 3:
        module, _, name = pieces[0].source.name.rpartition(".")
        inner = f"{PREFIX}{module}.base_layer"
        both = f"{inner}.lora_A.weight" in theirs
        of = inner if both and name == _FUSED_ORDER[0] else f"{PREFIX}{module}"
        first = theirs.get(f"{of}.lora_A.weight")
        if first is None or first.shape[1] != pieces[0].source.shape[2]:
            return
        second = theirs.pop(f"{of}.lora_B.weight")
        del theirs[f"{of}.lora_A.weight"]
        for expert, piece in enumerate(pieces):
            block = first.unflatten(0, (-1, rank))[expert]
            yield piece, _Factors(block, second.unflatten(1, (rank, -1))[..., expert])
        return
    for piece in pieces:
        module = f"{PREFIX}{piece.source.name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in theirs:
            first = theirs.pop(f"{module}.lora_A.weight")
            second = theirs.pop(f"{module}.lora_B.weight")
            order = None if piece.order is None else torch.tensor(piece.order)
            yield piece, _Factors(first, second if order is None else second[order])


def _joined(
    every: Sequence[TensorPiece], found: Sequence[tuple[TensorPiece, _Factors]]
) -> tuple[Tensor, Tensor]:
    """Return the factors of a matrix of ours from those of some of its pieces."""
    shape = tuple(map(max, zip(*(piece.target.end for piece in every), strict=True)))
    if len(shape) == 2:
        return _join_one(found, outputs=shape[0])
    own = [[each for each in found if each[0].target.offset[0] == e] for e in range(shape[0])]
    joined = [_join_one(of, outputs=shape[2]) if of else None for of in own]
    rank = max(pair[0].shape[0] for pair in joined if pair)
    like = found[0][1].first
    pairs = [pair or (like.new_zeros(1, shape[1]), like.new_zeros(shape[2], 1)) for pair in joined]
    first = torch.stack([_padded(a, dim=0, rank=rank).T for a, _ in pairs])
    return first, torch.stack([_padded(b, dim=1, rank=rank).T for _, b in pairs])


def _join_one(
    pieces: Sequence[tuple[TensorPiece, _Factors]], *, outputs: int
) -> tuple[Tensor, Tensor]:
    """Return [r, M] and [N, r] over all outputs: one block if the first factors are equal."""
    firsts = [factors.first for _, factors in pieces]
    same = all(first.equal(firsts[0]) for first in firsts)
    first = firsts[0] if same else torch.cat(firsts)
    second, column = first.new_zeros(outputs, first.shape[0]), 0
    for piece, factors in pieces:
        start = piece.target.offset[-1 if len(piece.target.shape) == 3 else 0]
        width, rank = factors.second.shape
        second[start : start + width, column : column + rank] = factors.second
        column += 0 if same else rank
    return first, second


def _padded(factor: Tensor, *, dim: int, rank: int) -> Tensor:
    missing = list(factor.shape)
    missing[dim] = rank - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(missing)], dim)
