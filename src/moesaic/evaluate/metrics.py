"""Metrics: sacreBLEU's scores as sums of sentence statistics, so that resampling costs a product.

BLEU and chrF are functions of statistics summed over a corpus (n-gram matches, lengths). sacreBLEU
counts them, sentence by sentence; here the sum and the score are arrays, so a score, its interval
and a paired test are one matrix product each (``evaluate.bootstrap``).

Letters: N sentences, C statistics per sentence, ... any leading axes (resamples).
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import sacrebleu.utils
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS

from moesaic.core.errors import DataError

SPBLEU_MODEL = "flores200"
# BLEU counts words. These languages write none (or need an analyser that is not a dependency).
_BLEU_TOKENIZER = {"zho": "zh", "yue": "zh", "wuu": "zh", "lzh": "zh"} | dict.fromkeys(
    ("jpn", "tha", "lao", "khm", "mya", "bod", "dzo"), "char"
)


@runtime_checkable
class CorpusMetric(Protocol):
    """A corpus score in 0..100 that is a function of summed sentence statistics."""

    @property
    def name(self) -> str: ...

    @property
    def signature(self) -> str:
        """sacreBLEU's signature: what to quote beside the number."""
        ...

    def sentence_statistics(self, hypotheses: Sequence[str], *, references: Sequence[str]) -> np.ndarray:
        """Return the statistics of every sentence, float64 [N, C]."""
        ...

    def score(self, sums: np.ndarray) -> np.ndarray:
        """Return the score of summed statistics: [..., C] -> [...]."""
        ...


@dataclass(frozen=True, slots=True)
class ChrF:
    """chrF++ (Popovic 2017): character 6-grams and word bigrams, beta 2."""

    name: str = "chrf"
    char_order: int = 6
    word_order: int = 2
    beta: int = 2

    @property
    def signature(self) -> str:
        return _signature(self._sacrebleu())

    def sentence_statistics(self, hypotheses: Sequence[str], *, references: Sequence[str]) -> np.ndarray:
        return _sentence_statistics(self._sacrebleu(), hypotheses=hypotheses, references=references)

    def score(self, sums: np.ndarray) -> np.ndarray:
        hyp, ref, match = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
        counts = (hyp > 0) & (ref > 0)  # sacreBLEU's "effective order": an order nobody has is void
        orders = np.maximum(counts.sum(-1), 1)
        precision = np.where(counts, match / np.maximum(hyp, 1), 0.0).sum(-1) / orders
        recall = np.where(counts, match / np.maximum(ref, 1), 0.0).sum(-1) / orders
        factor = self.beta**2
        below = factor * precision + recall
        return np.where(
            below > 0, 100 * (1 + factor) * precision * recall / np.where(below > 0, below, 1), 0.0
        )

    def _sacrebleu(self) -> CHRF:
        return CHRF(char_order=self.char_order, word_order=self.word_order, beta=self.beta)


@dataclass(frozen=True, slots=True)
class Bleu:
    """BLEU (Papineni et al. 2002) with sacreBLEU's tokenizers and exponential smoothing."""

    tokenize: str = "13a"
    name: str = "bleu"

    @property
    def signature(self) -> str:
        return _signature(BLEU(tokenize=self.tokenize))

    def sentence_statistics(self, hypotheses: Sequence[str], *, references: Sequence[str]) -> np.ndarray:
        # force: text that looks tokenized is our business, not worth a warning on standard error
        metric = BLEU(tokenize=self.tokenize, force=True)
        return _sentence_statistics(metric, hypotheses=hypotheses, references=references)

    def score(self, sums: np.ndarray) -> np.ndarray:
        sums = np.asarray(sums, dtype=np.float64)
        ours, theirs = sums[..., 0], sums[..., 1]
        orders = (sums.shape[-1] - 2) // 2
        correct, total = sums[..., 2 : 2 + orders], sums[..., 2 + orders :]
        halvings = np.cumsum((correct == 0) & (total > 0), axis=-1)
        matches = np.where(correct > 0, correct, 0.5**halvings)  # "exp": 1/2, 1/4 ... of a match
        precision = np.where(total > 0, matches / np.maximum(total, 1), 0.0)
        some = (correct.sum(-1) > 0) & (precision > 0).all(-1)
        logs = np.log(np.where(precision > 0, precision, 1.0)).mean(-1)
        ratio = np.where(ours > 0, theirs / np.maximum(ours, 1), np.inf)
        brevity = np.where(ours < theirs, np.exp(np.minimum(1 - ratio, 0.0)), 1.0)
        return np.where(some, 100 * brevity * np.exp(logs), 0.0)


def bleu_for_language(language: str) -> Bleu:
    """Return BLEU with the tokenizer its users expect for a language code such as ``zho_Hans``.

    Chinese by character and Latin word (``zh``), unspaced scripts by character, others ``13a``.
    """
    return Bleu(tokenize=_BLEU_TOKENIZER.get(language.split("_")[0], "13a"))


def load_spbleu() -> Bleu | str:
    """Return spBLEU (BLEU over FLORES-200 SentencePiece tokens), or why it is not to be had.

    sacreBLEU would download the model on first use; nothing is downloaded here.
    """
    file = Path(SPM_MODELS[SPBLEU_MODEL]["url"]).name
    path = Path(sacrebleu.utils.SACREBLEU_DIR) / "models" / file
    if importlib.util.find_spec("sentencepiece") is None:
        return "not computed: it needs the package sentencepiece"
    if not path.is_file():
        return f"not computed: its model is not at hand ({file} in sacreBLEU's folder models)"
    return Bleu(tokenize=SPBLEU_MODEL, name="spbleu")


def _sentence_statistics(
    metric: BLEU | CHRF, *, hypotheses: Sequence[str], references: Sequence[str]
) -> np.ndarray:
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    if not references:
        raise DataError("nothing to score: the test set is empty, expected at least one sentence")
    counted = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
    return np.asarray(counted, dtype=np.float64)


def _signature(metric: BLEU | CHRF) -> str:
    metric.num_refs = 1
    return str(metric.get_signature())
