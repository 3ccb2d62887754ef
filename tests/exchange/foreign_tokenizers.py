"""Tiny tokenizers of the kinds that published models have, trained here, and difficult texts."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORD = r"[^\r\n\p{L}\p{N}]?"
QWEN2, LLAMA3 = rf"{_LETTERS}\p{{N}}{_REST}", rf"{_LETTERS}\p{{N}}{{1,3}}{_REST}"
O200K = (
    rf"{_WORD}[{_UPPER}]*[{_LOWER}]+{_SUFFIXES}?|{_WORD}[{_UPPER}]+[{_LOWER}]*{_SUFFIXES}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXTS = (
    "The river runs under the old bridge 1234567 and isn't 3.14.",
    "def f(x):\n\treturn x  +  12\n\n",
    "我们明天早上八点在图书馆见面。",
    "Ils ont traversé la ville à pied",
    "Сегодня утром шёл дождь",
    "emoji 👩‍👩‍👧 🎉 ok",
) * 20
# fmt: off
DIFFICULT = (
    "", "a", " a", "  a", "   ", "a ", "a  b", "\n", "\n\n", "a\nb", "a\r\nb", "\ta", "a\t\tb",
    "\u00a0a", "12", "1234567890", "3.14159", "1,234.5", "２３", "٣٤٥", "我们明天见",
    "東京タワー", "한국어 텍스트", "ไทย", "é", "e\u0301", "a\u0308\u0301", "ﬁ ½ ²", "👩‍👩‍👧",
    "🎉🎉 ok", "🇩🇪", "isn't WE'LL I'd", "HelloWorld fooBAR", "snake_case", "a/b/c\n",
    "http://x.y/z?q=1", "<b>x</b> &amp;", "  def f():\n    return 1", "x  =  y", "\u200bz",
    "\ufeffq", "नमस्ते", "العربية", "עברית", "ß ẞ İ ı", "--- ***", '"quoted" “q”', "a\u2028b",
    "The river runs", "end.  \n  ",
)
# fmt: on
COMBINING = ("e\u0301", "a\u0308\u0301")  # of which NFC makes other characters


def _save(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    usual = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(usual | config))


def _byte_level(
    folder: Path, *, pattern: str | None, normalizer: Any = None, **config: Any
) -> None:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, last]) if split else last
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    _save(tokenizer, folder, config)


def _pieces_with_bytes(folder: Path, *, metaspace: bool) -> None:
    """Write pieces of SentencePiece as Llama 2 and Mixtral have them, of both versions."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        spaces = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence(list(spaces))
    roles = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*roles, *(f"<0x{i:02X}>" for i in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator([w for text in _TEXTS[:4] for w in text.split()], trainer)
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] in roles]
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    back = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    _save(tokenizer, folder, {"bos_token": "<s>", "unk_token": "<unk>"})


def _of_class(folder: Path, *, name: str, model: Any, trainer: Any) -> None:
    """Write a tokenizer of a class of transformers, which has rules of its own."""
    import transformers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(_TEXTS, trainer)
    made = json.loads(tokenizer.to_str())["model"]
    if "merges" in made:
        given = {"vocab": made["vocab"], "merges": [tuple(merge) for merge in made["merges"]]}
    else:
        given = {"vocab": [tuple(piece) for piece in made["vocab"]]}
    getattr(transformers, name)(**given).save_pretrained(folder)


def _nllb(folder: Path) -> None:
    roles = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=roles, show_progress=False)
    _of_class(folder, name="NllbTokenizer", model=models.BPE(unk_token="<unk>"), trainer=trainer)


def _t5(folder: Path) -> None:
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    _of_class(folder, name="T5Tokenizer", model=models.Unigram(), trainer=trainer)


KINDS: dict[str, Callable[[Path], None]] = {
    "gpt-2": lambda folder: _byte_level(folder, pattern=None, tokenizer_class="GPT2Tokenizer"),
    "qwen2": lambda folder: _byte_level(
        folder, pattern=QWEN2, normalizer=normalizers.NFC(), tokenizer_class="Qwen2Tokenizer"
    ),
    "llama-bpe": lambda folder: _byte_level(folder, pattern=LLAMA3),
    "gpt-4o": lambda folder: _byte_level(folder, pattern=O200K),
    "mixtral": lambda folder: _pieces_with_bytes(folder, metaspace=False),
    "mixtral, version 5": lambda folder: _pieces_with_bytes(folder, metaspace=True),
    "nllb": _nllb,
    "t5": _t5,
}


def write_sentencepiece(path: Path, **settings: Any) -> Any:
    """Write a model of the library SentencePiece; return what encodes with it there."""
    import sentencepiece

    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS),
        model_writer=stream,
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    path.write_bytes(stream.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
