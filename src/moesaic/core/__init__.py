"""Core: configs, errors, files, units, and the tensor types of shape annotations.

Imports no other package of moesaic and never torch.distributed. Start with ``config.py``.
"""
