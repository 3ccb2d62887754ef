"""The fused mixture for CPUs: a C file, compiled on this machine when it is first wanted.

``mixer.py`` is the operation, ``build.py`` makes the library and keeps it, ``native.py`` is the
boundary between the two languages, ``source/`` the C, ``probe.py`` says whether it may be used.
Without a compiler the composed path is taken.
"""
