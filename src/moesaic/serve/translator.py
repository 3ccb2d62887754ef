"""Translator: load a run directory and translate in batches, with beam or greedy search.

Letters: B rows, S source length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.full_checkpoint import read_weights
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import require_plugins, require_unchanged
from moesaic.core.errors import CheckpointError, DataError, did_you_mean
from moesaic.core.shapes import Tensor
from moesaic.core.yaml_reader import read_yaml_file
from moesaic.corpus.languages import resolve_language
from moesaic.data.batch import PAD, Batch
from moesaic.data.tokenizer import EOS, Tokenizer
from moesaic.model.beam_search import Greedy, Hypothesis, Search
from moesaic.model.config import ModelConfig
from moesaic.model.generate import SUPPRESSED_TOKENS, DecodingRules, generate
from moesaic.model.repetition import is_loop
from moesaic.model.transformer import Transformer
from moesaic.model.weights import restore_weights
from moesaic.moe.routing import Routing

# The experts of one side of a translation: tokens as text and, per MoE layer and token, the
# [expert, weight] pairs that the token was routed to and not dropped from.
TracedSide = dict[str, Any]


def routed_experts(routing: Routing) -> list[list[tuple[int, float]]]:
    """Return the (expert, weight) pairs of every token, largest weight first, without drops."""
    rows: list[list[tuple[int, float]]] = [[] for _ in range(routing.num_tokens)]
    columns = (routing.token.tolist(), routing.expert.tolist(), routing.weight.float().tolist())
    for token, expert, weight in zip(*columns, strict=True):
        if expert < routing.num_experts:
            rows[token].append((expert, weight))
    return [sorted(row, key=lambda pair: -pair[1]) for row in rows]


@dataclass(frozen=True, slots=True)
class Alternative:
    """One hypothesis of a search: its text and its length-normalised log-probability."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class TranslationResult:
    """The best hypothesis of a text, and all of them (``alternatives``, the best one included).

    ``truncated``: the source was longer than the model's limit and only its beginning was
    translated. ``finished`` is false if the output was cut off at the maximum length, ``repeats``
    true if it repeats a passage again and again (``is_loop``).
    """

    text: str
    score: float
    alternatives: tuple[Alternative, ...] = ()
    truncated: bool = False
    finished: bool = True
    repeats: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslationLimits:
    """Length limits: sources longer than ``max_source`` tokens are truncated.

    An output has at most ``max_target`` tokens, and at most ``max_length_ratio`` times the tokens
    of its source plus 16. ``batch_tokens`` bounds the padded source tokens of a batch.
    """

    max_source: int = 256
    max_target: int = 256
    max_length_ratio: float = 3.0
    batch_tokens: int = 8192


