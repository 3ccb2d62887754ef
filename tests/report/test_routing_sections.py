"""The report reads the balance settings of a run from its config."""

import yaml

from moesaic.moe.auxiliary_losses import (
    EntropyBalance,
    GlobalBatchBalance,
    RouterZLoss,
    SwitchBalance,
)
from moesaic.moe.config import MoE
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.report.report_inputs import ReportInputs
from moesaic.report.routing_sections import router_settings
from moesaic.testing.tiny_models import tiny_model_config, tiny_run


def of(*balance):
    run = tiny_run(model=tiny_model_config(moe=MoE(experts=4, balance=balance)))
    return router_settings(ReportInputs(name="run", config=yaml.safe_load(run.to_yaml())))


def test_the_weights_are_those_of_the_terms_that_even_the_load():
    found = of(SwitchBalance(weight=0.01), GlobalBatchBalance(weight=0.03), RouterZLoss(weight=0.5))
    assert (found.balance_weight, found.balance, found.z_weight) == (
        0.04,
        "GlobalBatchBalance",
        0.5,
    )
    assert found.bias_rate == 0


def test_balance_by_bias_is_not_taken_for_none():
    found = of(BiasUpdate(rate=0.002), EntropyBalance())
    assert (found.balance_weight, found.bias_rate) == (0, 0.002)
