"""Helpers for tests, shipped so that users can test their own routers, losses and layers.

May import anything; only ``tests/``, ``benchmarks/`` and ``examples/`` import it.
"""
