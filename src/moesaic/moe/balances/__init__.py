"""Balances: the terms of the house besides Switch's and the z-loss, one file per paper."""
