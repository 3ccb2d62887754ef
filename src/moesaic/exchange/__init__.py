"""Checkpoints of Hugging Face transformers, in and out.

A family of models (``families.py``) is data: a mapping of its config and a table of its tensor
names, both read in either direction. Read ``import_model.py`` first.
"""
