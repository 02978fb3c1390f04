"""What a person sees while a verb works: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
PATIENCE = 0.5  # seconds that work may take without a bar
FIRST, LONGEST = 10.0, 600.0  # seconds to a log's first line, and most between two of them
BYTES = "bytes"


class Stopped(Exception):
    """The work that a thread took part in has ended; so does the thread."""


class Bar:
    """Progress of one piece of work, in units such as bytes; any thread may move it on.

    Once the work has ended, be it by an error or Ctrl-C, whoever still moves it on is `Stopped`.

    A log gets its lines after 10 s, 20 s, 40 s, ...: few, however long it takes."""

    def __init__(self, what: str, total: float, unit: str, progress: Progress | None) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0.0
        self._progress, self._lock = progress, threading.Lock()
        self._task = progress.add_task(what, total=total, unit=unit) if progress else None
        self._started = self._told = time.monotonic()
        self._due, self._before = self._started + FIRST, 0.0
        self._ended = False

    def end(self) -> None:
        """Nobody is to go on with the work."""
        self._ended = True

    def check(self) -> None:
        """Raise Stopped if the work has ended: for threads to ask before each block."""
        if self._ended:
            raise Stopped

    def advance(self, amount: float = 1) -> None:
        """Move on by `amount` units."""
        self.check()
        with self._lock:
            self.reach(self.done + amount)

    def reach(self, done: float) -> None:
        """Move to `done` units in all."""
        self.done, now = done, time.monotonic()
        if self._progress and self._task is not None:
            if now - self._started > PATIENCE:
                self._progress.start()
            self._progress.update(self._task, completed=done)
        elif now >= self._due:
            self._tell(now)

    def _tell(self, now: float) -> None:
        """A line for a log; its speed is that since the line before."""
        speed = (self.done - self._before) / (now - self._told)
        say(f"{self.what}: {told(self.done, self.total, self.unit, speed)}")
        self._told, self._before = now, self.done
        self._due = now + min(LONGEST, now - self._started)


class _Amount(ProgressColumn):
    """How much, how fast, how long still."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        return Text(told(task.completed, task.total or 0, task.fields["unit"], speed))


@contextmanager
def bar(what: str, total: float, unit: str = BYTES) -> Iterator[Bar]:
    """Show how far `total` units of work are: one line with amount, speed and time left."""
    columns = (TextColumn("{task.description}"), BarColumn(20), _Amount())
    progress = Progress(*columns, console=console) if sys.stderr.isatty() else None
    shown = Bar(what, total, unit, progress)
    try:
        yield shown
    finally:
        shown.end()
        if progress:
            progress.stop()


@contextmanager
def arriving(what: str, folder: Path, total: float) -> Iterator[None]:
    """Show how many of `total` bytes have come into a folder; somebody else puts them there."""
    before, over = _held(folder), threading.Event()
    with bar(what, total) as shown:

        def look() -> None:
            while not over.is_set():
                over.wait(1)
                shown.reach(min(total, max(shown.done, _held(folder) - before)))

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def _held(folder: Path) -> int:
    """Bytes of a folder's files; those that vanish meanwhile do not count."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return found


def told(done: float, total: float, unit: str, speed: float) -> str:
    """'1.5 GB of 2 GB (75 %), 100 MB/s, 0:00:05 left', or the same of other units."""
    share = f" ({100 * done / total:.0f} %)" if total else ""
    if unit == BYTES:
        text, rate = f"{size(done)} of {size(total)}{share}", f"{size(speed)}/s"
    else:
        text, rate = f"{done:,.0f} of {total:,.0f} {unit}{share}", f"{speed:.3g}/s"
    if speed <= 0:
        return text
    left = timedelta(seconds=round(max(0.0, total - done) / speed))
    return f"{text}, {rate}, {left} left"


def size(count: float) -> str:
    """Bytes for people: '1.23 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def printable(text: str) -> str:
    """A stranger's text without what steers a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def say(text: str, style: str = "") -> None:
    """Print lines for people, on stderr."""
    console.print(printable(text), style=style, markup=False)
