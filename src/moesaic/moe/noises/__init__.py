"""Router noises beyond the plain ones of ``moe/noise.py``, one paper a file."""
