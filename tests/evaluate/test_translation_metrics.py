import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from moesaic.core.errors import DataError
from moesaic.evaluate import translation_metrics
from moesaic.evaluate.translation_metrics import Bleu, ChrF, bleu_for_language, load_spbleu

REFERENCES = [
    "The file could not be opened.",
    "Save all documents before you leave the program?",
    "Yes",
    "Die Datei konnte nicht geöffnet werden, weil sie fehlt.",
    "打开文件失败",
    "Remove the selected items from the list",
]
OUTPUTS = [
    "The file cannot be opened.",
    "Save all documents before leaving the program?",
    "No",
    "Die Datei wurde nicht geöffnet, weil sie fehlt.",
    "无法打开文件",
    "",
]
CASES = {
    "usual": (OUTPUTS, REFERENCES),
    "one sentence": (OUTPUTS[:1], REFERENCES[:1]),
    "nothing in common": (["abc def", "ghi"], ["uvw xyz", "rst"]),
    "all empty": (["", ""], ["one two", "three"]),
    "no 4-gram matches": (["the big cat sat here"], ["the big dog sat there"]),
    "words of one letter": (["a b"], ["a b"]),
    "perfect": (REFERENCES, REFERENCES),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokenize", ["13a", "zh", "char"])
def test_bleu_of_summed_statistics_equals_sacrebleu(case, tokenize):
    outputs, references = CASES[case]
    ours = Bleu(tokenize=tokenize)
    sums = ours.sentence_statistics(outputs, references=references).sum(0)
    theirs = BLEU(tokenize=tokenize, force=True).corpus_score(outputs, [references]).score
    assert float(ours.score(sums)) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_chrf_of_summed_statistics_equals_sacrebleu(case):
    outputs, references = CASES[case]
    sums = ChrF().sentence_statistics(outputs, references=references).sum(0)
    theirs = CHRF(word_order=2).corpus_score(outputs, [references]).score
    assert float(ChrF().score(sums)) == pytest.approx(theirs, abs=1e-9)


def test_scores_of_many_resamples_are_those_of_each():
    statistics = ChrF().sentence_statistics(OUTPUTS, references=REFERENCES)
    draws = np.random.default_rng(1).integers(0, 3, (7, len(OUTPUTS)))
    for metric in (ChrF(), Bleu()):
        statistics = metric.sentence_statistics(OUTPUTS, references=REFERENCES)
        together = metric.score(draws @ statistics)
        apart = [float(metric.score(draw @ statistics)) for draw in draws]
        assert together == pytest.approx(apart)


def test_signatures_name_tokenizer_order_and_version():
    assert "nw:2" in ChrF().signature
    assert "version:" in ChrF().signature
    assert "tok:zh" in bleu_for_language("zho_Hans").signature
    assert "tok:char" in bleu_for_language("jpn_Jpan").signature
    assert "tok:13a" in bleu_for_language("deu_Latn").signature


def test_an_empty_test_set_is_the_users_mistake():
    with pytest.raises(DataError, match="empty"):
        ChrF().sentence_statistics([], references=[])


def test_spbleu_without_its_model_gives_the_reason_and_downloads_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(translation_metrics.sacrebleu.utils, "SACREBLEU_DIR", str(tmp_path))
    found = load_spbleu()
    assert isinstance(found, str)
    assert "not computed" in found
    assert not list(tmp_path.iterdir())
