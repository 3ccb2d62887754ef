"""Recipes: named functions that return a whole ``Run``, checked against golden text files.

May import train and everything below. Start with ``demo_recipe.py``; ``moesaic.recipe("demo")``
returns its Run, and so does ``moesaic.recipe("path/to/config.yaml")``.
"""
