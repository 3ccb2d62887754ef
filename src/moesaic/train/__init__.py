"""Training: run config, trainer, training loop and hooks.

Imports evaluate and the packages below it, never serve. Start with ``run.py`` (the config), then
``run_training.py``, ``loop.py`` and ``trainer.py``.
"""
