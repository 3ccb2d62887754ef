"""Hugging Face directory: its config, the files of its weights, and the files carried over."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from moesaic.checkpoint.safetensors_io import PICKLE_SUFFIXES, reject_pickle
from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import MIB, FileKind, FileShape, read_json_mapping, require_inside
from moesaic.core.markdown import markdown_table
from moesaic.data.tokenizer_file import TOKENIZER_FILE
from moesaic.exchange.family import Family
from moesaic.exchange.tensor_files import TensorFiles
from moesaic.exchange.tensor_table import Region, Rows, Shape
from moesaic.serve.imported_generation import GENERATION

HF_CONFIG_FILE = FileKind(name="config.json of a model", max_bytes=16 * MIB, error=CheckpointError)
HF_INDEX_FILE = FileKind(
    name="index of weights", max_bytes=256 * MIB, max_values=20_000_000, error=CheckpointError
)
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
CARRIED = (
    CONFIG,
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
MAX_SHOWN = 20
DCP_METADATA = ".metadata"  # of torch.distributed.checkpoint
FOREIGN_FILES = {  # of programs whose checkpoints are pickles, wholly or in part
    "mp_rank_*.pt": "a checkpoint of DeepSpeed or Megatron-LM, whose files are",
    "*expert_*_model_states.pt": "a checkpoint of DeepSpeed-MoE, whose files are",
    "checkpoint*.pt": "a checkpoint of fairseq, whose files are",
}
_CHANNELS = ("vocab_size", "dim", "heads", "hidden", "rank")  # ends of paths
TextStart = Literal["bos", "eos", "text"]


class _IndexShape(FileShape):
    kind: ClassVar[FileKind] = HF_INDEX_FILE
    weight_map: dict[str, str]


class _TokenizerConfigShape(FileShape):
    kind: ClassVar[FileKind] = HF_CONFIG_FILE
    add_bos_token: bool | None = None


def read_hf_config(directory: Path) -> dict[str, Any]:
    """Return the config of a directory. Raises CheckpointError."""
    path = directory / CONFIG
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such folder, expected that of a model with its {CONFIG}; a model of "
            "the Hub is downloaded first: hf download OWNER/NAME --local-dir DIR"
        )
    if not path.is_file():
        if (directory / DCP_METADATA).is_file():
            raise CheckpointError(
                f"{directory}: a distributed checkpoint of torch, which has no {CONFIG}; expected "
                "that of the model on Hugging Face in it (torchtitan has it where "
                "hf_assets_path points), with its tokenizer"
            )
        found = [kind for pattern, kind in FOREIGN_FILES.items() if any(directory.glob(pattern))]
        what = f": this is {found[0]} pickled objects, which can run code" if found else ""
        way = "; convert it where you trust it" if found else ""
        raise CheckpointError(
            f"{directory}{what}: no {CONFIG}, expected a directory of a Hugging Face model{way}"
        )
    found = read_json_mapping(path, HF_CONFIG_FILE)
    quantised = found.get("quantization_config")
    if quantised and quantised.get("quant_method") != "mxfp4":
        raise CheckpointError(
            f"{path}: quantization_config: the weights are quantised, expected those of a float "
            "type or MXFP4; load and save them in bfloat16 first"
        )
    return found


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory. Raises CheckpointError: pickles, or none."""
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(_IndexShape.read(index).weight_map.values()))
        return [require_inside(directory, name, kind=HF_INDEX_FILE, where=index) for name in names]
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    for path in sorted(directory.iterdir()):
        if path.suffix in PICKLE_SUFFIXES and path.is_file():
            reject_pickle(path)
    raise CheckpointError(f"{directory}: found neither {WEIGHTS} nor {INDEX}")


def carried_files(directory: Path) -> list[Path]:
    """Return the files beside the weights that a model is exported with again."""
    named = [directory / name for name in CARRIED]
    return [path for path in (*named, *sorted(directory.glob("*.model"))) if path.is_file()]


