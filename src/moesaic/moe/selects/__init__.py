"""Selection rules beyond the plain ones of ``moe/select.py``, one paper a file."""
