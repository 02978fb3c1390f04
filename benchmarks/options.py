"""What the benchmarks beside the peer have in common: their options, and where the numbers go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peer


def parsed(about: str | None, quick: str) -> argparse.Namespace:
    """The options `quick`, `json` and `venv`, and `python`, the peer's, whose environment is made
    if it is not there; `about` is for --help, `quick` says what is left out."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--venv", type=Path, metavar="DIR", default=peer.default_folder(),
                        help="where the peer's environment is, or will be made")  # fmt: skip
    arguments = parser.parse_args()
    arguments.python = peer.environment(arguments.venv.absolute())
    return arguments


def report(page: str, entries: Iterable[dict[str, Any]], file: Path | None) -> None:
    """Print the page; write the numbers to `file`, if one was asked for."""
    sys.stdout.write(page)
    if file:
        file.write_text(json.dumps(list(entries), indent=1) + "\n")
