"""Process groups, collectives, launch and fault detection of distributed runs.

May import ``core`` only. Start with ``initialize.py``: ``init_distributed()`` yields a ``World``,
for a single process too, so callers need no branch on whether training is distributed.
"""
