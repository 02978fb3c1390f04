"""What a user can mend: one exception that says what is wrong, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 40  # mistakes told at once


class UserError(Exception):
    """A mistake of the user's; the CLI prints it and exits with code 2."""


class NotAvailable(UserError):
    """There is too little evidence for a finding; the text says what is missing."""


class Problems:
    """Collects every mistake of one file or plan, to report them all at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, text: str) -> None:
        """Note one mistake; the same text twice counts once."""
        if text not in self.found:
            self.found.append(text)

    def raise_if_any(self) -> None:
        """Raise UserError with all mistakes, one paragraph each."""
        if self.found:
            more = len(self.found) - MOST
            rest = [f"... and {more} more."] if more > 0 else []
            raise UserError("\n".join([*self.found[:MOST], *rest]))


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' with the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
