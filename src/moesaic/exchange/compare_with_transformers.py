"""Comparison with transformers: logits and generated ids of a model in both programs.

Letters: S tokens of a source, T of a target, V vocabulary.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.stored_weights import load_transformer
from moesaic.core.errors import UserError
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import Batch, InputRows
from moesaic.data.collators import EncoderDecoderCollator
from moesaic.data.language_tag import SOURCE_TAG, TARGET_TAG
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.vocabulary import Vocabulary
from moesaic.exchange.export_model import read_model_config
from moesaic.exchange.hf_directory import read_hf_config
from moesaic.exchange.stored_prompts import stored_prompts
from moesaic.exchange.transformers_repairs import repair_forward
from moesaic.model.beam_search import Beam, Greedy, Search
from moesaic.model.generate import DecodingRules, generate
from moesaic.model.transformer import Transformer
from moesaic.serve.open_run import read_collator

BEAMS, ANSWER = 4, 12


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two programs agree on ``inputs`` prompts.

    ``logit_difference`` is the greatest over all positions, beside the ``largest_logit``;
    ``greedy`` and ``beam`` are the numbers of prompts with the same answer. ``repaired`` are the
    forward passes of transformers that were repaired first (``transformers_repairs.py``).
    """

    version: str
    inputs: int
    logit_difference: float
    largest_logit: float
    greedy: int
    beam: int
    repaired: tuple[str, ...] = ()

    def text(self) -> str:
        """Return a line for a model card."""
        repaired = f" with {', '.join(self.repaired)} repaired" if self.repaired else ""
        return (
            f"transformers {self.version}{repaired}, {self.inputs} inputs: greatest difference of "
            f"logits {self.logit_difference:.1e} (of {self.largest_logit:.1f}); answers equal "
            f"{self.greedy} (greedy), {self.beam} (beam {BEAMS})"
        )


@dataclass(frozen=True, slots=True)
class _Input:
    """The ids of a source (none for a decoder), of a prompt, and of a text behind the prompt."""

    source: Int[Tensor, "1 S"]
    prompt: Int[Tensor, "1 T"]
    text: Int[Tensor, "1 T"]

    def for_them(self, target: Int[Tensor, "1 T"]) -> dict[str, Tensor]:
        """Return the arguments of their model."""
        if not self.source.shape[1]:
            return {"input_ids": target}
        return {"input_ids": self.source, "decoder_input_ids": target}


def compare_with_transformers(theirs: Path, *, ours: Path) -> Agreement:
    """Compare a model in the directories of both programs, in float32.

    Raises UserError without transformers (``pip install "moesaic[hf]"``).
    """
    transformers = _transformers()
    run = RunDir.open(ours)
    model = load_transformer(read_model_config(run), run.model).eval()
    kind = "AutoModelForSeq2SeqLM" if model.config.encoder.layers else "AutoModelForCausalLM"
    other = getattr(transformers, kind).from_pretrained(theirs, dtype=torch.float32).eval()
    repaired = repair_forward(other)
    inputs, vocabulary = _inputs(run, model, theirs=read_hf_config(theirs))
    layers = model.config.encoder.layers
    settings = {
        # their cache of T5 and Switch has as many layers as the encoder
        "use_cache": layers in (0, model.config.decoder.layers),
        "do_sample": False,
        "max_new_tokens": ANSWER,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.eos,
        "decoder_start_token_id": int(inputs[0].prompt[0, 0]),
    }
    greedy = transformers.GenerationConfig(**settings)
    beam = transformers.GenerationConfig(
        **settings, num_beams=BEAMS, early_stopping=True, length_penalty=0.0
    )
    other.generation_config = transformers.GenerationConfig()
    differences, largest, equal = [0.0], [0.0], {"greedy": 0, "beam": 0}
    with torch.inference_mode():
        for given in inputs:
            target = torch.cat([given.prompt, given.text], 1)
            wanted, got = other(**given.for_them(target)).logits[0], _logits(model, given)
            differences.append((wanted - got).abs().max().item())
            largest.append(wanted.abs().max().item())
            for name, config, search in (
                ("greedy", greedy, Greedy()),
                ("beam", beam, Beam(size=BEAMS, length_penalty=0.0)),
            ):
                found = other.generate(**given.for_them(given.prompt), generation_config=config)
                answer = found[0, given.prompt.shape[1] :].tolist()
                mine = _answer(model, given, vocabulary=vocabulary, search=search)
                equal[name] += mine == _text_ids(answer, end=vocabulary.eos)
    return Agreement(
        transformers.__version__,
        len(inputs),
        max(differences),
        max(largest),
        repaired=tuple(repaired),
        **equal,
    )


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            'a comparison with transformers needs it: pip install "moesaic[hf]"'
        ) from error


def _inputs(
    run: RunDir, model: Transformer, *, theirs: Mapping[str, Any]
) -> tuple[list[_Input], Vocabulary]:
    """Return stored prompts; of an encoder-decoder as sources, in the frame of the run's rows."""
    rows = model.config.vocab_size
    texts, vocabulary = stored_prompts(run, rows=rows, their_end=theirs.get("eos_token_id"))
    if not model.config.encoder.layers:
        none = torch.zeros(1, 0, dtype=torch.long)
        return [_Input(none, text, none) for text in texts], vocabulary
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
        _Input(torch.cat([start, text, end], 1), prompt, other)
        for text, other in zip(texts, others, strict=True)
    ], vocabulary


def _logits(model: Transformer, given: _Input) -> Float[Tensor, "T V"]:
    target = InputRows.full(torch.cat([given.prompt, given.text], 1))
    key = torch.zeros(1, dtype=torch.long)
    batch = Batch(InputRows.full(given.source), target, target.values, {}, key)
    return model.predict(model(batch).hidden)


def _answer(
    model: Transformer, given: _Input, *, vocabulary: Vocabulary, search: Search
) -> list[int]:
    found = generate(
        model,
        InputRows.full(given.source),
        prompt=InputRows.full(given.prompt),
        rules=DecodingRules(vocabulary),
        search=search,
        max_tokens=ANSWER,
    )
    return list(found[0][0].ids)


def _text_ids(answer: Sequence[int], *, end: int) -> list[int]:
    """Return the ids of an answer before its end."""
    answer = list(answer)
    return answer[: answer.index(end)] if end in answer else answer
