"""Evaluation: test sets, metrics with confidence intervals, baselines, routing analysis.

Imports checkpoint and below, never serve or report. Start with ``harness.py``;
``evaluation_summary.py`` describes ``summary.json``.
"""
