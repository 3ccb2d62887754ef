"""Stored prompts: what two programs are compared on, the beginnings of sentences in ten languages.

Letters: S tokens of a source, T of a target, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import Batch, InputRows
from moesaic.data.collators import EncoderDecoderCollator
from moesaic.data.language_tag import SOURCE_TAG, TARGET_TAG
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.vocabulary import Vocabulary
from moesaic.model.beam_search import Search
from moesaic.model.generate import DecodingRules, generate
from moesaic.model.transformer import Transformer
from moesaic.serve.open_run import read_collator

SENTENCES = (
    "The river runs under the old bridge and out to the sea.",
    "Wer zuletzt lacht, lacht am besten.",
    "Ils ont traversé la ville à pied pour voir la tour.",
    "El tren de las ocho sale de la estación central.",
    "Сегодня утром шёл дождь, а к вечеру прояснилось.",
    "我们明天早上八点在图书馆见面。",
    "毎朝、海のそばを散歩します。",
    "الكتاب على الطاولة بجانب النافذة.",
    "def add(a, b):\n    return a + b",
    "1, 1, 2, 3, 5, 8, 13, 21,",
)
LENGTHS = (3, 5, 8, 12, 20)  # tokens of a sentence: 50 inputs


def stored_prompts(
    run: RunDir, *, rows: int, their_end: object
) -> tuple[list[Int[Tensor, "1 T"]], Vocabulary]:
    """Return 50 prompts as ids of a model with ``rows`` embeddings, and a vocabulary with its end.

    Without a tokenizer they are random ids, and the end is ``their_end`` if that is an id.
    """
    if run.tokenizer.is_file():
        tokenizer = Tokenizer.load(run.tokenizer)
        found = [tokenizer.encode(text) for text in SENTENCES]
        end = tokenizer.vocabulary.eos
    else:
        generator = torch.Generator().manual_seed(0)
        shape = (len(SENTENCES), max(LENGTHS))
        found = torch.randint(0, rows, shape, generator=generator).tolist()
        end = their_end if isinstance(their_end, int) and 0 <= their_end < rows else rows - 1
    prompts = [torch.tensor([row[:length]]) for row in found for length in LENGTHS]
    return prompts, Vocabulary(rows, end)


@dataclass(frozen=True, slots=True)
class StoredInput:
    """The ids of a source (none for a decoder), of a prompt, and of a text behind the prompt."""

    source: Int[Tensor, "1 S"]
    prompt: Int[Tensor, "1 T"]
    text: Int[Tensor, "1 T"]

    def for_them(self, target: Int[Tensor, "1 T"]) -> dict[str, Tensor]:
        """Return the arguments of their model."""
        if not self.source.shape[1]:
            return {"input_ids": target}
        return {"input_ids": self.source, "decoder_input_ids": target}


def stored_inputs(
    run: RunDir, model: Transformer, *, theirs: Mapping[str, Any]
) -> tuple[list[StoredInput], Vocabulary]:
    """Return stored prompts; of an encoder-decoder as sources, in the frame of the run's rows."""
    rows = model.config.vocab_size
    texts, vocabulary = stored_prompts(run, rows=rows, their_end=theirs.get("eos_token_id"))
    if not model.config.encoder.layers:
        none = torch.zeros(1, 0, dtype=torch.long)
        return [StoredInput(none, text, none) for text in texts], vocabulary
    if run.tokenizer.is_file():
        known = Tokenizer.load(run.tokenizer).vocabulary
        tags = list(known.tags.values())
        ids = {**known.roles, **dict(zip((SOURCE_TAG, TARGET_TAG), (tags * 2)[:2], strict=False))}
    else:
        found = {name: theirs.get(f"{name}_token_id") for name in ("pad", "bos", "eos")}
        ids = {name: i for name, i in found.items() if isinstance(i, int)}
        # random ids; the first ones have roles, and padding inside of a text shifts its positions
        texts = [text.clamp(min=min(8, rows - 1)) for text in texts]
    frame = (read_collator(run) or EncoderDecoderCollator()).frame
    start, prompt, end = (
        torch.tensor([[ids[name] for name in names if name in ids]], dtype=torch.long)
        for names in (frame.source_start, frame.prompt, ("eos",))
    )
    others = [*texts[-1:], *texts[:-1]]
    return [
        StoredInput(torch.cat([start, text, end], 1), prompt, other)
        for text, other in zip(texts, others, strict=True)
    ], vocabulary


def our_logits(model: Transformer, given: StoredInput) -> Float[Tensor, "T V"]:
    """Return ours at every position of prompt and text."""
    target = InputRows.full(torch.cat([given.prompt, given.text], 1))
    key = torch.zeros(1, dtype=torch.long)
    batch = Batch(InputRows.full(given.source), target, target.values, {}, key)
    return model.predict(model(batch).hidden)


def our_answer(
    model: Transformer,
    given: StoredInput,
    *,
    vocabulary: Vocabulary,
    search: Search,
    max_tokens: int,
) -> list[int]:
    """Return the ids of ours behind the prompt, before the end."""
    found = generate(
        model,
        InputRows.full(given.source),
        prompt=InputRows.full(given.prompt),
        rules=DecodingRules(vocabulary),
        search=search,
        max_tokens=max_tokens,
    )
    return list(found[0][0].ids)


def ids_before_end(answer: Sequence[int], *, end: int) -> list[int]:
    """Return the ids of an answer before its end."""
    answer = list(answer)
    return answer[: answer.index(end)] if end in answer else answer
