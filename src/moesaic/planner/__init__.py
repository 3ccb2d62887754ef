"""Costs of a training step before it runs: bytes, operations, communication, time, plans.

Start at ``step_cost.py``: what one rank holds, computes and sends under a plan.
"""
