"""Checkpoints written whole or not at all, verified before they are believed; run directories.

May import model and below. Start with ``snapshot.py`` (what is saved), ``save.py`` and ``load.py``;
for many ranks with ``shard.py`` (what one of them holds), ``sharded.py`` and ``saver.py``.
Everything that touches the disk while saving goes through ``disk.py``, so a test can make it fail
at any moment.
"""
