"""The audit: is a published merge what its card says, and are its scores real?

run.py carries it out; target.py: of what; weights.py and rescore.py: what is done again (ways.py:
how else a score may have come about); measured.py: what a run gave, and which of a claim's items it
saw; verdicts.py, labels.py, grim.py and averages.py: claims judged; summary.py: the verdict table;
page.py: the page."""

VERSION = 2
