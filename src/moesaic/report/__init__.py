"""The report: one HTML file of a run that needs no network and no other file.

Imports checkpoint and below, never evaluate: it reads the files of the run directory. Start with
``html_report.py``; ``page.css`` and ``page.js`` are embedded in the page.
"""
