"""moesaic: Mixture-of-Experts models you can check, from the first token to the served translation."""

__version__ = "0.1.0"
