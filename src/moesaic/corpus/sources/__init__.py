"""Sources of raw pairs: package catalogues, Debian packages, local files, synthetic languages.

``text_source.py`` is the interface; ``../corpus_recipes.py`` has the corpora with a name.
"""
