"""Links: routers that tell the layers above what they know."""
