"""Ranks: a function on N CPU ranks, for tests (``dist/forked.py``)."""

from moesaic.dist.forked import RankError, run_cases_on_ranks, run_on_ranks

__all__ = ["RankError", "run_cases_on_ranks", "run_on_ranks"]
