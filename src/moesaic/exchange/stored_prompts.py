"""Stored prompts: what two programs are compared on, the beginnings of sentences in ten languages.

Letters: T tokens.
"""

import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.shapes import Int, Tensor
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.vocabulary import Vocabulary

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
