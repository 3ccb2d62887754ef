"""Monitoring of a run: metric writers, expert usage, router health, the progress display.

Imports core only, so it takes plain tensors and values. Start with ``metric_writers.py``, then
``expert_usage.py`` (counts) and ``router_health.py`` (diagnosis).
"""
