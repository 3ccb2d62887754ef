"""Text in, batches out: languages, readers, cleaning, corpora; tokens, shards, tasks, loader.

May import core. Start with ``build.py`` (packages to corpus), then ``corpus.py`` (what is on disk)
and ``loader.py`` (what a step reads).
"""
