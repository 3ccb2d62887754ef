"""Launch files: how a job of several machines is started, one file per system.

``launcher.py`` is the family and the one torchrun command line that all of them contain; the texts
around it are in ``templates``.
"""
