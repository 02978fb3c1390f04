"""What the hub client's exceptions mean to a user, and what to do next.

Written from status codes and our own names only: a server's text is untrusted, and an address may
hold a password."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from mergelab.errors import UserError
from mergelab.progress import say

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between tries, unless the hub says how long
LONGEST_WAIT = 300.0
LOGIN = "hf auth login"
AGAIN = "Nothing was written; run the command again later."
_SPEAKING = threading.Lock()  # held by the one of several waiting threads that said so


def hub_url() -> str:
    """The hub's address without user name and password."""
    parts = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def no_hub(repo: str) -> UserError:
    """What is said of an answer about `repo` that is no hub's."""
    return UserError(f"{repo}: {hub_url()} does not answer like a hub. Check HF_ENDPOINT.")


@contextmanager
def explained(repo: str, revision: str | None, kind: str = "model") -> Iterator[None]:
    """Turn what the hub client raises about `repo` into UserError; let our own faults pass.

    `kind` is "model" or "dataset"."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain = _chain(error)
        text = _refused(chain, repo, kind) or _unreachable(chain, kind)
        if text is None:
            raise
        where = f"{repo}@{revision}" if revision else repo
        raise UserError(f"{where}: {text}") from None


def patient(call: Callable[[], T]) -> T:
    """`call()`, tried again while the hub is busy (HTTP 429 or 5xx) or the connection breaks.

    Waits as long as Retry-After asks. The client itself repeats some requests, not all."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            asked = _pause(_chain(error), wait)
            if asked is None:
                raise
            _wait(asked)
    return call()


def _wait(seconds: float) -> None:
    """Sleep, and say so unless another thread has just said it."""
    speaks = _SPEAKING.acquire(blocking=False)
    try:
        if speaks:
            say(f"the hub is busy or the connection broke: next try in {seconds:g} s")
        time.sleep(seconds)
    finally:
        if speaks:
            _SPEAKING.release()


def _pause(chain: list[BaseException], wait: float) -> float | None:
    """Seconds until the next try; None if another try would end the same way."""
    from huggingface_hub import errors

    answer = _first(chain, errors.HfHubHTTPError)
    if answer is not None:
        status, asked = answer.response.status_code, answer.response.headers.get("Retry-After", "")
        if status != 429 and status < 500:
            return None
        return min(float(asked), LONGEST_WAIT) if asked.isdigit() else wait
    transport = errors.HfHubHTTPError.__bases__[0]
    cut = _first(chain, transport) or "Consistency check failed" in str(chain[0])
    refused = any(type(error).__name__ == "ConnectError" for error in chain)
    return wait if cut and not refused else None


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and the errors that caused it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain


def _first(chain: list[BaseException], kind: type[BaseException]) -> Any:
    return next((error for error in chain if isinstance(error, kind)), None)


def _refused(chain: list[BaseException], repo: str, kind: str) -> str | None:
    """The hub answered, but not with the model or dataset."""
    from huggingface_hub import errors

    answer = _first(chain, errors.HfHubHTTPError)
    if answer is None:
        return None
    status = answer.response.status_code
    folder = "datasets/" if kind == "dataset" else ""
    page, code = f"{hub_url()}/{folder}{repo}", f"(HTTP {status})"
    if isinstance(answer, errors.GatedRepoError):
        return (
            f"this {kind} is gated and the hub refused it {code}. "
            f"Accept its licence at {page}, then run: {LOGIN}"
        )
    if isinstance(answer, errors.RevisionNotFoundError):
        return f"the {kind} has no such branch, tag or commit {code}. See {page}/commits/main"
    if isinstance(answer, errors.RemoteEntryNotFoundError):
        lock = "and run mergelab lock again" if kind == "model" else "or check 'files'"
        file = _file_in(str(answer.response.url))
        return f"the hub has no file {file} at this commit {code}. Pin another commit {lock}."
    if isinstance(answer, errors.RepositoryNotFoundError):
        return (
            f"the hub has no such {kind}, or it is private {code}. "
            f"Check the spelling; for a private {kind} run: {LOGIN}"
        )
    return _status(status, page, kind)


def _status(status: int, page: str, kind: str) -> str:
    """The meaning of a bare status code."""
    if status == 401:
        return f"the hub did not accept your login (HTTP 401). Log in again: {LOGIN}"
    if status == 403:
        return (
            f"your login may not read this {kind} (HTTP 403). Ask for access at {page}, "
            f"then log in with a token that may read it: {LOGIN}"
        )
    if status == 429:
        return f"too many requests (HTTP 429). {AGAIN} Logged-in users may ask more often: {LOGIN}"
    return f"{hub_url()} answers with an error (HTTP {status}). {AGAIN}"


def _unreachable(chain: list[BaseException], kind: str) -> str | None:
    """No answer came, or it broke off, or the disk is full."""
    from huggingface_hub import errors

    if _first(chain, errors.OfflineModeIsEnabled):
        return "is not on this machine yet, and HF_HUB_OFFLINE forbids to fetch it. Unset it."
    transport = errors.HfHubHTTPError.__bases__[0]  # HTTPError of whichever httpx the client uses
    broken = _first(chain, transport) or _first(chain, errors.LocalEntryNotFoundError)
    broken = broken or _first(chain, ConnectionError)  # of an upload by Xet
    if broken:
        return (
            f"cannot reach {hub_url()} ({type(broken).__name__}). "
            "Check the network, the proxy and HF_ENDPOINT, then run the command again."
        )
    failed = _first(chain, OSError)
    if failed and failed.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full. Make room, then run the command again."
    if failed and "Consistency check failed" in str(failed):
        return f"a file arrived with another size than {hub_url()} announced. {AGAIN}"
    if _first(chain, errors.HFValidationError):
        return f"is no name of a hub {kind}. Write org/name@<40-hex commit>."
    return None


def _file_in(url: str) -> str:
    match = re.search(r"/resolve/[^/]+/([^?#]+)", url)
    name = unquote(match[1]) if match else "?"
    return name if name.isprintable() else repr(name)
