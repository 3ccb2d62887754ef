"""The parts of a transformer, each an object you choose: norm, position, attention, feed-forward.

May import ``ops`` and ``core``. Everything works on the packed stream of real tokens
(``packing.py``): padding exists only inside attention.
"""