class Translator:
    """A model with its tokenizer and limits; ``open`` loads one from a run directory."""

    def __init__(
        self, model: Transformer, *, tokenizer: Tokenizer, limits: TranslationLimits | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.limits = limits or TranslationLimits()
        tags = [tokenizer.language_token_id(code) for code in tokenizer.languages]
        unused = [
            i
            for i in range(tokenizer.vocab_size)
            if tokenizer.id_to_token(i).startswith("<unused_")
        ]
        self._rules = DecodingRules((*SUPPRESSED_TOKENS, *tags, *unused))

    @classmethod
    def open(
        cls, path: Path | str, *, weights: Path | None = None, device: str = "cpu"
    ) -> "Translator":
        """Load a finished run, or one in progress with the ``weights`` of a checkpoint.

        Raises CheckpointError naming what is missing or does not fit.
        """
        run = RunDir.open(Path(path))
        if weights is None:
            run.require_model()
            weights = run.model
        require_plugins(run)
        require_unchanged(run)
        config = _read_config(run)
        if not isinstance(config.get("model"), dict):
            raise CheckpointError(f"{run.config}: it has no model; is it the config of a run?")
        model = Transformer(ModelConfig.from_dict(config["model"]))
        _load_weights(model, read_weights(weights, device=device), where=weights)
        loader = config.get("loader")
        loader = loader if isinstance(loader, dict) else {}
        limits = {k: loader[k] for k in ("max_source", "max_target") if k in loader}
        tokenizer = Tokenizer.load(run.tokenizer)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise CheckpointError(
                f"{run.tokenizer}: {tokenizer.vocab_size} tokens, but the model has "
                f"{model.config.vocab_size}: it belongs to another run"
            )
        return cls(model.to(device), tokenizer=tokenizer, limits=TranslationLimits(**limits))

    @property
    def languages(self) -> tuple[str, ...]:
        """Language codes of the model."""
        return self.tokenizer.languages

    def translate(
        self, texts: Sequence[str], *, source: str, target: str, search: Search | None = None
    ) -> list[TranslationResult]:
        """Translate each text; ``source`` and ``target`` accept any spelling of a language.

        Returns one result per text, in order; an empty text stays empty. Batches are sorted by
        length. Raises DataError for a language that the model does not have.
        """
        codes = self._language_code(source), self._language_code(target)
        results = [TranslationResult(text="", score=0.0)] * len(texts)
        rows = self._encode_sources(texts, codes)
        for batch in self._batches(rows):
            tag = torch.full((len(batch),), self.tokenizer.language_token_id(codes[1]))
            max_tokens = torch.tensor([self._max_new_tokens(rows[i]) for i in batch])
            generated = generate(
                self.model,
                _pad([rows[i].ids for i in batch], self._device),
                tag=tag.to(self._device),
                search=search or Greedy(),
                max_tokens=max_tokens.to(self._device),
                rules=self._rules,
            )
            for i, hypotheses in zip(batch, generated, strict=True):
                results[i] = self._to_result(hypotheses, source=rows[i])
        return results

    def translate_texts(
        self, texts: list[str], *, source: str, target: str, search: Search | None = None
    ) -> list[str]:
        """Translate and return the best texts only: the signature that ``evaluate`` needs."""
        results = self.translate(texts, source=source, target=target, search=search)
        return [result.text for result in results]

    def count_truncated(self, texts: Sequence[str], *, source: str, target: str) -> int:
        """Return how many of the texts are longer than ``limits.max_source``."""
        codes = self._language_code(source), self._language_code(target)
        return sum(row.truncated for row in self._encode_sources(texts, codes))

    def batch(
        self, sources: Sequence[str], *, targets: Sequence[str], source: str, target: str
    ) -> Batch:
        """Return sources and given targets as a teacher-forced batch, as in training.

        Languages index ``languages``. Both sides are truncated at their limits.
        """
        codes = self._language_code(source), self._language_code(target)
        tag = self.tokenizer.language_token_id(codes[1])
        outputs = [ids[: self.limits.max_target] for ids in self.tokenizer.encode_batch(targets)]
        inputs = [row.ids for row in self._encode_sources(sources, codes)]
        if self.model.config.encoder.layers:
            target_in = [[tag, *ids] for ids in outputs]
            target_out = [[*ids, EOS] for ids in outputs]
        else:
            pairs = list(zip(inputs, outputs, strict=True))
            target_in = [[*ids, tag, *out] for ids, out in pairs]
            target_out = [[*[PAD] * len(ids), *out, EOS] for ids, out in pairs]
            inputs = [()] * len(inputs)
        padded = [_pad(rows, self._device) for rows in (inputs, target_in, target_out)]
        zeros = torch.zeros(len(sources), dtype=torch.long, device=self._device)
        source_index, target_index = (zeros + self.languages.index(code) for code in codes)
        return Batch(padded[0], padded[1], padded[2], zeros, source_index, target_index, zeros)

    @torch.inference_mode()
    def trace_experts(
        self, text: str, *, source: str, target: str, translation: str | None = None
    ) -> dict[str, TracedSide]:
        """Return the experts of each token of ``text`` and of its translation (made if not given).

        ``source`` is the encoder's side and ``target`` the decoder's; a decoder-only model has
        its prompt on ``target``.
        """
        if translation is None:
            translation = self.translate_texts([text], source=source, target=target)[0]
        batch = self.batch([text], targets=[translation], source=source, target=target)
        records = self.model(batch).records
        sides = {"source": ("encoder", batch.source), "target": ("decoder", batch.target_in)}
        return {
            side: {
                "tokens": [self.token_text(int(i)) for i in ids[0].tolist()],
                "layers": {
                    record.layer: [
                        [[expert, round(weight, 3)] for expert, weight in pairs]
                        for pairs in routed_experts(record.routing)
                    ]
                    for record in records
                    if record.layer.startswith(stack)
                },
            }
            for side, (stack, ids) in sides.items()
        }

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    def _language_code(self, name: str) -> str:
        code = resolve_language(name).code
        if code not in self.languages:
            raise DataError(
                f'this model has no language "{name}" ({code}): it has '
                f"{', '.join(self.languages)}{did_you_mean(code, self.languages)}"
            )
        return code

    def _encode_sources(
        self, texts: Sequence[str], codes: tuple[str, str]
    ) -> list["_EncodedSource"]:
        """Encode with a language tag: in an encoder the target's (arXiv:1611.04558)."""
        tagged = codes[1] if self.model.config.encoder.layers else codes[0]
        tag, limit = self.tokenizer.language_token_id(tagged), self.limits.max_source
        return [
            _EncodedSource((tag, *ids[:limit], EOS), truncated=len(ids) > limit)
            for ids in self.tokenizer.encode_batch([text.strip() for text in texts])
        ]

    def _batches(self, rows: Sequence["_EncodedSource"]) -> Iterator[list[int]]:
        """Group non-empty rows, longest first, so that memory peaks at the start."""
        order = [i for i, row in enumerate(rows) if len(row.ids) > 2]
        order.sort(key=lambda i: -len(rows[i].ids))
        while order:
            count = max(1, self.limits.batch_tokens // len(rows[order[0]].ids))
            yield order[:count]
            order = order[count:]

    def _max_new_tokens(self, row: "_EncodedSource") -> int:
        return min(self.limits.max_target, round(self.limits.max_length_ratio * len(row.ids)) + 16)

    def _to_result(
        self, hypotheses: Sequence[Hypothesis], *, source: "_EncodedSource"
    ) -> TranslationResult:
        all_texts = tuple(Alternative(self.tokenizer.decode(h.ids), h.score) for h in hypotheses)
        best = hypotheses[0]
        return TranslationResult(
            all_texts[0].text,
            best.score,
            all_texts,
            truncated=source.truncated,
            finished=best.finished,
            repeats=is_loop(best.ids, source=source.ids),
        )

    def token_text(self, index: int) -> str:
        """Return a token id as text, or by its name if it is not valid text on its own."""
        return token_text(self.tokenizer, index)


def token_text(tokenizer: Tokenizer, index: int) -> str:
    """Return a token id as text, or by its name if it is not valid text on its own."""
    text = tokenizer.decode([index])
    return text if text and "\ufffd" not in text else tokenizer.id_to_token(index)


@dataclass(frozen=True, slots=True)
class _EncodedSource:
    ids: tuple[int, ...]
    truncated: bool


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(len(row) for row in rows)
    padded = [[*row, *[PAD] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), width)


def _read_config(run: RunDir) -> dict[str, object]:
    config = read_yaml_file(run.config)
    if not isinstance(config, dict):
        raise CheckpointError(f"{run.config}: expected a mapping, found {type(config).__name__}")
    return config


def _load_weights(model: Transformer, tensors: dict[str, Tensor], *, where: Path) -> None:
    try:
        restore_weights(model, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{where} and config.yaml beside it: {error}") from error
