"""Published model cards as text (tests/fixtures/ancestry), put on the loopback hub."""

from __future__ import annotations

import re
from pathlib import Path

from loopback_hub import LoopbackHub

FOLDER = Path(__file__).parent / "fixtures" / "ancestry"
HEAD = re.compile(r"^=== (\S+) (\d{4}-\d\d-\d\d)\n", re.MULTILINE)


def cards(name: str) -> dict[str, tuple[str, str]]:
    """Date and text of each card of a file, by repository."""
    parts = HEAD.split((FOLDER / f"{name}.txt").read_text(encoding="utf-8"))[1:]
    triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {repo: (date, text) for repo, date, text in triples}


def serve(server: LoopbackHub, *names: str) -> list[str]:
    """Publish the cards of files as repositories; returns their names, each once."""
    found = {repo: card for name in names for repo, card in cards(name).items()}
    for repo, (date, text) in found.items():
        server.publish(repo, {"README.md": text.encode()}, date=f"{date}T12:00:00.000Z")
    return list(found)
