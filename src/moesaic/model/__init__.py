"""Transformers, encoder-decoder and decoder-only, dense and MoE: config, model, generation, counts.

May import ``moe``, ``nn``, ``data``, ``optim``, ``ops``, ``distributed``, ``core``. Start with
``config.py``, then ``transformer.py``; ``parameter_flop_count.py`` is the same as arithmetic.
"""
