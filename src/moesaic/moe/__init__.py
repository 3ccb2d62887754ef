"""MoE layer: router, dispatcher, experts, and the routing rules that a config selects.

May import ``nn``, ``data``, ``optim``, ``ops``, ``distributed`` and below. Start at ``layer.py``;
each family of rules is one module (``expert_selection.py``, ``expert_capacity.py``,
``auxiliary_losses.py``, ...).
"""
