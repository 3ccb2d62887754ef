"""Model parallelism: turn a model built for one process into one rank's part of a plan.

Imports ``model`` and below. Start with ``sharding_plan.py`` (which dims are sharded over which
axes), ``parallelize.py`` (applies a plan) and ``parallel_model.py`` (one training step's calls).
"""
