"""Ranks: a function on N CPU ranks, for tests (``distributed/forked_ranks.py``)."""

from moesaic.distributed.forked_ranks import RankError, run_cases_on_ranks, run_on_ranks

__all__ = ["RankError", "run_cases_on_ranks", "run_on_ranks"]
