"""Parallel plans verified: the same training steps under every plan, compared with one process.

May import ``train`` and everything below. Start with ``compare_plans.py``.
"""
