"""Fixtures shared by all tests: quiet threads, small random models, the command line, a hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Whatever the terminal and the proxy; read when a module makes its console or its connection.
os.environ["COLUMNS"] = "80"
os.environ.pop("FORCE_COLOR", None)
os.environ["no_proxy"] = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
os.environ["no_proxy"] = os.environ["NO_PROXY"] = os.environ["no_proxy"] + ",127.0.0.1,localhost"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from hypothesis import HealthCheck, settings
from loopback_hub import LoopbackHub

from mergelab import hub_errors

# The same examples on every machine, however slow.
slow = [HealthCheck.too_slow]
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=slow)
settings.load_profile("same")

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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub, and a client that knows no token and has an empty cache."""
    from huggingface_hub import constants

    with LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(hub_errors, "WAITS", ())
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield server
