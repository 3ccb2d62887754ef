"""The command line: one file per verb, each a thin shell over a function of a lower room.

May import everything but testing. Start with ``main.py``: it knows the verbs and turns a user's
mistake into one paragraph and exit code 2.
"""
