"""Metrics: sacreBLEU's scores as sums of sentence statistics, so that resampling costs a product.

BLEU and chrF are functions of statistics summed over a corpus (n-gram matches, lengths). sacreBLEU
counts them, sentence by sentence; here the sum and the score are arrays, so a score, its interval
and a paired test are one matrix product each (``evaluate.bootstrap``).

Letters: N sentences, C statistics per sentence, ... any leading axes (resamples).

Off-target rate: how often a system answers in another language than it was asked for.

Two views. *By script*: fewer than half of the letters belong to the target's script; exact, but
blind between languages of one script. *By identification* (py3langid, optional extra ``lid``): the
most likely of the candidate languages is another one; sees Danish for Swedish, errs on short text.
Names and commands stay as they are in any language, so a sentence only counts where the reference
itself is recognised as the target language, and identification needs ``MIN_LETTERS`` letters.
"""

import importlib
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
        """sacreBLEU's signature: what to quote beside the number."""
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

    def sentence_statistics(
        self, hypotheses: Sequence[str], *, references: Sequence[str]
    ) -> np.ndarray:
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


MIN_LETTERS = 20  # below, identification errs too often to accuse anyone


MIN_SCRIPT_SHARE = 0.5


class LanguageIdentifier(Protocol):
    """Says which language a text is in: a code, one of those it was made for."""

    def __call__(self, text: str) -> str: ...


@dataclass(frozen=True, slots=True)
class OffTargetRate:
    """``off`` of ``counted`` sentences; ``note`` says why nothing was counted."""

    off: int
    counted: int
    note: str = ""

    @property
    def rate(self) -> float | None:
        return self.off / self.counted if self.counted else None


@dataclass(frozen=True, slots=True)
class OffTargetRates:
    """Both views of one system in one language."""

    script: OffTargetRate
    identified: OffTargetRate


def measure_off_target(
    outputs: Sequence[str],
    *,
    references: Sequence[str],
    target: str,
    identify: LanguageIdentifier | None,
) -> OffTargetRates:
    """Count off-target outputs. Empty outputs are wrong, but in no language: not counted."""
    said = [
        (o, r) for o, r in zip(outputs, references, strict=True) if count_letters(script_classes(o))
    ]
    return OffTargetRates(
        _by_script(said, target=target), _by_identification(said, target, identify)
    )


def load_language_identifier(languages: Sequence[str]) -> LanguageIdentifier | str:
    """Return py3langid restricted to ``languages`` (codes), or why there is none.

    A language that the library does not know is no candidate. Two candidates of one library code
    (Serbian in two scripts) are answered with the first.
    """
    if importlib.util.find_spec("py3langid") is None:
        return "not measured: install the extra, pip install 'moesaic[lid]'"
    langid = importlib.import_module("py3langid.langid")
    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    names: dict[str, str] = {}
    for code in languages:
        names.setdefault(_py3langid_code(code), code)
    known = [name for name in names if name in set(model.nb_classes)]
    if len(known) < 2:
        return "not measured: py3langid knows fewer than two of these languages"
    model.set_languages(known)
    return _Py3LangId(model, {name: names[name] for name in known})


class _Py3LangId:
    def __init__(self, model: object, names: dict[str, str]) -> None:
        self._model, self._names = model, names

    def __call__(self, text: str) -> str:
        name, _ = self._model.classify(text)  # pyright: ignore[reportAttributeAccessIssue]
        return self._names[str(name)]


def _py3langid_code(code: str) -> str:
    row = resolve_language(code)
    return {"nb": "no"}.get(row.iso1 or "", row.iso1 or code)


def _by_script(said: Sequence[tuple[str, str]], *, target: str) -> OffTargetRate:
    script = resolve_language(target).script
    if not is_known_script(script):
        return OffTargetRate(0, 0, f"not measured: letters of {script} are not told apart")
    fair = [o for o, r in said if script_share(r, script=script) >= MIN_SCRIPT_SHARE]
    return OffTargetRate(
        sum(script_share(o, script=script) < MIN_SCRIPT_SHARE for o in fair), len(fair)
    )


def _by_identification(
    said: Sequence[tuple[str, str]], target: str, identify: LanguageIdentifier | None
) -> OffTargetRate:
    if identify is None:
        return OffTargetRate(0, 0, "not measured")
    long = [
        (o, r)
        for o, r in said
        if min(count_letters(script_classes(t)) for t in (o, r)) >= MIN_LETTERS
    ]
    fair = [o for o, r in long if identify(r) == target]
    note = "" if fair else "no reference is long enough and recognised"
    return OffTargetRate(sum(identify(o) != target for o in fair), len(fair), note)
