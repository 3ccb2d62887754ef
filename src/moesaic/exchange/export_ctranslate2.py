"""Export to CTranslate2: a dense encoder-decoder, through its own converter.

The converter reads the directory that ``export_model`` writes, and holds the whole model in memory.
What it takes for granted (a padding of id 1, an untied table of T5 as tied, epsilons) is put right.
Needs the packages ``ctranslate2`` and ``transformers`` (``pip install "moesaic[ctranslate2]"``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import CheckpointError, UserError
from moesaic.core.files import copy_files, new_directory, write_json
from moesaic.data.tokenizer import Tokenizer
from moesaic.exchange.compare_with_ctranslate2 import (
    CTranslate2Agreement,
    compare_with_ctranslate2,
    require_ctranslate2,
)
from moesaic.exchange.config_mapping import field_of
from moesaic.exchange.export_model import (
    ExportedModel,
    open_for_export,
    write_export,
)
from moesaic.exchange.family import Family
from moesaic.exchange.gguf_families import ARCHITECTURES
from moesaic.exchange.hf_directory import CONFIG, carried_files, read_hf_config
from moesaic.exchange.same_model import resolved
from moesaic.model.config import ModelConfig
from moesaic.moe.config import MoE

_FAMILIES = ("m2m_100", "t5")


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What the converter asks of a tokenizer: the tokens by id, and those of roles."""

    names: Sequence[str]
    unk_token_id: int
    eos_token: str
    pad_token: str
    special_tokens_map: Mapping[str, Any]

    @property
    def unk_token(self) -> str:
        return self.names[self.unk_token_id]

    @property
    def bos_token(self) -> str:
        return self.eos_token

    def get_vocab(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def convert_ids_to_tokens(self, index: int) -> str:
        return self.names[index]


def export_ctranslate2(
    run: Path, *, out: Path, verify: bool = False
) -> tuple[ExportedModel, CTranslate2Agreement | None]:
    """Write the directory ``out`` with a model of CTranslate2 and the files of its tokenizer.

    Args:
        run: The directory of a finished run or of an imported model.
        out: Must not exist yet.
        verify: Compare the two models first; one that differs is not written.

    Raises:
        CheckpointError: CTranslate2 computes no such model; the reason is named.
        FileError: ``out`` exists.
        UserError: A package is not installed.
    """
    library = require_ctranslate2()
    source = open_for_export(run)
    directory, model = source.run, source.model
    _require_dense(model, source.family)
    with new_directory(out) as part, TemporaryDirectory() as above:
        through = Path(above) / "model"
        exported = write_export(source, out=through)
        theirs = read_hf_config(through)
        tokens = _tokens(directory, theirs, rows=model.vocab_size)
        _convert(library, model, through, to=part, tokens=tokens)
        start = theirs.get("decoder_start_token_id")
        write_json(
            part / CONFIG,
            read_hf_config(part)
            | {
                "decoder_start_token": None
                if start is None
                else tokens.convert_ids_to_tokens(start),
                "layer_norm_epsilon": field_of(model, "norm.eps"),
            },
        )
        copy_files([path for path in carried_files(through) if path.name != CONFIG], to=part)
        agreement = None
        if verify:
            agreement = compare_with_ctranslate2(part, ours=run, names=tokens.names, theirs=theirs)
    return replace(exported, layout="ctranslate2"), agreement


def _require_dense(model: ModelConfig, family: Family) -> None:
    moe, ways = resolved(model).moe, "--to hf writes the model for transformers"
    if family.model_type in ARCHITECTURES:
        ways += ", --to gguf for llama.cpp"
    if isinstance(moe, MoE):
        raise CheckpointError(
            f"CTranslate2 has no layers with experts, but model.moe.experts is {moe.experts}: "
            f"{ways}"
        )
    if family.model_type not in _FAMILIES:
        raise CheckpointError(
            f"--to ctranslate2 writes encoder-decoders ({', '.join(_FAMILIES)}), but this is "
            f"{family.model_type}: {ways}"
        )


def _tokens(run: RunDir, theirs: Mapping[str, Any], *, rows: int) -> _Tokens:
    """Return a name for each row; without a tokenizer, its number."""
    if run.tokenizer.is_file():
        tokenizer = Tokenizer.load(run.tokenizer)
        known = tokenizer.vocabulary
        names = [tokenizer.id_to_token(i) for i in range(rows)]
        end, unknown, pad = known.eos, known.unk, known.pad
    else:
        names = [f"<{i}>" for i in range(rows)]
        end, unknown, pad = theirs.get("eos_token_id", rows - 1), None, None
    pad = end if pad is None else pad
    return _Tokens(names, pad if unknown is None else unknown, names[end], names[pad], {})


def _convert(library: Any, model: ModelConfig, through: Path, *, to: Path, tokens: _Tokens) -> None:
    """Run their converter, with our tokens. Raises CheckpointError."""
    converter = library.converters.TransformersConverter(str(through))
    load = converter.load_model

    def load_model(*args: Any, **settings: Any) -> Any:
        theirs = load(*args, **settings)
        theirs.config.tie_word_embeddings = model.embedding.tied
        if theirs.config.model_type == "m2m_100":
            for side in (theirs.model.encoder, theirs.model.decoder):
                side.embed_positions.offset = field_of(model, "position.offset")
        return theirs

    converter.load_model = load_model
    converter.load_tokenizer = lambda *_, **__: tokens
    try:
        converter.convert(str(to), force=True)
    except NameError as error:  # how it says that transformers is missing
        raise UserError('CTranslate2 needs: pip install "moesaic[ctranslate2]"') from error
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"CTranslate2 cannot convert the model: {error}") from error
