"""Translator: a run directory that translates, in batches, losing no line and changing no order.

Letters: B rows, S source length.

Trace: which experts read and wrote a sentence, layer by layer, token by token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from moesaic.checkpoint.full_checkpoint import read_weights
from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import CheckpointError, DataError, did_you_mean
from moesaic.core.shapes import Tensor
from moesaic.corpus.languages import resolve_language
from moesaic.data.batch import PAD, Batch
from moesaic.data.tokenizer import EOS, Tokenizer
from moesaic.model.config import ModelConfig
from moesaic.model.generate import SUPPRESSED_TOKENS, Greedy, Hypothesis, Search, generate
from moesaic.model.transformer import Transformer
from moesaic.model.weights import restore_weights
from moesaic.moe.routing_record import RoutingRecord


@dataclass(frozen=True, slots=True)
class RoutedExpert:
    """An edge of a token: its expert and the weight the router gave it."""

    expert: int
    weight: float


@dataclass(frozen=True, slots=True)
class TracedSide:
    """One side of a translation: tokens as text and, per MoE layer, the visits of each token.

    A token whose edges were all dropped has no visits.
    """

    tokens: tuple[str, ...]
    layers: dict[str, tuple[tuple[RoutedExpert, ...], ...]]

    def plain(self) -> dict[str, Any]:
        """Return what summary.json holds: ``[[expert, weight], ...]`` per layer and token."""
        layers = {
            name: [[[v.expert, round(v.weight, 3)] for v in visits] for visits in rows]
            for name, rows in self.layers.items()
        }
        return {"tokens": list(self.tokens), "layers": layers}


@dataclass(frozen=True, slots=True)
class ExpertTrace:
    """The encoder's and the decoder's side. A decoder-only model has its prompt on ``target``."""

    source: TracedSide
    target: TracedSide

    def plain(self) -> dict[str, Any]:
        return {"source": self.source.plain(), "target": self.target.plain()}


def routed_experts(record: RoutingRecord) -> tuple[tuple[RoutedExpert, ...], ...]:
    """Return the kept edges of every token, heaviest first."""
    routing = record.routing
    rows: list[list[RoutedExpert]] = [[] for _ in range(routing.num_tokens)]
    columns = (_to_list(routing.token), _to_list(routing.expert), _to_list(routing.weight))
    for token, expert, weight in zip(*columns, strict=True):
        if expert < routing.num_experts:
            rows[int(token)].append(RoutedExpert(int(expert), float(weight)))
    return tuple(tuple(sorted(row, key=lambda v: -v.weight)) for row in rows)


def _to_list(tensor: Tensor) -> list[float]:
    return tensor.detach().float().tolist() if tensor.is_floating_point() else tensor.tolist()


@dataclass(frozen=True, slots=True)
class Alternative:
    """One answer of a search: its text and its length-normalised log-probability."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class TranslationResult:
    """The best answer, then ``alternatives`` (all answers of the search, the best one included).

    ``truncated``: the source was longer than the model reads, and only its beginning was
    translated. ``finished`` is false if the answer was cut off at the longest allowed length.
    """

    text: str
    score: float
    alternatives: tuple[Alternative, ...] = ()
    truncated: bool = False
    finished: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslationLimits:
    """What one call may take. Sources longer than ``max_source`` tokens are cut (and say so).

    An answer may have ``max_target`` tokens, and ``max_length_ratio`` times its source's tokens plus 16.
    ``batch_tokens`` bounds the padded source tokens of a batch.
    """

    max_source: int = 256
    max_target: int = 256
    max_length_ratio: float = 3.0
    batch_tokens: int = 8192


