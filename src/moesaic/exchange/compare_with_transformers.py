"""Comparison with transformers: logits and generated ids of a model in both programs."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.stored_weights import load_transformer
from moesaic.core.errors import CheckpointError, UserError
from moesaic.exchange.hf_directory import read_hf_config
from moesaic.exchange.stored_prompts import ids_before_end, our_answer, our_logits, stored_inputs
from moesaic.exchange.transformers_repairs import repair_forward
from moesaic.model.beam_search import Beam, Greedy
from moesaic.serve.open_run import read_model_config

BEAMS, ANSWER = 4, 12
MOST = 1e-3  # of a difference of logits, of the largest one; both compute in float32


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


def compare_with_transformers(theirs: Path, *, ours: Path) -> Agreement:
    """Compare a model in the directories of both programs, in float32.

    Raises:
        CheckpointError: An answer is another one, or logits differ by over 1e-3 of the largest.
        UserError: transformers is not installed (``pip install "moesaic[hf]"``).
    """
    transformers = require_transformers()
    run = RunDir.open(ours)
    model = load_transformer(read_model_config(run), run.model).eval()
    kind = "AutoModelForSeq2SeqLM" if model.config.encoder.layers else "AutoModelForCausalLM"
    other = getattr(transformers, kind).from_pretrained(theirs, dtype=torch.float32).eval()
    repaired = repair_forward(other)
    inputs, vocabulary = stored_inputs(run, model, theirs=read_hf_config(theirs))
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
            wanted, got = other(**given.for_them(target)).logits[0], our_logits(model, given)
            differences.append((wanted - got).abs().max().item())
            largest.append(wanted.abs().max().item())
            for name, config, search in (
                ("greedy", greedy, Greedy()),
                ("beam", beam, Beam(size=BEAMS, length_penalty=0.0)),
            ):
                found = other.generate(**given.for_them(given.prompt), generation_config=config)
                answer = found[0, given.prompt.shape[1] :].tolist()
                mine = our_answer(
                    model, given, vocabulary=vocabulary, search=search, max_tokens=ANSWER
                )
                equal[name] += mine == ids_before_end(answer, end=vocabulary.eos)
    agreement = Agreement(
        transformers.__version__,
        len(inputs),
        max(differences),
        max(largest),
        repaired=tuple(repaired),
        **equal,
    )
    if not max(differences) <= MOST * max(largest) or min(equal.values()) < len(inputs):
        raise CheckpointError(f"the two programs compute different models: {agreement.text()}")
    return agreement


def require_transformers() -> Any:
    """Return the package. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            'a comparison with transformers needs it: pip install "moesaic[hf]"'
        ) from error
