"""Benchmarks that anyone can repeat: contenders take turns in one run, and ratios count.

Read ``layer.py``: an MoE layer beside a dense one of the same rows and beside other libraries.
"""
