"""Readers: one module per file format, plain or compressed; ``formats.py`` chooses by file name."""
