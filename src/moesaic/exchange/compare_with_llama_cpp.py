"""Comparison with llama.cpp: log-probabilities of a GGUF file in both programs.

llama.cpp runs through the wheel ``xllamacpp``, in a process of its own: it ends its process where a
file does not fit.

Letters: V vocabulary.
"""

import importlib
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.stored_weights import load_transformer
from moesaic.core.errors import CheckpointError, UserError
from moesaic.core.shapes import Float, Tensor
from moesaic.data.tokenizer import Tokenizer
from moesaic.exchange.export_gguf import MODEL_FILE, stays_float32
from moesaic.exchange.stored_prompts import SENTENCES, StoredInput, our_logits, stored_prompts
from moesaic.exchange.tensor_files import TensorFiles
from moesaic.model.transformer import Transformer
from moesaic.serve.open_run import read_model_config

ANSWER = 5  # tokens that ours continues each prompt by: a distribution each
# by the dtype of matrices, to which it rounds activations too: the largest difference of
# log-probabilities, and the share of positions beyond it or with another likeliest token, since a
# rounding may choose another expert
BOUNDS = {torch.float32: (2e-3, 0.0), torch.float16: (2e-2, 0.05), torch.bfloat16: (0.2, 0.1)}
BEST = 100  # of a distribution, as many tokens as there are at most
_QUIET = -1


Likeliest = list[tuple[int, float]]  # tokens and their log-probabilities, the likeliest first


@dataclass(frozen=True, slots=True)
class LlamaCppAgreement:
    """How far two programs agree at ``positions`` after ``inputs`` prompts.

    ``difference`` is the greatest of log-probabilities, among the likeliest tokens of a position;
    ``same_best`` positions have the same likeliest one. ``same_text`` of ``texts`` sentences become
    the same ids.
    """

    version: str
    inputs: int
    positions: int
    difference: float
    same_best: int
    texts: int
    same_text: int

    def text(self) -> str:
        """Return a line for a model card."""
        ids = (
            f"; {self.same_text} of {self.texts} sentences have the same ids" if self.texts else ""
        )
        return (
            f"llama.cpp (xllamacpp {self.version}), {self.inputs} inputs: greatest difference of "
            f"log-probabilities {self.difference:.1e} at {self.positions} positions, of which "
            f"{self.same_best} have the same likeliest token{ids}"
        )


@dataclass(frozen=True, slots=True)
class _Question:
    """What the other process is asked: what follows rows of ids, and the ids of texts.

    It reports probabilities only beside a token with a text, so it is made to choose ``plain``.
    """

    path: str
    rows: Sequence[Sequence[int]]
    texts: Sequence[str]
    best: int
    plain: int


@dataclass(frozen=True, slots=True)
class _Answers:
    version: str
    following: list[Likeliest]
    ids: list[list[int]]


def compare_with_llama_cpp(
    exported: Path, *, ours: Path, dtype: torch.dtype | None = None
) -> LlamaCppAgreement:
    """Compare the file of a directory that ``export_gguf`` wrote with the model it was made of.

    Ours computes in float32, with the matrices rounded to the ``dtype`` of the file.

    Raises:
        CheckpointError: llama.cpp cannot run the file, or it differs: beyond the ``BOUNDS`` of its
            dtype, or a sentence has other ids.
        UserError: The wheel ``xllamacpp`` is not installed.
    """
    require_llama_cpp()
    run = RunDir.open(ours)
    model = load_transformer(read_model_config(run), run.model).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if dtype is not None and not stays_float32(name, dimensions=parameter.ndim):
                parameter.copy_(parameter.to(dtype))
    size = model.config.vocab_size
    prompts, _ = stored_prompts(run, rows=size, their_end=None)
    tokenizer = Tokenizer.load(run.tokenizer) if run.tokenizer.is_file() else None
    rows: list[list[int]] = []
    wanted: list[Tensor] = []
    for prompt in prompts:
        row = prompt[0].tolist()
        for _ in range(ANSWER):
            rows.append(row)
            wanted.append(_log_probabilities(model, row))
            row = [*row, int(wanted[-1].argmax())]
    texts = SENTENCES if tokenizer else ()
    plain = tokenizer.encode("a")[-1] if tokenizer else size - 1
    question = _Question(str(exported / MODEL_FILE), rows, texts, min(size, BEST), plain)
    found = _in_own_process(question)
    both = list(zip(wanted, found.following, strict=True))
    ids = tokenizer.encode_batch(SENTENCES) if tokenizer and found.ids else []
    of_position = [max(abs(logs[i].item() - value) for i, value in best) for logs, best in both]
    same_best = [int(logs.argmax()) == best[0][0] for logs, best in both]
    agreement = LlamaCppAgreement(
        version=found.version,
        inputs=len(prompts),
        positions=len(rows),
        difference=max(of_position),
        same_best=sum(same_best),
        texts=len(ids),
        same_text=sum(one == two for one, two in zip(ids, found.ids, strict=False)),
    )
    stored = dtype or TensorFiles([run.model]).tensors["embedding.weight"].dtype
    most, share = BOUNDS[stored]
    near = [same and found <= most for same, found in zip(same_best, of_position, strict=True)]
    if sum(near) < (1 - share) * len(rows) or agreement.same_text < len(ids):
        raise CheckpointError(f"llama.cpp computes another model: {agreement.text()}")
    return agreement


def require_llama_cpp() -> Any:
    """Return the wheel. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        raise UserError('a comparison with llama.cpp needs: pip install "moesaic[gguf]"') from error


@torch.inference_mode()
def _log_probabilities(model: Transformer, ids: Sequence[int]) -> Float[Tensor, "V"]:
    """Return those of the token after a row."""
    none = torch.zeros(1, 0, dtype=torch.long)
    return our_logits(model, StoredInput(none, torch.tensor([ids]), none))[-1].log_softmax(-1)


def _in_own_process(question: _Question) -> _Answers:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_ask, question).result()
        except BrokenProcessPool as error:
            raise CheckpointError(
                f"{question.path}: llama.cpp ended while it ran the file"
            ) from error


def _ask(question: _Question) -> _Answers:
    """Ask llama.cpp, in its process."""
    library = require_llama_cpp()
    parameters = library.CommonParams()
    parameters.model.path = question.path
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = _QUIET
    parameters.cache_type_k = parameters.cache_type_v = library.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = library.Server(parameters)
    except Exception as error:
        raise CheckpointError(f"{question.path}: llama.cpp cannot load it: {error}") from error
    following = [_following(server, row, question) for row in question.rows]
    ids = [_tokenize(server.listening_address, text) for text in question.texts]
    return _Answers(library.__version__, following, [row for row in ids if row is not None])


def _following(server: Any, row: Sequence[int], question: _Question) -> Likeliest:
    """Return the likeliest tokens after a row; the bias of a choice does not change them."""
    asked = {"prompt": list(row), "n_predict": 1, "n_probs": question.best, "temperature": 0.0}
    found = server.handle_completions(asked | {"logit_bias": [[question.plain, 1000.0]]})
    [token] = found["choices"][0]["logprobs"]["content"]
    return [(t["id"], t["logprob"]) for t in token["top_logprobs"]]


def _tokenize(address: str, text: str) -> list[int] | None:
    asked = json.dumps({"content": text, "add_special": False}).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with urlopen(Request(f"{address}/tokenize", asked, headers)) as answer:
            return json.load(answer)["tokens"]
    except URLError:
        return None
