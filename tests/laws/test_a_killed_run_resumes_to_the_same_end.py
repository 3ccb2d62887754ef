"""Law: a run that is killed at any moment, and resumed, ends as if nothing had happened.

``benchmarks/kill_campaign.py`` does the same with 50 kills and more.
"""

from pathlib import Path

import pytest
from kill_trials import kill_and_resume

from moesaic.testing.tiny_models import synthetic_run
from moesaic.train.run import CheckpointConfig


@pytest.mark.slow
@pytest.mark.usefixtures("data_home")
def test_a_killed_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    run = synthetic_run(steps=14, checkpoint=CheckpointConfig(every=2))
    campaign = kill_and_resume(run, folder=tmp_path, kills=5, seed=0)
    assert campaign.differences == ()
    assert campaign.kills == 5
