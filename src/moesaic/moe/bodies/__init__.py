"""Bodies: what stands at an expert's place or around it (``moe/members.py`` lists them)."""
