"""Readers: a file per format, plain or compressed, all streaming; ``files.py`` chooses by name."""
