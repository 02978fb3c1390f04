"""Answers of a hub's API: JSON that a stranger wrote, never read beyond a limit."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any
from urllib.parse import quote

from mergelab.errors import UserError
from mergelab.hub_errors import hub_url

MAX_ANSWER = 16_000_000  # bytes, of a list all pages; a repository of 10,000 files takes 3 million
MAX_ERROR = 1 << 16  # bytes of an error's text
PATIENCE = 30.0  # seconds without a byte
GZIP = zlib.MAX_WBITS | 16  # what zlib calls gzip


class TooLong(UserError):
    """An answer, or a list in pages, has more than MAX_ANSWER bytes."""


def client() -> Any:
    """The hub client for HF_ENDPOINT, without telemetry and its own bars."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    return HfApi(
        endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None, library_name="mergelab"
    )


def address(repo: str, kind: str = "model") -> str:
    """Where the API tells of a model or dataset; raises the client's error if it is no name."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    validate_repo_id(repo)
    return f"{client().endpoint}/api/{kind}s/{repo}"


def info(repo: str, revision: str | None, kind: str = "model") -> Any:
    """What the hub says of a commit and its files, as JSON that is not looked at yet."""
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    start = f"{address(repo, kind)}{at}"
    return json.loads(_read(start, MAX_ANSWER, start, {"blobs": "true"})[0])


def listed(start: str, most: int, **params: str) -> list[Any]:
    """The entries of a list that the hub sends in pages, up to the page on which they are `most`.

    The next page is where the hub says, if that is below its own /api/: a renamed repository's
    is under the new name. Raises what _read raises, ValueError for what is no JSON."""
    found: list[Any] = []
    data, place = _read(start, MAX_ANSWER, start, params)
    room = MAX_ANSWER - len(data)
    while page := json.loads(data):
        found += page
        if len(found) >= most or not place.startswith(f"{client().endpoint}/api/"):
            break
        data, place = _read(place, room, start, {})
        room -= len(data)
    return found


def _read(place: str, room: int, start: str, params: dict[str, str]) -> tuple[bytes, str]:
    """An answer's bytes, at most `room`, and the address of its next page or nothing.

    By way of the client's session, which would unpack a thousand times the bytes before we see
    them: what comes packed though nobody asked for it is unpacked here. Raises the client's errors,
    ValueError, TooLong (which names `start`, for the address of a page is a server's text)."""
    from huggingface_hub import utils

    tools: Any = utils  # public functions, which the module does not declare as such
    headers = {**tools.build_hf_headers(library_name="mergelab"), "Accept-Encoding": "identity"}
    options = {"params": params or None, "headers": headers, "timeout": PATIENCE}
    data = bytearray()
    with tools.get_session().stream("GET", place, **options) as answer:
        refuse_errors(answer)
        packing = answer.headers.get("Content-Encoding", "identity").lower()
        if packing not in ("identity", "gzip"):
            raise ValueError(f"an answer packed by {packing}")
        unpacker = zlib.decompressobj(GZIP)
        for piece in answer.iter_raw():
            if packing == "gzip":
                piece = _unpacked(unpacker, piece, room + 1 - len(data))
            data += piece
            if len(data) > room:
                raise TooLong(
                    f"{start.partition('/api/')[2]}: {hub_url()} answers with more than "
                    f"{MAX_ANSWER:,} bytes where files or commits should be listed. Check "
                    "HF_ENDPOINT; if it is right, take a repository of fewer files."
                )
        return bytes(data), answer.links.get("next", {}).get("url", "")


def _unpacked(unpacker: Any, piece: bytes, most: int) -> bytes:
    """At most so many bytes of a packed piece; ValueError if it is damaged."""
    try:
        return bytes(unpacker.decompress(piece, most))
    except zlib.error as error:
        raise ValueError(str(error)) from None


def refuse_errors(answer: Any) -> None:
    """Raise what the client raises for a status code, whatever the server says beside it (C8)."""
    from huggingface_hub import hf_raise_for_status

    if not answer.is_success:
        next(answer.iter_raw(MAX_ERROR), b"")  # else the client reads all of it
    hf_raise_for_status(answer)
