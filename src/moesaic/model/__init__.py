"""Transformers made of the parts below: encoder-decoder and decoder-only, dense and sparse.

May import ``moe``, ``nn``, ``data``, ``optim``, ``ops``, ``dist``, ``core``. Start at
``config.py`` and ``blueprint.py``, then ``transformer.py``; ``count.py`` is the same as arithmetic.
"""
