"""mergekit 0.1.5, the peer, in a virtual environment of its own: made once, then reused.

mergekit is LGPL: it is run as a program, never imported. One process of the peer stays up and
carries out merges, one after the other, through its public `run_merge`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MERGEKIT = "0.1.5"
PINS = (  # what its numbers and its start-up depend on
    f"mergekit=={MERGEKIT}",
    "torch==2.13.0",
    "transformers==5.23.0",
    "numpy==2.4.6",
    "safetensors==0.8.0",
    "pydantic==2.14.3",
    "peft==0.21.2",
    "accelerate==1.15.0",
)
DONE = "peer.json"  # written last: an environment without it is made anew
DRIVER = """
import json, sys, torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
out = sys.stdout
sys.stdout = sys.stderr
torch.set_num_threads(1)
options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
capability = torch.backends.cpu.get_cpu_capability()
out.write(json.dumps({"torch": torch.__version__, "capability": capability}) + "\\n")
out.flush()
for line in sys.stdin:
    recipe, folder = json.loads(line)
    with open(recipe) as stream:
        config = MergeConfiguration.model_validate(yaml.safe_load(stream))
    run_merge(config, folder, options)
    out.write("done\\n")
    out.flush()
"""


def default_folder() -> Path:
    """Where the environment is kept between runs: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mergelab" / f"mergekit-{MERGEKIT}"


def environment(folder: Path) -> Path:
    """The Python of the peer's environment in `folder`, which is made if it is not there.

    Raises subprocess.CalledProcessError if pip fails."""
    python = folder / "bin" / "python"
    wanted = {"pins": list(PINS), "python": sys.version}
    if (folder / DONE).is_file() and json.loads((folder / DONE).read_text()) == wanted:
        return python
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise SystemExit(f"{folder}: holds something else; choose another folder with --venv.")
    sys.stderr.write(f"making an environment for mergekit {MERGEKIT} in {folder} ...\n")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(PINS) + "\n")
    pip = [str(python), "-m", "pip", "install", "-qq", "--no-compile"]
    subprocess.run([*pip, "-c", str(constraints), f"mergekit=={MERGEKIT}"], check=True)
    (folder / DONE).write_text(json.dumps(wanted))
    return python


def program(python: Path) -> Path:
    """Its command `mergekit-yaml`, for those who measure whole processes."""
    return python.with_name("mergekit-yaml")


class Peer:
    """A running process of mergekit; `facts` names its torch and the CPU kernels in use."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self.facts: dict[str, Any] = json.loads(self._answer())

    def merge(self, recipe: Path, out: Path) -> None:
        """Carry out one recipe. Raises RuntimeError with the end of its log if that fails."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(recipe), str(out)]) + "\n")
        self.process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"mergekit failed:\n{self.log.read_text()[-3000:]}")
        return line


@contextmanager
def started(python: Path, log: Path, **environ: str) -> Iterator[Peer]:
    """Start the peer, one thread; `environ` such as ATEN_CPU_CAPABILITY='default' comes on top."""
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [str(python), "-W", "ignore", "-c", DRIVER],
            env={**os.environ, **fixed, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        yield Peer(process, log)
