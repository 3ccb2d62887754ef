"""Recipes: named functions that return a whole ``Run``, checked against golden text files.

May import train and everything below. Start with ``demo.py``; ``recipe("demo")`` returns its Run,
and so does ``load("path/to/config.yaml")``.
"""
