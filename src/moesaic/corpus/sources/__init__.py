"""Where raw pairs come from: package catalogues, Debian, your own files, a ready extract.

``source.py`` is the contract, ``named.py`` the corpora that have a name.
"""
