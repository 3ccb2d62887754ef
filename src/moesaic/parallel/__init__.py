"""Parallel: the parts that let several ranks hold one model and one batch, put in from outside.

No layer knows a rank: it holds a part (``Looking``, ``Crew``, ``Dispatcher``, ``Ranks``) whose null
object does nothing, and this room has the other ones. May import ``model`` and what is below it.
Read ``deal.py`` first: which tokens of a batch a rank holds.
"""
