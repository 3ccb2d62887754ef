"""Benchmark of an MoE layer against a dense layer and other libraries (``moesaic bench layer``).

Start at ``layer_benchmark.py``.
"""
