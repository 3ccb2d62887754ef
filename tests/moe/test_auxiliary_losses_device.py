"""Groups of experts must be of one size."""

import pytest

from moesaic.core.errors import ConfigError
from moesaic.moe.auxiliary_losses import DeviceBalance
from moesaic.moe.config import MoE


def test_groups_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(ConfigError, match="3 groups of 4"):
        MoE(experts=4, balance=(DeviceBalance(num_groups=3),))
