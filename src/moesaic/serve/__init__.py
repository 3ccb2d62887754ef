"""Serving: a run directory that translates. Start with ``translator.py``.

May import evaluate and below, never train.
"""
