"""Balance terms beyond the plain ones of ``moe/balance.py``, one paper a file."""
