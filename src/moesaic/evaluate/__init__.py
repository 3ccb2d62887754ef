"""Evaluation: systems that are callables, test sets, scores with intervals, honest baselines.

May import checkpoint and below, never serve or report. Start with ``harness.py`` (systems and test
sets in, a summary out); ``summary.py`` says what ``summary.json`` holds.
"""
