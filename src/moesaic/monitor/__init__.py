"""What a run shows: rows of metrics, counts of routed tokens and their diagnosis, the live table.

May import core only, so it takes plain tensors and values. Start with ``metrics.py`` (rows),
``usage.py`` (counts), ``insight.py`` (what they say), ``doctor.py`` (diagnosis in words) and
``console.py`` (for people).
"""
