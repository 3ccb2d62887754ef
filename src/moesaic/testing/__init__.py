"""Helpers for tests and examples, shipped so that users can test their own parts.

May import anything; only ``tests/`` and ``examples/`` import it.
"""
