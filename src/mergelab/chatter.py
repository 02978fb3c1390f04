"""What other libraries say while we work: no bars of theirs, and each warning once."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

from mergelab.progress import say

LIBRARIES = ("lm_eval", "transformers", "datasets")
MOST, LONGEST = 5, 240  # kinds of warnings told of each logger, and characters of each


class _Once(logging.Handler):
    """Says a warning or error when it comes, of each kind (those that differ in nothing but
    numbers) the first in this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: dict[str, set[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        said = f"{record.name}: {_message(record)}"
        text = "".join(c if c.isprintable() else " " for c in said)[:LONGEST]
        kinds, kind = self.told.setdefault(record.name, set()), re.sub(r"\d+", "#", text)
        if kind in kinds or len(kinds) > MOST:
            return
        kinds.add(kind)
        more = len(kinds) > MOST
        say(f"{record.name}: further warnings of it are not shown" if more else text)


_ONCE = _Once()


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # a slip of the library: the arguments do not fit the text
        return record.msg if isinstance(record.msg, str) else "(a message that cannot be shown)"


@contextmanager
def hushed() -> Iterator[None]:
    """Inside, other libraries show no progress bars, and what they warn of is told once in the
    process for each kind of warning. What they raise is not touched."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [_ONCE], False
    try:
        with _without_bars():
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


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
