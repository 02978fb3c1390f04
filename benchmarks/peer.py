"""mergekit 0.1.5, the peer, in a virtual environment of its own: made once, then reused.

mergekit is LGPL and is only run, never imported by mergelab. `merge` hands a list of recipes to one
process of the peer, which carries them out through its public `run_merge`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
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
torch.set_num_threads(1)
options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
for recipe, out in json.load(sys.stdin):
    with open(recipe) as stream:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(stream)), out, options)
capability = torch.backends.cpu.get_cpu_capability()
print(json.dumps({"torch": torch.__version__, "capability": capability}))
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
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "-c", str(constraints), f"mergekit=={MERGEKIT}"], check=True)
    (folder / DONE).write_text(json.dumps(wanted))
    return python


def merge(
    python: Path, jobs: Sequence[tuple[Path, Path]], **environ: str
) -> Mapping[str, Any]:
    """Carry out (recipe, output folder) pairs with the peer, one thread; its torch and CPU kernels.

    `environ` is added to the environment, such as ATEN_CPU_CAPABILITY='default'. Raises
    RuntimeError with the end of the peer's log if it fails."""
    text = json.dumps([[str(recipe), str(out)] for recipe, out in jobs])
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    settings = {**os.environ, **fixed, **environ}
    run = subprocess.run(
        [str(python), "-W", "ignore", "-c", DRIVER],
        input=text,
        env=settings,
        text=True,
        capture_output=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"mergekit failed:\n{run.stderr[-3000:]}")
    found: Mapping[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def folder_key(text: str) -> str:
    """A short name for scratch folders."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
