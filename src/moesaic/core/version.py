"""The version, in a file of its own so that any package can import it."""

__version__ = "0.2.0"
