"""Building parallel corpora: packages and files in, a cleaned and split corpus on disk out.

Imports ``core`` alone; ``data`` imports this. Start with ``build_corpus.py``, then ``corpus.py``.
"""
