import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from moesaic.evaluate import bootstrap
from moesaic.evaluate.bootstrap import BootstrapScores, bootstrap_resample, macro_average
from moesaic.evaluate.translation_metrics import Bleu, ChrF

WORDS = "open file close window save print all new copy paste undo cut find next"


def _corpus(count, *, noise, seed=0):
    random = np.random.default_rng(seed)
    references = [
        " ".join(random.choice(WORDS.split(), random.integers(2, 9))) for _ in range(count)
    ]
    outputs = [
        " ".join(w if random.random() > noise else "wrong" for w in r.split()) for r in references
    ]
    return outputs, references


def test_the_interval_holds_the_score_and_narrows_with_more_sentences():
    widths = []
    for count in (50, 800):
        outputs, references = _corpus(count, noise=0.3)
        drawn = bootstrap_resample(
            ChrF().score, statistics=ChrF().sentence_statistics(outputs, references=references)
        )
        found = drawn.confidence_interval()
        assert found.low < found.score < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_draws_depend_on_the_seed_alone(monkeypatch):
    outputs, references = _corpus(40, noise=0.3)
    statistics = ChrF().sentence_statistics(outputs, references=references)
    first = bootstrap_resample(ChrF().score, statistics=statistics, resamples=60, seed=3)
    again = bootstrap_resample(ChrF().score, statistics=statistics, resamples=60, seed=3)
    other = bootstrap_resample(ChrF().score, statistics=statistics, resamples=60, seed=4)
    assert (first.resampled == again.resampled).all()
    assert (first.resampled != other.resampled).any()


def test_drawing_in_pieces_changes_nothing(monkeypatch):
    outputs, references = _corpus(40, noise=0.3)
    statistics = Bleu().sentence_statistics(outputs, references=references)
    whole = bootstrap_resample(Bleu().score, statistics=statistics, resamples=60)
    monkeypatch.setattr(bootstrap, "_MAX_DRAW_CELLS", 40 * 7)
    parts = bootstrap_resample(Bleu().score, statistics=statistics, resamples=60)
    assert (whole.resampled == parts.resampled).all()


def test_a_clear_difference_is_significant_and_equal_systems_are_not():
    good, references = _corpus(300, noise=0.1)
    bad, _ = _corpus(300, noise=0.5)
    drawn = [
        bootstrap_resample(
            ChrF().score, statistics=ChrF().sentence_statistics(o, references=references)
        )
        for o in (good, bad)
    ]
    lead = drawn[0].compare(drawn[1])
    assert lead.low > 0
    assert lead.p < 0.01
    same = drawn[0].compare(drawn[0])
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_a_pairing_is_sharper_than_two_intervals():
    base, references = _corpus(300, noise=0.4)
    better = [
        r if i % 20 == 0 else b for i, (b, r) in enumerate(zip(base, references, strict=True))
    ]
    drawn = [
        bootstrap_resample(
            ChrF().score, statistics=ChrF().sentence_statistics(o, references=references)
        )
        for o in (better, base)
    ]
    first, second = (d.confidence_interval() for d in drawn)
    assert first.low < second.high  # the intervals overlap
    assert drawn[0].compare(drawn[1]).low > 0  # and yet the lead is certain


def test_p_values_of_equal_systems_are_spread_evenly():
    values = []
    for seed in range(120):
        random = np.random.default_rng(seed)
        statistics = random.poisson(5, (60, 3)).astype(float), random.poisson(5, (60, 3))
        drawn = [
            bootstrap_resample(lambda x: x.sum(-1), statistics=s, resamples=200, seed=seed)
            for s in statistics
        ]
        values.append(drawn[0].compare(drawn[1]).p)
    assert 0.3 < np.mean(values) < 0.7
    assert np.mean(np.array(values) < 0.05) < 0.15


def test_a_macro_average_weighs_languages_equally():
    one = BootstrapScores(10.0, np.array([9.0, 11.0]))
    two = BootstrapScores(30.0, np.array([30.0, 34.0]))
    both = macro_average([one, two])
    assert both.score == 20.0
    assert both.resampled == pytest.approx([19.5, 22.5])


def test_the_one_tailed_p_is_sacrebleus_paired_bootstrap():
    outputs, references = _corpus(60, noise=0.30)
    baseline, _ = _corpus(60, noise=0.32, seed=0)
    test = PairedTest(
        [("base", baseline), ("ours", outputs)],
        metrics={"BLEU": BLEU(), "CHRF": CHRF(word_order=2)},
        references=[references],
        test_type="bs",
        n_samples=1000,
    )
    _, found = test()
    for metric, name in ((Bleu(), "BLEU"), (ChrF(), "chrF2++")):
        drawn = [
            bootstrap_resample(
                metric.score, statistics=metric.sentence_statistics(o, references=references)
            )
            for o in (outputs, baseline)
        ]
        ours, theirs = drawn[0].compare(drawn[1]), found[name][1].p_value
        assert 0.02 < theirs < 0.9  # a difference that a wrong tail would show
        assert ours.p_sacrebleu == pytest.approx(theirs, abs=0.06)  # other draws


def test_the_two_sided_p_counts_both_sides_of_the_centred_differences():
    drawn = np.array([1.0, 2.0, 3.0, 6.0])
    ours, other = BootstrapScores(2.5, drawn), BootstrapScores(0.0, np.zeros(4))
    found = ours.compare(other)
    assert found.p == pytest.approx((1 + 1) / 5)  # |drawn - 3| > 2.5: once
    assert found.p_sacrebleu == pytest.approx((1 + 1) / 5)
    falling = BootstrapScores(-2.5, -drawn).compare(other)
    assert (falling.p, falling.p_sacrebleu) == (found.p, found.p_sacrebleu)
