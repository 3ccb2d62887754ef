"""Joining: from nothing, from a half-set environment, from torchrun, and after a restart."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moesaic.core.errors import UserError
from moesaic.dist.launch import join
from moesaic.dist.world import Alone, Ranks
from moesaic.testing.ranks import run_on_ranks


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_a_world() -> None:
    with join(device="cpu") as world:
        assert isinstance(world, Alone)
        assert (world.rank, world.size) == (0, 1)


def test_a_half_set_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"), join():
        pass


def _join_existing() -> tuple[bool, int]:
    with join(device="cpu") as world:
        inside = isinstance(world, Ranks)
    return inside, Ranks().size


def test_an_existing_group_is_used_and_left() -> None:
    assert run_on_ranks(2, _join_existing) == [(True, 2)] * 2


SCRIPT = """
import json, os, sys
from pathlib import Path
from moesaic.dist.launch import join

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with join(device="cpu", timeout_s=20) as world:
    total = world.sum_floats({"rank": world.rank})["rank"]
    if attempt == 0 and world.rank == 1:
        os._exit(9)
    world.barrier()
    answer = Path(sys.argv[1]) / f"{world.rank}.json"
    answer.write_text(json.dumps({"attempt": attempt, "total": total, "size": world.size}))
"""


@pytest.mark.slow
def test_torchrun_meets_again_after_a_rank_died(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "--monitor-interval=0.1", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        answer = json.loads((tmp_path / f"{rank}.json").read_text())
        assert answer == {"attempt": 1, "total": 1.0, "size": 2}
