"""Memory tiers of training: device, host and disk, and the stores that fetch tensors from them.

Imports ``core`` only. Start with ``tier.py`` (the family), ``memory_plan.py`` (which purpose is on
which tier) and ``tensor_store.py`` (how tensors move).
"""