def find_text_start(directory: Path, theirs: Mapping[str, Any]) -> TextStart:
    """Return the role of the token that their tokenizer puts before a text.

    ``add_bos_token`` of the tokenizer's config says it, or the post-processor of
    ``tokenizer.json``. Without either it is the bos of the config, if there is one.
    """
    settings, tokenizer = directory / "tokenizer_config.json", directory / "tokenizer.json"
    adds = None
    if settings.is_file():
        # other fields are not read: transformers writes a longest text of 10^30 tokens
        adds = _TokenizerConfigShape.read(settings).add_bos_token
    if adds is None and tokenizer.is_file():
        processor = read_json_mapping(tokenizer, TOKENIZER_FILE).get("post_processor")
        adds = None if processor is None else _starts_with_special(processor)
    if adds is None:
        return "eos" if theirs.get("bos_token_id") is None else "bos"
    return "bos" if adds else "text"


def _starts_with_special(processor: Mapping[str, Any]) -> bool:
    """Return whether a post-processor, or one of a sequence, puts a special token first."""
    inner = [processor, *(processor.get("processors") or ())]
    return any("SpecialToken" in (each.get("single") or [{}])[0] for each in inner)


def require_same_tensors(
    family: Family, files: TensorFiles, *, expected: Mapping[str, Shape], where: Path
) -> None:
    """Raise CheckpointError with a table of all tensors that are not those of a family's model."""
    rows: list[tuple[object, ...]] = [(n, "is in two files", "", "") for n in files.repeated]
    rows += [(n, "is missing", "", list(s)) for n, s in expected.items() if n not in files.tensors]
    for name, tensor in files.tensors.items():
        if name in expected:
            if tensor.shape != expected[name]:
                rows.append((name, "has another shape", list(tensor.shape), list(expected[name])))
        elif name in family.copies and family.copies[name] in files.tensors:
            if not _equal(files, name, family.copies[name]):
                rows.append((name, f"differs from {family.copies[name]}", list(tensor.shape), ""))
        elif not any(re.fullmatch(pattern, name) for pattern in family.derived):
            rows.append((name, "is unexpected", list(tensor.shape), ""))
    if rows:
        table = markdown_table(("tensor", "problem", "found", "expected"), rows[:MAX_SHOWN])
        more = f"and {len(rows) - MAX_SHOWN} more\n" if len(rows) > MAX_SHOWN else ""
        raise CheckpointError(
            f"{where}: {len(rows)} tensors are not those of its config ({family.model_type}); "
            "nothing was written. --drop PATTERN leaves unexpected ones out\n"
            f"{table}{more}".rstrip()
        )


def require_plausible_sizes(
    family: Family, files: TensorFiles, *, theirs: Mapping[str, Any], where: Path
) -> None:
    """Raise CheckpointError for a number in a config that its tensors are far too few for.

    A config that is read asks for its layers, experts and channels one by one. Up to a thousand of
    them are left to the table of ``require_same_tensors``.
    """
    routers = {
        re.compile(re.escape(name).replace(r"\{layer\}", r"\d+"))
        for table in family.layouts.values()
        for ours, rule in table.items()
        if ours.endswith("router.gate.weight") and isinstance(rule, Rows)
        for name in rule.names
    }
    shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
    rows = [s[0] for name, s in shapes.items() for r in routers if s and r.fullmatch(name)]
    size = max((n for shape in shapes.values() for n in shape), default=0)
    held: dict[tuple[str, ...], tuple[int, str]] = {
        _CHANNELS: (size, "tensors of {} rows and columns at most"),
        (".layers",): (len(shapes), "{} tensors"),
        (".experts",): (max(rows, default=0), "routers of {} experts at most"),
    }
    for key, path in family.mapping.numbers().items():
        found = theirs.get(key)
        for ends, (most, what) in held.items():
            if path.endswith(ends) and isinstance(found, int) and found > max(most, 1000):
                raise CheckpointError(
                    f"{where}: {key}: found {found:,}, but the files hold "
                    f"{what.format(f'{most:,}')}; restore the file that differs"
                )


def _equal(files: TensorFiles, name: str, other: str) -> bool:
    """Return whether two tensors have the same values, read row by row in blocks."""
    one, two = files.tensors[name], files.tensors[other]
    if (one.shape, one.dtype) != (two.shape, two.dtype) or not one.shape:
        return False
    step, rest = 4096, one.shape[1:]
    for start in range(0, one.shape[0], step):
        shape = (min(step, one.shape[0] - start), *rest)
        offset = (start, *(0 for _ in rest))
        if not files.read(Region(name, offset, shape)).equal(
            files.read(Region(other, offset, shape))
        ):
            return False
    return True
