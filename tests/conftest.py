"""One thread, one seed and no other machine settings for every test."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None, max_examples=60)  # a busy machine is no failure
settings.load_profile("house")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
