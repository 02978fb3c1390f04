"""What the model names of a recipe stand for: folders on this machine, fetched if need be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mergelab import hub, hub_headers, lockfile, models
from mergelab.adapters import split_name
from mergelab.errors import Problems, UserError, nearest
from mergelab.recipe import load_recipe
from mergelab.structure import Recipe
from mergelab.study import Study
from mergelab.study_file import load_study

PREFIX = "recipe:"
SUFFIX = ".safetensors"


def study_of(recipe: Path) -> Study | None:
    """The study of the folder that a recipe lies in, if there is one."""
    return load_study(recipe.parent) if (recipe.parent / "study.yaml").is_file() else None


def folders(recipe: Recipe, results: Path, *, weights: bool = True) -> dict[str, Path]:
    """Where every model of a recipe is, and every adapter of a MODEL+ADAPTER, by their names.

    A name is, in this order: `recipe:NAME` (a merge of the same study), a model of study.yaml,
    a local folder or .safetensors file (absolute, or relative to the working directory), a hub id,
    which is downloaded if it is not there. An adapter is a local folder or a hub id.
    Without `weights`, only what a plan needs of hub models is fetched (see hub_headers).
    Raises UserError with every name that stands for nothing."""
    study, problems = study_of(recipe.path), Problems()
    found = {}
    for name in recipe.models:
        try:
            model, adapter = parts(name, recipe, study)
            found[model] = folder(model, recipe, study, results, weights=weights)
            if adapter:
                found[adapter] = _outside(adapter, recipe, results) or _nothing(
                    adapter, recipe, study
                )
        except UserError as error:
            problems.add(str(error))
    problems.raise_if_any()
    return found


def parts(name: str, recipe: Recipe, study: Study | None) -> tuple[str, str | None]:
    """MODEL and ADAPTER of MODEL+ADAPTER; the second is None where the name is all a model's."""

    def known(part: str) -> bool:
        if part.startswith(PREFIX):
            return _source(part, recipe).is_file()
        if part != name and is_hub_id(part):
            return True
        return bool(study and part in study.models) or bool(local(part))

    return split_name(name, known) or (name, None)


def folder(
    name: str, recipe: Recipe, study: Study | None, results: Path, *, weights: bool = True
) -> Path:
    """Where one model is; `results` is the folder of the study's results."""
    if name.startswith(PREFIX):
        return _merge(name, recipe, results)
    if study is not None and name in study.models:
        source = study.models[name].hub
        if source and not weights:
            pinned = lockfile.resolve(source, study.lock)
            return hub_headers.folder_to_plan(pinned, models.folder(study, name, results))
        return models.existing(study, name, results)
    return _outside(name, recipe, results, weights=weights) or _nothing(name, recipe, study)


def _outside(name: str, recipe: Recipe, results: Path, *, weights: bool = True) -> Path | None:
    """A local folder or file, or the folder of a hub id, downloaded if it is not there."""
    if found := local(name):
        return found
    if not is_hub_id(name):
        return None
    pinned = lockfile.resolve(name, recipe.path.parent / "lock.json")
    out = home(pinned, results)
    if not weights:
        return hub_headers.folder_to_plan(pinned, out)
    hub.download(pinned, out)
    return out


def home(pinned: hub.Pinned, results: Path) -> Path:
    """The folder of a hub model that only recipes name."""
    return results / "models" / f"{pinned.repo.replace('/', '--')}--{pinned.commit[:12]}"


def fixed(name: str, recipe: Recipe, study: Study) -> str:
    """What fixes the bytes of a model or adapter that is on this machine or a hub."""
    if found := local(name):
        return models.fingerprint(found)
    if is_hub_id(name):
        return lockfile.resolve(name, study.lock).commit
    return _nothing(name, recipe, study)


def _nothing(name: str, recipe: Recipe, study: Study | None) -> NoReturn:
    raise UserError(
        f"{recipe.path}: model {name}: there is no such folder or .safetensors file (paths start "
        "at the current folder), and it is no hub model (org/name@<40-hex commit>)."
        f"{nearest(name, study.models if study else ())}"
    )


def local(name: str) -> Path | None:
    """The folder or .safetensors file of that name on this machine, if there is one."""
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() or (path.suffix == SUFFIX and path.is_file()) else None
    except (OSError, RuntimeError, ValueError):  # too long, unknown ~user, a null character
        return None


def is_hub_id(name: str) -> bool:
    """Is it org/name, with or without @revision, and not a path?"""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return False
    try:
        hub.split(name)
    except UserError:
        return False
    return True


def hub_ids(recipes: Iterable[Path], study: Study | None) -> tuple[str, ...]:
    """Hub ids that recipes use directly: neither models of the study nor on this machine."""
    each = [direct(load_recipe(path), study) for path in recipes]
    return tuple(dict.fromkeys(hub_id for ids in each for hub_id in ids))


def direct(recipe: Recipe, study: Study | None) -> tuple[str, ...]:
    """Hub ids of models and adapters that a recipe names itself, past study.yaml."""
    known = study.models if study else {}
    pairs = [parts(name, recipe, study) for name in recipe.models]
    named = [n for pair in pairs for n in pair if n and n not in known]
    found = [n for n in named if not n.startswith(PREFIX) and is_hub_id(n) and not local(n)]
    return tuple(dict.fromkeys(found))


def fetch(study: Study, name: str, results: Path) -> dict[str, Any]:
    """Download the hub models that the recipe `name` names itself; what its record says."""
    recipe = load_recipe(study.folder / f"{name}.yaml")
    found = {hub_id: _outside(hub_id, recipe, results) for hub_id in direct(recipe, study)}
    return {"recipe": name, "models": {hub_id: str(folder) for hub_id, folder in found.items()}}


def check(study: Study, results: Path) -> Iterator[tuple[str, list[str]]]:
    """Hub ids that recipes name themselves, with what of their files is not as pinned, in words.

    Asks no hub. Raises UserError if one was never fetched."""
    for hub_id in hub_ids(study.recipes, study):
        pinned = lockfile.resolve(hub_id, study.lock)
        out = home(pinned, results)
        yield hub_id, [f"{out}: {wrong}." for wrong in hub.check(pinned, out)]


def _source(name: str, recipe: Recipe) -> Path:
    """The recipe that recipe:NAME stands for: beside this one."""
    return recipe.path.parent / f"{name.removeprefix(PREFIX)}.yaml"


def _merge(name: str, recipe: Recipe, results: Path) -> Path:
    out, source = results / "merged" / name.removeprefix(PREFIX), _source(name, recipe)
    if not source.is_file():
        names = [path.stem for path in recipe.path.parent.glob("*.yaml")]
        hint = nearest(name.removeprefix(PREFIX), names)
        raise UserError(f"{recipe.path}: there is no recipe {source}.{hint}")
    if not (out / "merge.json").is_file():
        raise UserError(
            f"{recipe.path}: model {name} is not merged yet. Run: mergelab merge {source} -o {out}"
        )
    return out
