"""Answers of a hub's API: JSON that a stranger wrote, never read beyond a limit."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import quote

from mergelab.errors import UserError
from mergelab.hub_errors import hub_url

MAX_ANSWER = 16_000_000  # bytes, unpacked; a repository of 10,000 files takes 3 million
MAX_ERROR = 1 << 16  # bytes of an error's text
PATIENCE = 30.0  # seconds without a byte


class TooLong(UserError):
    """An answer has more than MAX_ANSWER bytes."""


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
    return get(f"{address(repo, kind)}{at}", blobs="true")[0]


def get(address: str, **params: str) -> tuple[Any, str]:
    """JSON of the hub, and the address of its next page or nothing, by way of the client's session.

    Raises the client's errors, ValueError if the answer is no JSON, and TooLong."""
    from huggingface_hub import utils

    tools: Any = utils  # public functions, which the module does not declare as such
    headers = tools.build_hf_headers(library_name="mergelab")
    options = {"params": params or None, "headers": headers, "timeout": PATIENCE}
    data = bytearray()
    with tools.get_session().stream("GET", address, **options) as answer:
        refuse_errors(answer)
        for piece in answer.iter_bytes():
            data += piece
            if len(data) > MAX_ANSWER:
                raise TooLong(
                    f"{address.partition('/api/')[2]}: {hub_url()} answers with more than "
                    f"{MAX_ANSWER:,} bytes where files or commits should be listed. Check "
                    "HF_ENDPOINT; if it is right, take a repository of fewer files."
                )
        return json.loads(data), answer.links.get("next", {}).get("url", "")


def refuse_errors(answer: Any) -> None:
    """Raise what the client raises for a status code, whatever the server says beside it (C8)."""
    from huggingface_hub import hf_raise_for_status

    if not answer.is_success:
        next(answer.iter_raw(MAX_ERROR), b"")  # else the client reads all of it
    hf_raise_for_status(answer)
