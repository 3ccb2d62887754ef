"""Import: a Hugging Face directory becomes a model directory like any other.

The config is translated and every tensor accounted for before anything is written; then tensors
are read and written some rows at a time. The directory appears when it is complete.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesaic.checkpoint.checkpoint_directory import Disk
from moesaic.checkpoint.model_card import ModelCard, card_parameters, card_task
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import weights_metadata, write_run_record
from moesaic.checkpoint.safetensors_io import serialize_chunks
from moesaic.core.errors import CheckpointError, ConfigError, DataError
from moesaic.core.files import atomic_write, copy_files, new_directory
from moesaic.core.units import show_bytes
from moesaic.corpus.languages import find_language
from moesaic.corpus.text_rules import DocumentText, GeneralText, write_text_rules
from moesaic.data.collators import Collator, DecoderOnlyCollator, EncoderDecoderCollator
from moesaic.data.document_packing import Concatenated
from moesaic.data.imported_tokenizer import FromFile
from moesaic.data.language_tag import FirstTargetToken, LanguageTag, NoTag
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import CausalLM, Translation
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.tokenizer_source import TokenizerSource
from moesaic.exchange.config_entries import LENGTH
from moesaic.exchange.dcp_files import open_tensors
from moesaic.exchange.families import FAMILIES, family_of
from moesaic.exchange.family import Family
from moesaic.exchange.hf_directory import (
    CONFIG,
    TextStart,
    carried_files,
    find_text_start,
    read_hf_config,
    require_plausible_sizes,
    require_same_tensors,
)
from moesaic.exchange.tensor_files import PutTogether, TensorFiles
from moesaic.exchange.tensor_table import TensorPiece, source_shapes
from moesaic.model.config import ModelConfig
from moesaic.serve.imported_generation import GENERATION, read_imported_generation
from moesaic.train.corpus_source import CorpusFolder
from moesaic.train.run import Run
from moesaic.train.text_data import TextData

LONGEST_ROW = 4096  # of a row of an imported model, in training
TOKENIZER_FILES = ("tokenizer.json", "*.model")
_LANGUAGE_TAG = re.compile("<?[a-z]{3}_[A-Z][a-z]{3}(_[A-Z]{2})?>?")


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """What was read: the family and the layout of its tensors, their number and size."""

    family: str
    layout: str
    tensors: int
    bytes: int
    model: ModelConfig
    notes: tuple[str, ...]


def import_model(
    directory: Path,
    *,
    out: Path,
    layout: str = "auto",
    tokenizer: TokenizerSource | None = None,
    languages: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> ImportedModel:
    """Write the model directory ``out`` with the model of a Hugging Face directory.

    Args:
        directory: Its config, tokenizer, and weights: safetensors files, or a distributed
            checkpoint of torch with names of Hugging Face or torchtitan.
        out: Must not exist yet.
        layout: The names of expert tensors, ``fused`` or ``per-expert``; ``auto`` looks.
        tokenizer: Where the tokenizer is; None: in the directory, if there is one.
        languages: Codes of the languages whose tags the tokenizer has.
        drop: Patterns (``model.layers.61.*``) of tensors to leave out, if the model has no
            such part here (multi-token prediction).

    Raises:
        CheckpointError: The family is unknown, or the tensors are not those of the config.
        FileError: ``out`` exists.
        ConfigError: Something that the config asks for does not exist here.
        DataError: The tokenizer cannot be read.
    """
    theirs = read_hf_config(directory)
    family = family_of(theirs.get("model_type"), where=str(directory / CONFIG))
    files = open_tensors(directory, theirs)
    require_plausible_sizes(family, files, theirs=theirs, where=directory / CONFIG)
    model = _read_config(family, theirs, where=directory / CONFIG)
    layout, pieces = find_pieces(family, model, files, layout=layout)
    dropped = replace(family, derived=(*family.derived, *map(fnmatch.translate, drop)))
    require_same_tensors(dropped, files, expected=source_shapes(pieces), where=directory)
    unread = family.mapping.unread_keys(theirs)
    notes = [f"{CONFIG}: nothing here reads {', '.join(unread)}"] if unread else []
    notes += files.notes
    notes += [f"left out on request: the tensors {pattern}" for pattern in drop]
    notes += _notes_on_generation(directory, model)
    with new_directory(out) as path:
        part = RunDir(path)
        if tokenizer is not None or any(list(directory.glob(p)) for p in TOKENIZER_FILES):
            source = tokenizer or _tokenizer_of(directory, family)
            made = source.make({}, languages=languages, notify=notes.append)
            if model.encoder.layers and not languages and (found := _languages_of(made)):
                languages = found
                made = source.make({}, languages=languages, notify=lambda _: None)
            made.save(part.tokenizer)
        else:
            notes.append("no tokenizer was found: the model scores ids, and no text")
        copy_files(carried_files(directory), to=part.imported)
        # their tokenizers are given a text as it is; those of encoder-decoders read one line
        write_text_rules(part.text_rules, GeneralText() if model.encoder.layers else DocumentText())
        start = find_text_start(directory, theirs)
        run = imported_run(out, model, theirs=theirs, languages=languages, text_start=start)
        size = _write_model(part, run, PutTogether(pieces, files))
        facts = {"imported from": f"{directory.name} ({family.architecture}, {layout})"}
        _write_card(part, run, facts=facts, notes=notes, languages=languages)
    return ImportedModel(family.model_type, layout, len(files.tensors), size, model, tuple(notes))


def _notes_on_generation(directory: Path, model: ModelConfig) -> list[str]:
    """Return a note if keys of their generation config do nothing here."""
    use = "translation" if model.encoder.layers else "texts"
    unused = read_imported_generation(directory).unused[use]
    return [f"{GENERATION}: no search here uses {', '.join(unused)}"] if unused else []


def find_pieces(
    family: Family, model: ModelConfig, files: TensorFiles, *, layout: str
) -> tuple[str, list[TensorPiece]]:
    """Return the layout that a checkpoint has, and its pieces with our tensors as targets.

    That is ``layout``, or with ``auto`` the one most of whose tensors are there.
    """
    if layout != "auto" and layout not in family.layouts:
        known = ", ".join(family.layouts)
        raise CheckpointError(f"{family.model_type} has no layout {layout!r}, expected {known}")
    names = list(family.layouts) if layout == "auto" else [layout]
    found = {name: family.pieces(model, layout=name) for name in names}
    best = max(found, key=lambda name: len(source_shapes(found[name]).keys() & files.tensors))
    return best, found[best]


def imported_run(
    out: Path,
    model: ModelConfig,
    *,
    theirs: Mapping[str, Any],
    languages: Sequence[str],
    text_start: TextStart = "eos",
) -> Run:
    """Return the Run of an imported model: a starting point of fine-tuning."""
    longest = theirs.get(LENGTH)
    row = min(longest, LONGEST_ROW) if isinstance(longest, int) and longest >= 2 else LONGEST_ROW
    encoder = bool(model.encoder.layers)
    collator: Collator = DecoderOnlyCollator(tag=NoTag(start=text_start))
    task = WeightedTask(task=CausalLM(packing=Concatenated()))
    if encoder:
        collator = EncoderDecoderCollator(tag=_tag_of(theirs))
        task = WeightedTask(task=Translation())
    return Run(
        name=out.name,
        data=TextData(
            corpus=CorpusFolder(path="corpus" if encoder else "documents"),
            languages=tuple(languages),
            tokenizer=FromFile(path=str(RunDir(out.resolve()).tokenizer), tags={}),
            mixture=MixtureConfig(tasks=(task,)),
            loader=LoaderConfig(
                batch_tokens=max(4096, 2 * row),
                max_source=row if encoder else 256,
                max_target=row,
                collator=collator,
            ),
        ),
        model=model,
        steps=1000,
    )


def _tokenizer_of(directory: Path, family: Family) -> TokenizerSource:
    """Return the tokenizer beside a model. Raises DataError: the order of its rows is not known."""
    if family.fairseq_rows and not (directory / "tokenizer.json").is_file():
        raise DataError(
            f"{directory}: found a SentencePiece model alone, whose ids are not the rows of a "
            f"{family.model_type}; expected a tokenizer.json (save_pretrained of transformers "
            "writes one), or --tokenizer with the order of its rows (id_map)"
        )
    return FromFile(path=str(directory), tags={})


def _languages_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the languages whose tags are tokens, as in NLLB (``deu_Latn``) or here."""
    names = map(tokenizer.id_to_token, range(tokenizer.vocab_size))
    codes = {name.strip("<>") for name in names if _LANGUAGE_TAG.fullmatch(name)}
    known = ((name, find_language(name)) for name in sorted(codes))
    return tuple(name for name, language in known if language and language.code == name)


