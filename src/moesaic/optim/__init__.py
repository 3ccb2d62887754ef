"""Optimizers, learning-rate schedules and gradient clipping, chosen as config values.

May import core only. Start with ``optimizer.py`` (what the user picks), then ``update.py`` (the one
``torch.optim.Optimizer`` that runs it) and ``muon.py``.
"""
