"""Random models, batches and plans equal one process (hundreds: ``benchmarks/fuzz_plans.py``)."""

from dataclasses import replace
from itertools import islice

import pytest

from moesaic.testing.random_plans import cases
from moesaic.verify.prove import prove, setting

CASES = list(islice(cases(7, most=3), 6))


def test_cases_are_a_function_of_their_seed() -> None:
    again = list(islice(cases(7, most=3), 6))
    assert [case.about for case in again] == [case.about for case in CASES]
    assert len({repr(case.about) for case in [*CASES, *islice(cases(8, most=3), 6)]}) == 12


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_random_plan_of_a_random_model_equals_one_process(number: int) -> None:
    case = CASES[number]
    given = replace(setting(case.run, steps=2), shape=case.shape)
    [verdict] = prove(given, chosen=[case.parallel])
    assert verdict.wrong == (), case.about
