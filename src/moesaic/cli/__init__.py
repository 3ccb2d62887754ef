"""Command line: one module per command, each a thin layer over a function of another package.

Imports everything but testing. Start with ``main.py``, which dispatches to a command and turns a
UserError into one paragraph and exit code 2.
"""
