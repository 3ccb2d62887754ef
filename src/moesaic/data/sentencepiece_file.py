"""SentencePiece models (``.model``, arXiv:1808.06226): read, and built as a tokenizer.

The file is a protocol buffer, of which the fields below are read. Pieces, scores, normalisation and
byte fallback are taken as they are; the segmentation is that of the ``tokenizers`` library.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from struct import unpack

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as HfTokenizer

from moesaic.core.errors import DataError
from moesaic.core.file_reader import MIB, FileKind, read_bytes

SENTENCEPIECE_FILE = FileKind(name="SentencePiece model", max_bytes=256 * MIB, error=DataError)
SPACE = "\u2581"  # what SentencePiece writes for a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_NEVER = -10_000.0  # the score of pieces that text must not match: control symbols, bytes
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True, slots=True)
class Piece:
    """An entry of the vocabulary; ``kind`` is SentencePiece's type of it."""

    text: str
    score: float = 0.0
    kind: int = _NORMAL


@dataclass(slots=True)
class SentencePieceModel:
    """What is read of a model; the defaults are those of the format."""

    pieces: list[Piece] = field(default_factory=list)
    algorithm: int = _UNIGRAM
    byte_fallback: bool = False
    suffix_spaces: bool = False
    names: dict[str, str] = field(
        default_factory=lambda: {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    )
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_extra_spaces: bool = True
    escape_spaces: bool = True

    @property
    def roles(self) -> dict[str, str]:
        """The pieces of the roles that the model has, by role."""
        found = {p.text: "unk" for p in self.pieces if p.kind == _UNKNOWN}
        control = {p.text for p in self.pieces if p.kind == _CONTROL}
        found |= {name: role for role, name in self.names.items() if name in control}
        return {role: name for name, role in found.items()}

    @property
    def control(self) -> tuple[str, ...]:
        """The pieces that are no text."""
        return tuple(p.text for p in self.pieces if p.kind in (_UNKNOWN, _CONTROL))


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a ``.model`` file. Raises DataError naming what is wrong or not supported."""
    data = read_bytes(path, SENTENCEPIECE_FILE)
    try:
        model = _read_model(data)
        texts = [piece.text for piece in model.pieces]
    except (ValueError, IndexError) as error:
        problem = f"not a {SENTENCEPIECE_FILE.name} ({error})"
        raise SENTENCEPIECE_FILE.problem(path, problem) from error
    if not texts or len(set(texts)) < len(texts):
        found = "no pieces" if not texts else "a piece twice"
        raise SENTENCEPIECE_FILE.problem(path, f"found {found}, expected a vocabulary")
    if model.algorithm not in (_UNIGRAM, _BPE):
        raise SENTENCEPIECE_FILE.problem(
            path, "it segments into words or characters, expected a Unigram or BPE model"
        )
    if model.suffix_spaces:
        raise SENTENCEPIECE_FILE.problem(
            path, "treat_whitespace_as_suffix: found true, expected spaces before words"
        )
    return model


def build_sentencepiece(model: SentencePieceModel) -> HfTokenizer:
    """Return the tokenizer of a model; ids are those of its pieces."""
    unigram = model.algorithm == _UNIGRAM
    tokenizer = HfTokenizer(_unigram(model) if unigram else _bpe(model))
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_spaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if model.escape_spaces:
        steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    decoding: list[decoders.Decoder] = [decoders.ByteFallback(), decoders.Fuse()]
    if model.escape_spaces:
        decoding.insert(0, decoders.Replace(SPACE, " "))
    if model.dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in model.control]
    )
    if not unigram:  # in a Unigram model their score decides
        own = [p.text for p in model.pieces if p.kind == _USER_DEFINED]
        tokenizer.add_tokens([AddedToken(name, special=False, normalized=True) for name in own])
    return tokenizer


def _unigram(model: SentencePieceModel) -> models.Model:
    most = max((p.score for p in model.pieces if p.kind == _NORMAL), default=0.0)

    def score(piece: Piece) -> float:
        if piece.kind == _USER_DEFINED:  # above any segmentation of the same text
            return len(piece.text.encode()) * most - 0.1
        return piece.score if piece.kind == _NORMAL else _NEVER

    unknown = [i for i, p in enumerate(model.pieces) if p.kind == _UNKNOWN]
    return models.Unigram(
        vocab=[(p.text, score(p)) for p in model.pieces],
        unk_id=unknown[0] if unknown else None,
        byte_fallback=model.byte_fallback,
    )


def _bpe(model: SentencePieceModel) -> models.Model:
    """Return a BPE model that merges in the order of the scores of what a merge makes."""
    unknown = [p.text for p in model.pieces if p.kind == _UNKNOWN]
    normal = {p.text for p in model.pieces if p.kind == _NORMAL}
    merges = [
        (p.text[:cut], p.text[cut:])
        for p in sorted(model.pieces, key=lambda piece: -piece.score)
        if p.kind == _NORMAL
        for cut in range(1, len(p.text))
        if p.text[:cut] in normal and p.text[cut:] in normal
    ]
    return models.BPE(
        vocab={p.text: i for i, p in enumerate(model.pieces)},
        merges=merges,
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _read_model(data: bytes) -> SentencePieceModel:
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == 1:
            model.pieces.append(_read_piece(_content(value)))
        elif number == 2:
            _read_trainer(_content(value), model)
        elif number == 3:
            _read_normalizer(_content(value), model)
    return model


def _read_piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _content(value).decode()
        elif number == 2:
            (score,) = unpack("<f", _content(value))
        elif number == 3:
            kind = _number(value)
    if not text or score != score or abs(score) == float("inf"):
        raise ValueError(f"a piece {text!r:.40} of score {score}")
    if not _NORMAL <= kind <= _BYTE:
        raise ValueError(f"a piece {text!r:.40} of the unknown type {kind}")
    return Piece(text, score, kind)


def _read_trainer(data: bytes, model: SentencePieceModel) -> None:
    names = {46: "bos", 47: "eos", 48: "pad"}
    for number, value in _fields(data):
        if number == 3:
            model.algorithm = _number(value)
        elif number == 24:
            model.suffix_spaces = bool(_number(value))
        elif number == 35:
            model.byte_fallback = bool(_number(value))
        elif number in names:
            model.names[names[number]] = _content(value).decode()


def _read_normalizer(data: bytes, model: SentencePieceModel) -> None:
    for number, value in _fields(data):
        if number == 2:
            model.charsmap = _content(value)
        elif number == 3:
            model.dummy_prefix = bool(_number(value))
        elif number == 4:
            model.remove_extra_spaces = bool(_number(value))
        elif number == 5:
            model.escape_spaces = bool(_number(value))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message: number, and a whole number or bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == _BYTES:
            size, place = _varint(data, place)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"byte {place}: a field of the unknown wire type {wire}")
        if place + size > len(data):
            raise ValueError(f"byte {place}: a field of {size} bytes, but {len(data) - place} left")
        yield number, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError(f"byte {place}: a number of more than 64 bits")


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes where a number is expected")
    return value


def _content(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes are expected")
    return value
