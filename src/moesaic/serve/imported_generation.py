"""Generation settings that an imported model came with: its ``generation_config.json``.

What the searches here have is the default of ``translate`` and ``generate``. A directory without
the file has such keys in its ``config.json``, or none.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import MIB, Count, FileKind, FileShape, read_json_mapping

GENERATION = "generation_config.json"
GENERATION_FILE = FileKind(name=GENERATION, max_bytes=16 * MIB, error=CheckpointError)
_NAMES = (GENERATION, "config.json")  # the first one that there is
_NO_SEARCH = frozenset(  # of no consequence for a search, or read elsewhere
    """bos_token_id pad_token_id eos_token_id decoder_start_token_id transformers_version use_cache
    _from_model_config cache_implementation return_dict_in_generate output_attentions
    output_hidden_states output_scores output_logits""".split()  # noqa: SIM905
)
_NEUTRAL_AT_ONE = {
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "typical_p",
    "encoder_repetition_penalty",
}
_BOTH = {"no_repeat_ngram_size", "repetition_penalty"}
_OF_TRANSLATION = {"num_beams", "length_penalty", "early_stopping", "max_length", "max_new_tokens"}
_OF_TEXTS = {"do_sample", "temperature", "top_k", "top_p", "min_p", "max_new_tokens"}


class _GenerationShape(FileShape):
    kind: ClassVar[FileKind] = GENERATION_FILE
    eos_token_id: Count | list[Count] | None = None
    num_beams: Annotated[int, Field(ge=1, le=1024)] | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    no_repeat_ngram_size: Count | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None


@dataclass(frozen=True, slots=True)
class ImportedGeneration:
    """Fields of a ``Beam`` (``translation``) and of a ``Sample`` (``texts``), limits, and ends.

    ``max_target`` and ``max_tokens`` are limits in tokens of a translation and of a text; ``ends``
    are the ids that end one. ``unused`` are keys of theirs that do nothing in translation, or (if
    the key has it) in texts.
    """

    translation: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, Any] = field(default_factory=dict)
    max_target: int | None = None
    max_tokens: int | None = None
    ends: tuple[int, ...] = ()
    unused: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"translation": (), "texts": ()}
    )


def read_imported_generation(imported: Path) -> ImportedGeneration:
    """Read the settings in a directory with files of theirs; none if it has no such file.

    Raises CheckpointError, which names the key, for a value of another kind or out of its range.
    """
    path = next((imported / name for name in _NAMES if (imported / name).is_file()), None)
    if path is None:
        return ImportedGeneration()
    found, given = _GenerationShape.read(path), read_json_mapping(path, GENERATION_FILE)
    repetition = _given(found, no_repeat_ngram_size="", repetition_penalty="")
    beam = _given(found, num_beams="size", length_penalty="", early_stopping="")
    if beam.get("length_penalty", 0) < 0:
        del beam["length_penalty"]  # which would prefer short answers, and has no bound
    if "size" in beam:
        beam = {"early_stopping": False} | beam  # what an absent key means there
    of_file = path.name == GENERATION  # config.json has other keys than these, and top_k of routers
    sample = _given(found, temperature="", top_k="", top_p="", min_p="") if of_file else {}
    if found.do_sample:
        sample = {"temperature": 1.0, "top_k": 50} | sample
    elif found.do_sample is False:
        sample = {"temperature": 0.0}
    ends = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
    return ImportedGeneration(
        translation=repetition | beam,
        texts=repetition | sample,
        # the limits of theirs count the tag of the target language, or the start before it
        max_target=found.max_new_tokens or (found.max_length - 1 if found.max_length else None),
        max_tokens=found.max_new_tokens,
        ends=tuple(end for end in ends if end is not None),
        unused={
            "translation": tuple(_unused(given, _BOTH | _OF_TRANSLATION)) if of_file else (),
            "texts": tuple(_unused(given, _BOTH | _OF_TEXTS)) if of_file else (),
        },
    )


def _given(found: _GenerationShape, **names: str) -> dict[str, Any]:
    """Return the keys that have a value, under our names (``""``: the same)."""
    values = {ours or key: getattr(found, key) for key, ours in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def _unused(given: Mapping[str, Any], used: set[str]) -> Iterator[str]:
    """Yield the keys that would do something and do not here."""
    for key, value in given.items():
        neutral = not value or (value == 1 and key in _NEUTRAL_AT_ONE)
        negative = key == "length_penalty" and isinstance(value, int | float) and value < 0
        if negative or not (neutral or key in used or key in _NO_SEARCH):
            yield key
