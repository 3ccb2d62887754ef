"""Serving: translate with a trained run, score it, and record its routing.

Imports evaluate and the packages below it, never train. Start with ``translator.py``.
"""
