import resource
import sys

import pytest
import torch

from moesaic.core.freed_memory import keep_freed_memory
from moesaic.distributed.forked_ranks import run_on_ranks

MIB = 2**20


def _faults_of_a_later_step() -> int:
    """Return the page faults of the last of five steps that each fill and free 128 MiB."""
    keep_freed_memory()
    before = 0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2 * MIB) for _ in range(16)]
        tensors.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_a_step_takes_no_page_faults_for_memory_that_the_last_one_freed(
    monkeypatch: pytest.MonkeyPatch,
):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    (faults,) = run_on_ranks(1, _faults_of_a_later_step)
    assert faults < 1000  # of 32768 pages
