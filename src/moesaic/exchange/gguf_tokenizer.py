"""A tokenizer in the fields of a GGUF file, as llama.cpp reads them.

Two kinds have an equivalent there: pieces of characters with bytes for the rest (ours, and those of
SentencePiece), whose merges become scores, and byte-level BPE with one of the patterns that
llama.cpp has by name.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.file_reader import read_json_mapping
from moesaic.data.collators import DecoderOnlyCollator
from moesaic.data.language_tag import TARGET_TAG
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.tokenizer_file import TOKENIZER_FILE
from moesaic.serve.open_run import read_collator

SPACE = "\u2581"  # what SentencePiece and llama.cpp write for a space
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = ""  # the pattern of ByteLevel itself
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_BEFORE, _SUFFIX = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    f"{_BEFORE}[{_UPPER}]*[{_LOWER}]+{_SUFFIX}|{_BEFORE}[{_UPPER}]+[{_LOWER}]*{_SUFFIX}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {  # of byte-level BPE: the names that llama.cpp has for them
    f"{_LETTERS}\\p{{N}}{_REST}": "qwen2",
    f"{_LETTERS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    _O200K: "gpt-4o",
    _GPT2: "gpt-2",
}


@dataclass(frozen=True, slots=True)
class GGUFTokens:
    """The vocabulary of a GGUF file, of the kind ``llama`` (pieces) or ``gpt2`` (bytes).

    ``start`` is the id that a text begins with, None if that depends on the text.
    """

    model: str
    notes: tuple[str, ...]
    names: Sequence[str]
    types: Sequence[int]
    pattern: str = "default"
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    roles: Mapping[str, int] = field(default_factory=dict)
    start: int | None = None
    space_prefix: bool = False


def gguf_tokens(run: RunDir, *, rows: int) -> GGUFTokens:
    """Return the tokenizer of a run, with a token for each of the ``rows`` of its model."""
    if not run.tokenizer.is_file():
        return _without_text(rows, "there is no tokenizer")
    tokenizer = Tokenizer.load(run.tokenizer)
    tree = read_json_mapping(run.tokenizer, TOKENIZER_FILE)
    model, pattern = tree["model"], _byte_level_pattern(tree)
    pieces = pattern is None and model.get("type") == "BPE" and model.get("byte_fallback")
    if tokenizer.vocabulary.id_map is not None or not (pieces or pattern in _PATTERNS):
        kind = json.dumps({"model": model.get("type"), "split at": pattern})
        return _without_text(rows, f"llama.cpp has no tokenizer like this one ({kind})")
    names, types = _names_and_types(tree, tokenizer, rows=rows)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    roles = tokenizer.vocabulary.roles
    start = _start(run, tokenizer)
    notes = tuple(_what_differs(tree, pieces=bool(pieces)))
    if start is None:
        notes += ("a text begins with a token that is named before it",)
    if not pieces:
        joined, name = [" ".join(merge) for merge in merges], _PATTERNS[pattern or _GPT2]
        return GGUFTokens(
            "gpt2", notes, names, types, pattern=name, merges=joined, roles=roles, start=start
        )
    rank: dict[str, float] = {}
    for number, (first, second) in enumerate(merges, start=1):
        rank.setdefault(first + second, -float(number))
    scores = [rank.get(name, 0.0) for name in names]
    spaced = [
        name.replace(" ", SPACE) if kind == NORMAL else name
        for name, kind in zip(names, types, strict=True)
    ]
    prefix = _has_space_prefix(tree)
    return GGUFTokens(
        "llama",
        notes,
        spaced,
        types,
        scores=scores,
        roles=roles,
        start=start,
        space_prefix=prefix,
    )


def _what_differs(tree: Mapping[str, Any], *, pieces: bool) -> Iterator[str]:
    """Yield what llama.cpp does otherwise with some texts."""
    normalizer, splitter = tree.get("normalizer") or {}, tree.get("pre_tokenizer") or {}
    if normalizer and not pieces:
        yield f"llama.cpp does not normalise texts, the tokenizer does ({normalizer.get('type')})"
    if pieces and splitter.get("prepend_scheme") in ("first", "always"):
        yield "llama.cpp puts one more space before a text that begins with a space"


def _without_text(rows: int, why: str) -> GGUFTokens:
    """Return tokens that no text has: llama.cpp computes with ids only if each has a name."""
    names = [f"<no token {i}>" for i in range(rows)]
    return GGUFTokens("llama", (f"{why}: the file has ids alone",), names, [UNUSED] * rows)


def _names_and_types(
    tree: Mapping[str, Any], tokenizer: Tokenizer, *, rows: int
) -> tuple[list[str], list[int]]:
    added = tree.get("added_tokens") or ()
    ids = tree["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    names, types = [f"<no token {i}>" for i in range(rows)], [UNUSED] * rows
    for name, index in ids.items():
        byte = len(name) == len("<0x00>") and name.startswith("<0x")
        names[index], types[index] = name, BYTE if byte else NORMAL
    vocabulary = tokenizer.vocabulary
    for index in (*vocabulary.not_text, *vocabulary.roles.values(), *vocabulary.tags.values()):
        if names[index] in ids:
            types[index] = UNUSED if names[index].startswith("<unused") else CONTROL
    if vocabulary.unk is not None:
        types[vocabulary.unk] = UNKNOWN
    return names, types


def _byte_level_pattern(tree: Mapping[str, Any]) -> str | None:
    """Return the pattern that byte-level BPE splits texts at; None for another kind."""
    found = tree.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers") or [found]
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    patterns = [step["pattern"].get("Regex", "?") for step in steps if step.get("type") == "Split"]
    return "|and|".join(patterns) if patterns else _GPT2


def _has_space_prefix(tree: Mapping[str, Any]) -> bool:
    parts = json.dumps([tree.get("normalizer"), tree.get("pre_tokenizer")])
    return '"Prepend"' in parts or '"always"' in parts or '"first"' in parts


def _start(run: RunDir, tokenizer: Tokenizer) -> int | None:
    names = (read_collator(run) or DecoderOnlyCollator()).frame.prompt
    if len(names) != 1:
        return None
    if names[0] != TARGET_TAG:
        return tokenizer.vocabulary.roles.get(names[0])
    tags = [tokenizer.vocabulary.tags.get(code) for code in tokenizer.languages]
    return tags[0] if len(tags) == 1 else None
