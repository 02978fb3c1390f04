"""What a person sees while a verb works: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(stderr=True, soft_wrap=True, highlight=False)


class Bar:
    """One progress bar; `advance` counts units (bytes, items, steps)."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: float = 1) -> None:
        """Move the bar on by `amount` units."""
        self._progress.advance(self._task, amount)


@contextmanager
def bar(what: str, total: float) -> Iterator[Bar]:
    """Show a bar for `total` units of work; silent when stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        yield Bar(progress, progress.add_task(what, total=total))


def size(count: float) -> str:
    """Bytes for people: '1.23 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def say(text: str) -> None:
    """Print one line for people, on stderr."""
    console.print(text, markup=False)
