"""Translation metrics: BLEU and chrF++ as sacreBLEU computes them, and the off-target rate.

BLEU and chrF are functions of statistics summed over a corpus (n-gram matches, lengths). sacreBLEU
counts them per sentence; here sums and scores are arrays, so that a score, its interval and a
paired test are one matrix product each (``evaluate/bootstrap.py``).

The off-target rate is the share of outputs in another language than the target, measured twice.
By script: fewer than half of the letters belong to the target's script; exact, but it cannot
separate languages of one script. By language identification (py3langid, extra ``lid``): the most
likely of the candidate languages is another one; it separates such languages, but errs on short
texts. Names and commands are the same in any language, so a sentence counts only where the
reference is recognised as the target language, and identification needs ``MIN_LETTERS`` letters.

Letters: N sentences, C statistics per sentence, ... any leading axes (resamples).
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import sacrebleu.utils
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS

from moesaic.core.errors import DataError
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.scripts import count_letters, is_known_script, script_classes, script_share

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
        """sacreBLEU's signature, to be reported with the score."""
        ...

    def sentence_statistics(
        self, hypotheses: Sequence[str], *, references: Sequence[str]
    ) -> np.ndarray:
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

    def sentence_statistics(
        self, hypotheses: Sequence[str], *, references: Sequence[str]
    ) -> np.ndarray:
        return _sentence_statistics(self._sacrebleu(), hypotheses=hypotheses, references=references)

    def score(self, sums: np.ndarray) -> np.ndarray:
        hyp, ref, match = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
        counts = (hyp > 0) & (ref > 0)  # orders that no text has do not count, as in sacreBLEU
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

    def sentence_statistics(
        self, hypotheses: Sequence[str], *, references: Sequence[str]
    ) -> np.ndarray:
        # force: no warning about text that seems to be tokenized
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
    """Return BLEU with the tokenizer that is usual for a language code such as ``zho_Hans``.

    Chinese by character and Latin word (``zh``), unspaced scripts by character, others ``13a``.
    """
    return Bleu(tokenize=_BLEU_TOKENIZER.get(language.split("_")[0], "13a"))


def load_spbleu() -> Bleu | str:
    """Return spBLEU (BLEU over FLORES-200 SentencePiece tokens), or why it is not available.

    sacreBLEU downloads the model on first use; this function downloads nothing.
    """
    file = Path(SPM_MODELS[SPBLEU_MODEL]["url"]).name
    path = Path(sacrebleu.utils.SACREBLEU_DIR) / "models" / file
    if importlib.util.find_spec("sentencepiece") is None:
        return "not computed: it needs the package sentencepiece"
    if not path.is_file():
        return f"not computed: its model is not installed ({file} in sacreBLEU's folder models)"
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


MIN_LETTERS = 20  # of shorter texts the identified language is wrong too often
MIN_SCRIPT_SHARE = 0.5


LanguageIdentifier = Callable[[str], str]
"""Returns the code of a text's language, one of its candidate languages."""


@dataclass(frozen=True, slots=True)
class OffTargetRate:
    """``off`` of ``counted`` sentences; ``note`` is the reason if nothing was counted."""

    off: int
    counted: int
    note: str = ""

    @property
    def rate(self) -> float | None:
        return self.off / self.counted if self.counted else None


@dataclass(frozen=True, slots=True)
class OffTargetRates:
    """Off-target rates of one system in one language, by script and by identification."""

    script: OffTargetRate
    identified: OffTargetRate


def measure_off_target(
    outputs: Sequence[str],
    *,
    references: Sequence[str],
    target: str,
    identify: LanguageIdentifier | None,
) -> OffTargetRates:
    """Count off-target outputs. Empty outputs are in no language and do not count."""
    pairs = [
        (o, r) for o, r in zip(outputs, references, strict=True) if count_letters(script_classes(o))
    ]
    return OffTargetRates(
        _by_script(pairs, target=target), _by_identification(pairs, target, identify)
    )


def load_language_identifier(languages: Sequence[str]) -> LanguageIdentifier | str:
    """Return py3langid restricted to ``languages`` (codes), or why it is not available.

    Languages that py3langid does not support are no candidates. Of two candidates with one library
    code (Serbian in two scripts) the first is returned.
    """
    if importlib.util.find_spec("py3langid") is None:
        return "not measured: install the extra, pip install 'moesaic[lid]'"
    return _restricted_identifier(tuple(languages))


@lru_cache(maxsize=8)  # reading its model takes half a second
def _restricted_identifier(languages: tuple[str, ...]) -> LanguageIdentifier | str:
    langid = importlib.import_module("py3langid.langid")
    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    names: dict[str, str] = {}
    for code in languages:
        names.setdefault(_py3langid_code(code), code)
    known = [name for name in names if name in set(model.nb_classes)]
    if len(known) < 2:
        return "not measured: py3langid supports fewer than two of these languages"
    model.set_languages(known)
    return lambda text: names[str(model.classify(text)[0])]


def _py3langid_code(code: str) -> str:
    row = resolve_language(code)
    return {"nb": "no"}.get(row.iso1 or "", row.iso1 or code)


def _by_script(pairs: Sequence[tuple[str, str]], *, target: str) -> OffTargetRate:
    script = resolve_language(target).script
    if not is_known_script(script):
        return OffTargetRate(0, 0, f"not measured: letters of {script} are not distinguished")
    valid = [o for o, r in pairs if script_share(r, script=script) >= MIN_SCRIPT_SHARE]
    return OffTargetRate(
        sum(script_share(o, script=script) < MIN_SCRIPT_SHARE for o in valid), len(valid)
    )


def _by_identification(
    pairs: Sequence[tuple[str, str]], target: str, identify: LanguageIdentifier | None
) -> OffTargetRate:
    if identify is None:
        return OffTargetRate(0, 0, "not measured")
    long = [
        (o, r)
        for o, r in pairs
        if min(count_letters(script_classes(t)) for t in (o, r)) >= MIN_LETTERS
    ]
    valid = [o for o, r in long if identify(r) == target]
    note = "" if valid else "no reference is long enough and recognised"
    return OffTargetRate(sum(identify(o) != target for o in valid), len(valid), note)
