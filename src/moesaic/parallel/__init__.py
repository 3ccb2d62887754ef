"""Parallel: a model laid over ranks from outside. Layers know nothing of it.

May import model and below. Start with ``layout.py`` (what is cut, and where), then ``apply.py``
(the order in which a plan is applied) and ``spread.py`` (what a model that is laid out can do).
"""
