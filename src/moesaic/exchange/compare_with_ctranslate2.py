"""Comparison with CTranslate2: log-probabilities and answers of a dense encoder-decoder in both."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.stored_weights import load_transformer
from moesaic.core.errors import CheckpointError, UserError
from moesaic.core.shapes import Float, Tensor
from moesaic.exchange.compare_with_transformers import ANSWER, BEAMS
from moesaic.exchange.stored_prompts import StoredInput, our_answer, our_logits, stored_inputs
from moesaic.model.beam_search import Beam, Greedy
from moesaic.model.transformer import Transformer
from moesaic.serve.open_run import read_model_config

MOST = 1e-3  # of a difference of log-probabilities; both compute in float32


@dataclass(frozen=True, slots=True)
class CTranslate2Agreement:
    """How far two programs agree on ``inputs`` sources.

    ``difference`` is the greatest of log-probabilities, of ``scored`` tokens; ``greedy`` and
    ``beam`` are the numbers of sources with the same answer.
    """

    version: str
    inputs: int
    scored: int
    difference: float
    greedy: int
    beam: int

    def text(self) -> str:
        """Return a line for a model card."""
        return (
            f"CTranslate2 {self.version}, {self.inputs} inputs: greatest difference of "
            f"log-probabilities {self.difference:.1e} at {self.scored} tokens; answers equal "
            f"{self.greedy} (greedy), {self.beam} (beam {BEAMS})"
        )


def require_ctranslate2() -> Any:
    """Return the package. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("ctranslate2")
    except ImportError as error:
        raise UserError('CTranslate2 needs: pip install "moesaic[ctranslate2]"') from error


def compare_with_ctranslate2(
    exported: Path, *, ours: Path, names: Sequence[str], theirs: Mapping[str, Any]
) -> CTranslate2Agreement:
    """Compare a directory of CTranslate2 with the model that it was made of, in float32.

    ``names`` are its tokens, ``theirs`` is the config of transformers that it was made through.

    Raises:
        CheckpointError: An answer is another one, or a log-probability differs by over 1e-3.
        UserError: The package ``ctranslate2`` is not installed.
    """
    library = require_ctranslate2()
    run = RunDir.open(ours)
    model = load_transformer(read_model_config(run), run.model).float().eval()
    translator = library.Translator(str(exported), compute_type="float32")
    inputs, vocabulary = stored_inputs(run, model, theirs=theirs)
    # a start that their config names they put in front themselves; a caller's is in no answer
    theirs_first = 0 if theirs.get("decoder_start_token_id") is None else 1
    ids = {name: i for i, name in enumerate(names)}
    differences: list[float] = []
    equal = {"greedy": 0, "beam": 0}
    searches = (
        ("greedy", 1, Greedy()),
        ("beam", BEAMS, Beam(size=BEAMS, length_penalty=0.0)),
    )
    for given in inputs:
        source = [[names[i] for i in given.source[0].tolist()]]
        prompt = [names[i] for i in given.prompt[0].tolist()][theirs_first:]
        shown = len(prompt) - (1 - theirs_first)
        text = [names[i] for i in given.text[0].tolist()]
        [found] = translator.score_batch(source, [prompt + text])
        scores = _log_probabilities(model, given, end=vocabulary.eos)
        both = zip(reversed(found.log_probs), scores.tolist()[::-1], strict=False)
        differences += [abs(one - two) for one, two in both]
        for name, size, search in searches:
            [answer] = translator.translate_batch(
                source,
                target_prefix=[prompt],
                beam_size=size,
                length_penalty=0.0,
                max_decoding_length=ANSWER + shown,
                min_decoding_length=0,
            )
            found = [ids[token] for token in answer.hypotheses[0][shown:]]
            mine = our_answer(model, given, vocabulary=vocabulary, search=search, max_tokens=ANSWER)
            equal[name] += found == mine
    number = len(inputs)
    agreement = CTranslate2Agreement(
        library.__version__, number, len(differences), max(differences), **equal
    )
    if not max(differences) <= MOST or min(equal.values()) < number:
        raise CheckpointError(
            f"CTranslate2 computes another model, so nothing was written: {agreement.text()}"
        )
    return agreement


@torch.inference_mode()
def _log_probabilities(model: Transformer, given: StoredInput, *, end: int) -> Float[Tensor, "T"]:
    """Return those of each token behind the first one of the prompt, and of the end."""
    tokens = torch.cat([given.prompt[0, 1:], given.text[0], torch.tensor([end])])
    logs = our_logits(model, given).log_softmax(-1)
    return logs.gather(1, tokens[:, None])[:, 0]
