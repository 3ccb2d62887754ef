"""Pure tensor functions, each with its plain twin.

May import ``core`` only. ``choose.py`` says which implementation runs on a device and why. Start at
``group.py`` (edges sorted by expert) and ``grouped.py`` (the feed-forward of every expert at once).
"""
