"""The data pipeline of a run: tokenizer, token shards, tasks, mixture, batches.

Imports ``core`` and ``corpus``. Start with ``loader.py``, the iterator of batches.
"""
