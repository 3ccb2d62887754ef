"""Optimizers, learning-rate schedules and gradient clipping, chosen by config.

May import ``distributed`` and ``core``. Start with ``optimizer.py`` (the config family), then
``named_optimizer.py`` (the ``torch.optim.Optimizer``) and ``update_rules.py`` (AdamW, Muon).
"""
