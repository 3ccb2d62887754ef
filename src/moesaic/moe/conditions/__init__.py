"""Conditions: what a gate may read besides a token's state."""
