"""Launch files for multi-node jobs: ``launcher.py`` renders them from ``templates``."""
