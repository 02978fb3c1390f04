"""What other libraries say while we work: no bars of theirs, and each warning once."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

from mergelab.progress import say

LIBRARIES = ("lm_eval", "transformers", "datasets", "huggingface_hub")
MOST, LONGEST = 5, 240  # kinds of warnings that are told, and characters of each


class _Tally(logging.Handler):
    """Counts the warnings and errors of each kind: those that differ in nothing but numbers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        said = f"{record.name}: {record.getMessage()}"
        text = "".join(c if c.isprintable() else " " for c in said)[:LONGEST]
        kind = re.sub(r"\d+", "#", text)
        self.first.setdefault(kind, text)
        self.counts[kind] += 1

    def tell(self) -> None:
        """Say each kind once, by the first of its messages."""
        for kind, text in list(self.first.items())[:MOST]:
            count = self.counts[kind]
            say(text if count == 1 else f"{text} ({count:,} times, with other numbers)")
        if len(self.first) > MOST:
            say(f"... and {len(self.first) - MOST} more kinds of warnings")


@contextmanager
def hushed() -> Iterator[None]:
    """Inside, other libraries show no progress bars; what they warn of is told at the end, each
    kind of warning once, with its count. What they raise is not touched."""
    tally, loggers = _Tally(), [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [tally], False
    try:
        with _without_bars():
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        tally.tell()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Progress bars of tqdm are made disabled, whoever has imported it before."""
    from tqdm import tqdm

    before = tqdm.__init__
    tqdm.__init__ = partialmethod(before, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = before
