"""Random models, batches and plans equal one process (hundreds: ``benchmarks/fuzz_plans.py``)."""

from dataclasses import replace
from itertools import islice

import pytest
from random_cases import random_cases

from moesaic.verify.compare_plans import compare_plans, make_setup, run_reference

CASES = list(islice(random_cases(7, max_ranks=3), 6))


def test_cases_are_a_function_of_their_seed() -> None:
    again = list(islice(random_cases(7, max_ranks=3), 6))
    assert [case.summary for case in again] == [case.summary for case in CASES]
    assert (
        len({repr(case.summary) for case in [*CASES, *islice(random_cases(8, max_ranks=3), 6)]})
        == 12
    )


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_random_plan_of_a_random_model_equals_one_process(number: int) -> None:
    case = CASES[number]
    given = replace(make_setup(case.run, steps=2), shape=case.shape)
    [verdict] = compare_plans(given, plans=[case.parallel], reference=run_reference(given))
    assert verdict.problems == (), case.summary
