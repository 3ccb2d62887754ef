"""The report: one HTML file of a run that opens anywhere, without a network.

May import checkpoint and below, never evaluate: it reads the run directory's files. Start with
``write.py``; ``page.css`` and ``page.js`` are pasted into the page.
"""
