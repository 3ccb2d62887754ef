"""Checkpoints: written atomically, verified when loaded; and run directories. May import model and
below.

Start with ``snapshot.py`` (what is saved), ``full_checkpoint.py`` and ``sharded_checkpoint.py``.
All disk operations of saving are in ``Disk`` (``checkpoint_directory.py``), so tests can inject
faults.
"""
