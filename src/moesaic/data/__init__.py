"""Text in, batches out: languages, readers, cleaning, corpora; tokens, shards, tasks, loader.

May import core. Start with ``build.py`` (packages to corpus) and ``corpus.py`` (what it is on disk).
"""
