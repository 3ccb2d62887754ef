"""Layers of a transformer: norm, positional encoding, attention, feed-forward, embedding.

May import ``ops`` and ``core``. Layers read packed tokens [T, D] (``packing.py``); only attention
pads.
"""
