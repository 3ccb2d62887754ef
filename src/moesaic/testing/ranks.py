"""Ranks: a function on N CPU ranks, for tests (``dist/forked.py``)."""

from moesaic.dist.forked import RankError, run_each, run_on_ranks

__all__ = ["RankError", "run_each", "run_on_ranks"]