class Translator:
    """A model, its tokenizer, and the ids it may say. ``open`` reads one from a run directory."""

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
        self._suppressed_tokens = (*SUPPRESSED_TOKENS, *tags, *unused)

    @classmethod
    def open(
        cls, path: Path | str, *, weights: Path | None = None, device: str = "cpu"
    ) -> "Translator":
        """Read a finished run, or one in progress with the ``weights`` of a checkpoint.

        Raises CheckpointError naming what is missing or does not fit.
        """
        run = RunDir.open(Path(path))
        if weights is None:
            run.require_model()
            weights = run.model
        config = _read_config(run)
        if not isinstance(config.get("model"), dict):
            raise CheckpointError(f"{run.config}: it has no model; is it the config of a run?")
        model = Transformer(ModelConfig.from_dict(config["model"]))
        _load_weights(model, read_weights(weights, device=device), where=weights)
        loader = config.get("loader")
        known = loader if isinstance(loader, dict) else {}
        limits = {k: known[k] for k in ("max_source", "max_target") if k in known}
        tokenizer = Tokenizer.load(run.tokenizer)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise CheckpointError(
                f"{run.tokenizer}: {tokenizer.vocab_size} tokens, but the model has "
                f"{model.config.vocab_size}: it belongs to another run"
            )
        return cls(model.to(device), tokenizer=tokenizer, limits=TranslationLimits(**limits))

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes that it translates between."""
        return self.tokenizer.languages

    def translate(
        self, texts: Sequence[str], *, source: str, target: str, search: Search | None = None
    ) -> list[TranslationResult]:
        """Translate each text; ``source`` and ``target`` take any spelling of a language.

        One Translation per text, in order; an empty line stays empty. Texts are sorted by length
        into batches. Raises DataError for a language the model does not have.
        """
        codes = self._language_code(source), self._language_code(target)
        answers = [TranslationResult(text="", score=0.0)] * len(texts)
        rows = self._encode_sources(texts, codes)
        for batch in self._batches(rows):
            ids = _pad([rows[i].ids for i in batch], self._device)
            found = generate(
                self.model,
                ids,
                tag=torch.full(
                    (len(batch),), self.tokenizer.language_token_id(codes[1]), device=self._device
                ),
                search=search or Greedy(),
                max_tokens=torch.tensor(
                    [self._max_new_tokens(rows[i]) for i in batch], device=self._device
                ),
                suppress_tokens=self._suppressed_tokens,
            )
            for i, hypotheses in zip(batch, found, strict=True):
                answers[i] = self._to_result(hypotheses, truncated=rows[i].truncated)
        return answers

    def translate_texts(
        self, texts: list[str], *, source: str, target: str, search: Search | None = None
    ) -> list[str]:
        """Translate and keep the best texts only: the form that ``evaluate`` takes."""
        found = self.translate(texts, source=source, target=target, search=search)
        return [translation.text for translation in found]

    def count_truncated(self, texts: Sequence[str], *, source: str, target: str) -> int:
        """Return how many of the texts are longer than the model reads: their ends are not seen."""
        rows = self._encode_sources(
            texts, (self._language_code(source), self._language_code(target))
        )
        return sum(row.truncated for row in rows)

    def batch(
        self, sources: Sequence[str], *, targets: Sequence[str], source: str, target: str
    ) -> Batch:
        """Return sources and given targets as the model reads them in training (teacher forcing).

        Languages index ``languages``. Both sides are cut at their limits.
        """
        codes = self._language_code(source), self._language_code(target)
        tag = self.tokenizer.language_token_id(codes[1])
        said = [ids[: self.limits.max_target] for ids in self.tokenizer.encode_batch(targets)]
        heard = [row.ids for row in self._encode_sources(sources, codes)]
        if self.model.config.encoder.layers:
            inputs = [[tag, *ids] for ids in said]
            labels = [[*ids, EOS] for ids in said]
        else:
            inputs = [[*ids, tag, *out] for ids, out in zip(heard, said, strict=True)]
            labels = [[*[PAD] * len(ids), *out, EOS] for ids, out in zip(heard, said, strict=True)]
            heard = [[] for _ in heard]
        numbers = [self.languages.index(code) for code in codes]
        same = torch.ones(len(sources), dtype=torch.long, device=self._device)
        read, said_in, said_out = (_pad(rows, self._device) for rows in (heard, inputs, labels))
        source_number, target_number = (same * number for number in numbers)
        none = same * 0
        return Batch(read, said_in, said_out, none, source_number, target_number, none)

    @torch.inference_mode()
    def trace_experts(
        self, text: str, *, source: str, target: str, translation: str | None = None
    ) -> ExpertTrace:
        """Return which experts read ``text`` and wrote its translation (made if not given)."""
        said = translation
        if said is None:
            said = self.translate_texts([text], source=source, target=target)[0]
        batch = self.batch([text], targets=[said], source=source, target=target)
        layers = {r.layer: routed_experts(r) for r in self.model(batch).records}
        sides = []
        for ids, stack in ((batch.source, "encoder"), (batch.target_in, "decoder")):
            tokens = tuple(self.token_text(int(i)) for i in ids[0].tolist())
            own = {name: rows for name, rows in layers.items() if name.startswith(stack)}
            sides.append(TracedSide(tokens, own))
        return ExpertTrace(sides[0], sides[1])

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    def _language_code(self, name: str) -> str:
        code = resolve_language(name).code
        if code not in self.languages:
            raise DataError(
                f'this model does not know "{name}" ({code}): it has '
                f"{', '.join(self.languages)}{did_you_mean(code, self.languages)}"
            )
        return code

    def _encode_sources(
        self, texts: Sequence[str], codes: tuple[str, str]
    ) -> list["_EncodedSource"]:
        """An encoder is told what to say (arXiv:1611.04558), a decoder what it reads."""
        spoken = codes[1] if self.model.config.encoder.layers else codes[0]
        tag, room = self.tokenizer.language_token_id(spoken), self.limits.max_source
        return [
            _EncodedSource((tag, *ids[:room], EOS), truncated=len(ids) > room)
            for ids in self.tokenizer.encode_batch([text.strip() for text in texts])
        ]

    def _batches(self, rows: Sequence["_EncodedSource"]) -> Iterator[list[int]]:
        """Group rows that are not empty, longest first, so that memory peaks at the start."""
        order = [i for i, row in enumerate(rows) if len(row.ids) > 2]
        order.sort(key=lambda i: -len(rows[i].ids))
        while order:
            count = max(1, self.limits.batch_tokens // len(rows[order[0]].ids))
            yield order[:count]
            order = order[count:]

    def _max_new_tokens(self, row: "_EncodedSource") -> int:
        return min(self.limits.max_target, round(self.limits.max_length_ratio * len(row.ids)) + 16)

    def _to_result(self, hypotheses: Sequence[Hypothesis], *, truncated: bool) -> TranslationResult:
        every = tuple(Alternative(self.tokenizer.decode(h.ids), h.score) for h in hypotheses)
        best = hypotheses[0]
        return TranslationResult(every[0].text, best.score, every, truncated, best.finished)

    def token_text(self, index: int) -> str:
        """Return a token as text; one that is no text of its own by its name."""
        text = self.tokenizer.decode([index])
        return text if text and "\ufffd" not in text else self.tokenizer.id_to_token(index)


@dataclass(frozen=True, slots=True)
class _EncodedSource:
    ids: tuple[int, ...]
    truncated: bool


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(len(row) for row in rows)
    padded = [[*row, *[PAD] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), width)


def _read_config(run: RunDir) -> dict[str, object]:
    try:
        found = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{run.config}: not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{run.config}: expected a mapping, found {type(found).__name__}")
    return found


def _load_weights(model: Transformer, tensors: dict[str, Tensor], *, where: Path) -> None:
    try:
        restore_weights(model, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{where} and config.yaml beside it: {error}") from error
