"""The words everything is said in: config, shapes, units, files, errors.

Imports nothing of the house and never torch.distributed. Start at ``config.py``.
"""
