"""The heart: a router says which tokens go to which experts, a dispatcher carries, experts compute.

May import ``nn``, ``data``, ``optim``, ``ops``, ``dist`` and below. Start at ``layer.py``; every
rule of routing is a small value in ``select.py``, ``limit.py``, ``balance.py`` or ``noise.py``, or
in a file of its own in ``selects``, ``balances`` or ``noises``: ``members.py`` lists them all.
"""
