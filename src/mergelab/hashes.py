"""sha256 of input files, remembered as long as a file is the same to the file system.

A remembered hash counts while inode, size, and the times of change of content and of inode agree
(not the device: the nodes of a cluster number a shared disk differently); a file that changed just
before it was hashed is hashed again, as git does."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mergelab.folders import cache_folder
from mergelab.record import digest, file_sha256

RECENT = 2e9  # nanoseconds; clocks of file systems are coarse

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def identity(path: Path) -> list[int]:
    """What changes when anyone writes to the file."""
    facts = os.stat(path)
    return [facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """sha256 of a file, from memory if it has not changed since it was hashed.

    `advance` is told the bytes as they are done with."""
    before = identity(path)
    place = cache_folder("hashes") / f"{digest(str(path.resolve()))[:32]}.json"
    with suppress(*UNREADABLE):
        held = json.loads(place.read_bytes())
        if held["identity"] == before and len(held["sha256"]) == 64:
            if advance:
                advance(before[1])
            return str(held["sha256"])
    started = time.time_ns()
    found = file_sha256(path, advance)
    settled = started - max(before[2], before[3]) > RECENT
    if settled and identity(path) == before:
        with suppress(OSError):  # a cache that cannot be written is no reason to stop
            _keep(place, json.dumps({"identity": before, "sha256": found}))
    return found


def noted(folder: Path) -> dict[str, str]:
    """sha256 by file name, as the record of a download or merge in `folder` has it; {} without."""
    with suppress(*UNREADABLE):
        files = json.loads((folder / "source.json").read_bytes())["files"]
        return {str(name): str(facts["sha256"]) for name, facts in files.items()}
    with suppress(*UNREADABLE):
        files = json.loads((folder / "merge.json").read_bytes())["outputs"]["files"]
        return {str(file["name"]): str(file["sha256"]) for file in files}
    return {}


def _keep(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, place)
