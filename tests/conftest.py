"""Fixtures shared by all tests: quiet threads, small random models, the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def mergelab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the real command line in a folder of its own; the test's working directory is it too."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mergelab.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "200", **environment},
            timeout=120,
        )

    return run
