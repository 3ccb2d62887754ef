"""Law: whatever a rank dies or hangs of, the others name it and stop, and the run goes on as if
nothing had happened.

``benchmarks/faults.py`` does the same with 100 faults and more, on 2, 4 and 8 ranks.
"""

from pathlib import Path

import pytest
from fault_trials import Fault, run_fault_trials

from moesaic.testing.tiny_models import synthetic_run
from moesaic.train.run import CheckpointConfig

FAULTS = (
    Fault("kill", "collective", rank=1, after=3),
    Fault("stop", "forward", rank=1, after=2),
    Fault("exception", "save", rank=0, after=2),
    Fault("loop", "between steps", rank=0, after=3),
    Fault("kill", "save", rank=0, after=2),
)


@pytest.mark.slow
@pytest.mark.usefixtures("data_home")
def test_a_lost_rank_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    run = synthetic_run(steps=10, checkpoint=CheckpointConfig(every=2), collective_timeout_s=2.0)
    endured = run_fault_trials(run, folder=tmp_path, world_size=2, faults=FAULTS)
    assert endured.problems == []
    assert endured.differences == ()
    assert len(endured.trials) == len(FAULTS)
    for fault, ordeal in zip(FAULTS, endured.trials, strict=True):
        assert f"rank {fault.rank} " in ordeal.sentence
