"""Ranks: how a process finds its place among others, and what they add up together.

May import ``core`` only. Start with ``launch.py``: ``join()`` returns a ``World``; one process
alone gets a ``World`` too, so nothing above asks whether training is distributed.
"""
