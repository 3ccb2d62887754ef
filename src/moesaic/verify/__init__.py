"""Verify: the same training steps under every plan, compared with one process.

May import train and everything below. Start with ``prove.py`` (what is run), then ``small.py`` (the
user's config, narrower), ``plans.py`` (which plans there are), ``follow.py`` (what a step leaves)
and ``compare.py`` (when two runs are the same).
"""
