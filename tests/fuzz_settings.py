"""The number of examples of the fuzz tests, in the suite and in a longer campaign.

``MOESAIC_FUZZ_EXAMPLES=20 pytest ...`` tries twenty times as many. The examples are the same each
time, so what a campaign found is found again.
"""

import os

from hypothesis import HealthCheck, Phase, settings

SCALE = max(1, int(os.environ.get("MOESAIC_FUZZ_EXAMPLES", "1")))


def bounded(examples: int) -> settings:
    """Return settings for ``examples`` examples in the suite, without shrinking."""
    return settings(
        max_examples=examples * SCALE,
        derandomize=True,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
