"""Training: a run's config, its loop, and what happens around a step.

May import everything below it (evaluate, checkpoint, model, data, ...), never ``serve``.
Start with ``run.py`` (what a run is), then ``loop.py`` (how it goes).
"""
