"""Comparison with transformers: logits and generated ids of a model in both programs.

Letters: B rows, T tokens, V vocabulary.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.stored_weights import load_transformer
from moesaic.core.errors import UserError
from moesaic.core.shapes import Int, Tensor
from moesaic.data.batch import Batch, InputRows
from moesaic.data.vocabulary import Vocabulary
from moesaic.exchange.export_model import read_model_config
from moesaic.exchange.hf_directory import read_hf_config
from moesaic.exchange.stored_prompts import stored_prompts
from moesaic.model.beam_search import Beam, Greedy, Search
from moesaic.model.generate import DecodingRules, generate
from moesaic.model.transformer import Transformer

BEAMS, ANSWER = 4, 12


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two programs agree on ``inputs`` prompts.

    ``logit_difference`` is the greatest over all positions, beside the ``largest_logit``;
    ``greedy`` and ``beam`` are the numbers of prompts with the same answer.
    """

    version: str
    inputs: int
    logit_difference: float
    largest_logit: float
    greedy: int
    beam: int

    def text(self) -> str:
        """Return a line for a model card."""
        return (
            f"transformers {self.version}, {self.inputs} inputs: greatest difference of logits "
            f"{self.logit_difference:.1e} (of {self.largest_logit:.1f}); answers equal "
            f"{self.greedy} (greedy), {self.beam} (beam {BEAMS})"
        )


def compare_with_transformers(theirs: Path, *, ours: Path) -> Agreement:
    """Compare a decoder in the directories of both programs, in float32.

    Raises UserError without transformers (``pip install "moesaic[hf]"``).
    """
    transformers = _transformers()
    other = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()
    run = RunDir.open(ours)
    model = load_transformer(read_model_config(run), run.model).eval()
    end = read_hf_config(theirs).get("eos_token_id")
    prompts, vocabulary = stored_prompts(run, rows=model.config.vocab_size, their_end=end)
    settings = {
        "do_sample": False,
        "max_new_tokens": ANSWER,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.eos,
    }
    greedy = transformers.GenerationConfig(**settings)
    beam = transformers.GenerationConfig(
        **settings, num_beams=BEAMS, early_stopping=True, length_penalty=0.0
    )
    other.generation_config = transformers.GenerationConfig()
    differences, largest, equal = [0.0], [0.0], {"greedy": 0, "beam": 0}
    with torch.inference_mode():
        for prompt in prompts:
            wanted, got = other(input_ids=prompt).logits[0], _logits(model, prompt)
            differences.append((wanted - got).abs().max().item())
            largest.append(wanted.abs().max().item())
            for name, config, search in (
                ("greedy", greedy, Greedy()),
                ("beam", beam, Beam(size=BEAMS, length_penalty=0.0)),
            ):
                answer = other.generate(prompt, generation_config=config)[0, prompt.shape[1] :]
                mine = _answer(model, prompt, vocabulary=vocabulary, search=search)
                equal[name] += mine == _text_ids(answer.tolist(), end=vocabulary.eos)
    return Agreement(
        transformers.__version__, len(prompts), max(differences), max(largest), **equal
    )


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            'a comparison with transformers needs it: pip install "moesaic[hf]"'
        ) from error


def _logits(model: Transformer, rows: Int[Tensor, "B T"]) -> Tensor:
    key = torch.zeros(len(rows), dtype=torch.long)
    batch = Batch(InputRows.empty(len(rows)), InputRows.full(rows), rows, {}, key)
    return model.predict(model(batch).hidden)


def _answer(
    model: Transformer, prompt: Int[Tensor, "1 T"], *, vocabulary: Vocabulary, search: Search
) -> list[int]:
    found = generate(
        model,
        InputRows.empty(1),
        prompt=InputRows.full(prompt),
        rules=DecodingRules(vocabulary),
        search=search,
        max_tokens=ANSWER,
    )
    return list(found[0][0].ids)


def _text_ids(answer: Sequence[int], *, end: int) -> list[int]:
    """Return the ids of an answer before its end."""
    answer = list(answer)
    return answer[: answer.index(end)] if end in answer else answer
