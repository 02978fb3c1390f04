"""Hub models for planning: config, tokenizer and headers by range requests, no weights (C1).

The weight files of a sketch have their full length, but only their headers hold data; the rest is
a hole that takes no room on the disk. A header cannot be checked by a hash, for the hash is that
of the whole file: a merge downloads and checks every byte anew and never uses a sketch."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

from mergelab import hub, hub_api
from mergelab.checkpoint import MAX_HEADER, read_header
from mergelab.errors import UserError
from mergelab.folders import alone, building
from mergelab.hub import SOURCE, Pinned
from mergelab.hub_errors import explained, patient
from mergelab.hub_files import COMMIT, HubFile
from mergelab.record import write_json

MARK = "sketch.json"  # a folder with this file holds no weights
FIRST = 1 << 16  # bytes asked for at first: most headers are shorter


def folder_to_plan(pinned: Pinned, out: Path) -> Path:
    """`out`, if the download of this commit is there; else a sketch, made if need be.

    No hash is computed. Raises UserError for what `hub.download` would refuse, and for headers
    that are not sound."""
    sketch = out.parent / ".headers" / out.name
    if _is_whole(pinned, out):
        shutil.rmtree(sketch, ignore_errors=True)
        return out
    if not _is_sketch(pinned, sketch):
        with alone(sketch):
            if not _is_sketch(pinned, sketch):
                _draw(pinned, sketch)
    return sketch


def origin(folder: Path) -> dict[str, Any]:
    """Where a model folder is from: hub, commit, and `download`, the bytes that are not here.

    Empty for a folder that no hub model was fetched into."""
    return _note(folder / MARK) or _note(folder / SOURCE)


def is_sketch(folder: Path) -> bool:
    """Does the folder hold headers only?"""
    return (folder / MARK).exists()


def check_whole(folder: Path) -> None:
    """Raise UserError if the folder is a sketch: its weights are all zeros."""
    if is_sketch(folder):
        raise UserError(
            f"{folder}: holds headers without weights; mergelab plan made it. "
            "Name the model by its hub id."
        )


def _note(path: Path) -> dict[str, Any]:
    """What a note of ours beside a model says, or nothing if it is missing or damaged."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        repo, _ = hub.split(note["hub"])
        commit, download = note["commit"], note.get("download", 0)
        good = COMMIT.match(commit) is not None and type(download) is int
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
        return {}
    return {"hub": repo, "commit": commit, "download": download} if good else {}


def _is_whole(pinned: Pinned, out: Path) -> bool:
    """Does `out` hold this commit's files, judged by their sizes?"""
    files = hub._noted_files(out, pinned)
    return bool(files) and all(_size(out / file.name) == file.size for file in files)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _is_sketch(pinned: Pinned, sketch: Path) -> bool:
    note = _note(sketch / MARK)
    return (note.get("hub"), note.get("commit")) == (pinned.repo, pinned.commit)


def _draw(pinned: Pinned, sketch: Path) -> None:
    """Fetch the small files whole, and of each weight file the header."""
    files = hub._agreed_files(pinned)
    weights = [file for file in files if file.name.endswith(".safetensors")]
    small = [file for file in files if file not in weights]
    with building(sketch, pinned.commit[:12]) as folder:
        with explained(pinned.repo, pinned.commit):
            hub.snapshot(pinned.repo, pinned.commit, [file.name for file in small], folder)
            if wrong := hub.differences(folder, small):
                raise UserError(f"{pinned}: {'; '.join(wrong)}. Run the command again.")
            shutil.rmtree(folder / ".cache", ignore_errors=True)
            hub.in_parallel(lambda file: _outline(pinned, file, folder), weights)
        total = sum(file.size for file in files)
        note = {"hub": pinned.repo, "commit": pinned.commit, "download": total}
        write_json(folder / MARK, note)


def _outline(pinned: Pinned, file: HubFile, folder: Path) -> None:
    """A file of the weight file's length that holds its header and nothing else."""
    path = folder / file.name
    head = _head(pinned, file)
    try:
        with path.open("wb") as stream:
            stream.write(head)
            stream.truncate(file.size)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or "no file can be so long"
        raise UserError(
            f"{pinned}: {file.name} ({file.size:,} bytes) cannot be outlined in {folder.parent}: "
            f"{why}."
        ) from None
    try:
        read_header(path)
    except UserError as error:
        raise UserError(f"{pinned}: {str(error).replace(str(path), file.name)}") from None


def _head(pinned: Pinned, file: HubFile) -> bytes:
    """The first bytes of a file, up to the end of its header if that can fit in the file."""
    data = _first_bytes(pinned, file, min(FIRST, file.size))
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 0 < length <= min(MAX_HEADER, file.size - 8):
        return data[:8]
    if len(data) < 8 + length:
        data = _first_bytes(pinned, file, 8 + length)
    return data[: 8 + length]


def _first_bytes(pinned: Pinned, file: HubFile, count: int) -> bytes:
    """The first `count` bytes of a file; a server that sends it whole is cut off after them."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if count == 0:
        return b""
    endpoint = hub_api.client().endpoint
    url = hf_hub_url(pinned.repo, file.name, revision=pinned.commit, endpoint=endpoint)
    headers = {
        **build_hf_headers(library_name="mergelab"),
        "Range": f"bytes=0-{count - 1}",
        "Accept-Encoding": "identity",
    }

    def read() -> bytes:
        data = bytearray()
        with get_session().stream("GET", url, headers=headers, timeout=hub_api.PATIENCE) as answer:
            hub_api.refuse_errors(answer)
            for piece in answer.iter_raw(FIRST):
                data += piece
                if len(data) >= count:
                    break
        return bytes(data[:count])

    return patient(read)