def _tag_of(theirs: Mapping[str, Any]) -> LanguageTag:
    """Return the tag of an encoder-decoder, whose decoder starts with the token of its config."""
    family = FAMILIES.get(theirs.get("model_type", ""))
    tag = family.tag if family else FirstTargetToken()
    first = theirs.get("decoder_start_token_id")
    if first is None:
        return tag
    roles = ("eos", "bos", "pad")
    start = next((role for role in roles if theirs.get(f"{role}_token_id") == first), tag.start)
    return tag.replace(start=start)


def _read_config(family: Family, theirs: Mapping[str, Any], *, where: Path) -> ModelConfig:
    try:
        return family.mapping.read(theirs)
    except ConfigError as error:
        raise ConfigError(f"{where}: {problem}" for problem in error.problems) from error


def _write_model(part: RunDir, run: Run, put_together: PutTogether) -> int:
    """Write config, weights and the record of both. Returns the bytes of all tensors."""
    targets, disk = put_together.targets, Disk()
    size = sum(tensor.numel() * tensor.element_size() for tensor in targets.values())
    if size > disk.free_bytes(part.path):
        free = show_bytes(disk.free_bytes(part.path))
        raise CheckpointError(f"{part.path.parent}: {free} free, expected {show_bytes(size)}")
    atomic_write(part.config, run.to_yaml())
    metadata = weights_metadata(part, model=run.model.to_dict())
    disk.write(part.model, chunks=serialize_chunks(targets, read=put_together, metadata=metadata))
    write_run_record(part, config=run.to_dict(), plugins=())
    return size


def _write_card(
    part: RunDir,
    run: Run,
    *,
    facts: Mapping[str, str],
    notes: Sequence[str],
    languages: Sequence[str],
) -> None:
    card = ModelCard(
        name=run.name,
        languages=list(languages),
        licence="other",
        parameters=card_parameters(run.model),
        facts=facts,
        task=card_task(run.model),
        notes=["The licence is that of the imported model.", *notes],
    )
    atomic_write(part.card, card.text())
