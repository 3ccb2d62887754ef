"""Tokenizers of other libraries, as files: made here, so that every field of a format is known."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

TEXTS = ["wie geht es dir", "the end of the lines", "an end", "file 0 1 2 3 !", "Öffnen"] * 40


def write_sentencepiece(path: Path, **changes: object) -> Path:
    """A Unigram ``.model`` over the letters of ``TEXTS``, by words; ``changes`` of its parts."""
    words = sorted({word for text in TEXTS for word in text.split()})
    letters = sorted({c for text in TEXTS for c in text if c != " "})
    control = changes.get("control", [("<unk>", 2), ("<s>", 3), ("</s>", 3)])
    pieces = [(name, 0.0, kind) for name, kind in control]
    if changes.get("byte_fallback"):
        pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    pieces += [("\u2581" + word, -3.0 - i / 7, 1) for i, word in enumerate(words)]
    pieces += [(c, -6.0 - i / 3, 1) for i, c in enumerate(("\u2581", *letters))]
    trainer = _field(3, changes.get("algorithm", 1))
    trainer += _field(35, int(bool(changes.get("byte_fallback"))))
    normalizer = _field(1, b"identity") + _field(3, changes.get("dummy_prefix", 1))
    data = b"".join(_field(1, _piece(*piece)) for piece in pieces)
    path.write_bytes(data + _field(2, trainer) + _field(3, normalizer))
    return path


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def byte_level(path: Path, *, specials: Sequence[str] = ("<|endoftext|>",)) -> Path:
    """GPT-2's kind: id 0 is "!", the end is also the padding, and there is nothing unknown."""
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(list(specials))
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(pad_token=specials[0], length=9)
    tokenizer.save(str(path))
    names = {"eos_token": specials[0], "pad_token": {"content": specials[0]}}
    path.with_name("tokenizer_config.json").write_text(json.dumps(names))
    return path


def word_piece(path: Path) -> Path:
    """BERT's kind: marks parts of words, has a template of special tokens, and a gap in its ids."""
    words = sorted({word.lower() for text in TEXTS for word in text.split()})
    letters = sorted({c for word in words for c in word})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    known = {name: i for i, name in enumerate(dict.fromkeys([*names, *words]))}
    known["late"] = len(known) + 3
    tokenizer = HfTokenizer(models.WordPiece(known, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(n, special=True) for n in names[:5]])
    tokenizer.save(str(path))
    tree = json.loads(path.read_text())
    tree["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    path.write_text(json.dumps(tree))
    return path
