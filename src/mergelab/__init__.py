"""mergelab: merges of language models that anyone can re-create to the byte."""

__version__ = "0.1.0"
