"""What the model names of a recipe stand for: folders on this machine, fetched if need be."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mergelab import hub, models
from mergelab.errors import Problems, UserError, nearest
from mergelab.recipe import Recipe, load_recipe
from mergelab.study import Study, load_study

PREFIX = "recipe:"


def study_of(recipe: Path) -> Study | None:
    """The study of the folder that a recipe lies in, if there is one."""
    return load_study(recipe.parent) if (recipe.parent / "study.yaml").is_file() else None


def folders(recipe: Recipe, results: Path) -> dict[str, Path]:
    """The folder of every model of a recipe; hub models are downloaded if they are not there.

    A name is, in this order: `recipe:NAME` (a merge of the same study), a model of study.yaml,
    a local folder (absolute, or relative to the working directory), a hub id.
    Raises UserError with every name that stands for nothing."""
    study, problems = study_of(recipe.path), Problems()
    found = {}
    for name in recipe.models:
        try:
            found[name] = folder(name, recipe, study, results)
        except UserError as error:
            problems.add(str(error))
    problems.raise_if_any()
    return found


def folder(name: str, recipe: Recipe, study: Study | None, results: Path) -> Path:
    """Where one model is; `results` is the folder of the study's results."""
    if name.startswith(PREFIX):
        return _merge(name.removeprefix(PREFIX), recipe, results)
    if study is not None and name in study.models:
        return models.existing(study, name, results)
    local = local_folder(name)
    if local:
        return local
    if "+" in name:
        raise UserError(
            f"{recipe.path}: model {name}: LoRA adapters (model+lora) are not supported yet. "
            "Merge the adapter into its model first (peft: merge_and_unload)."
        )
    if is_hub_id(name):
        pinned = hub.resolve(name, recipe.path.parent / "lock.json")
        out = results / "models" / f"{pinned.repo.replace('/', '--')}--{pinned.commit[:12]}"
        hub.download(pinned, out)
        return out
    known = study.models if study else ()
    raise UserError(
        f"{recipe.path}: model {name}: there is no such folder (paths start at the current "
        f"folder), and it is no hub model (org/name@<40-hex commit>).{nearest(name, known)}"
    )


def local_folder(name: str) -> Path | None:
    """The folder of that name, absolute or relative to the working directory, if there is one."""
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() else None
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
    """Hub ids that recipes use directly: neither models of the study nor local folders."""
    known = study.models if study else {}
    names = [name for path in recipes for name in load_recipe(path).models]
    direct = [n for n in names if n not in known and not n.startswith(PREFIX)]
    return tuple(dict.fromkeys(n for n in direct if is_hub_id(n) and not local_folder(n)))


def _merge(name: str, recipe: Recipe, results: Path) -> Path:
    out = results / "merged" / name
    source = recipe.path.parent / f"{name}.yaml"
    if not source.is_file():
        names = [path.stem for path in recipe.path.parent.glob("*.yaml")]
        raise UserError(f"{recipe.path}: there is no recipe {source}.{nearest(name, names)}")
    if not (out / "merge.json").is_file():
        raise UserError(
            f"{recipe.path}: model {PREFIX}{name} is not merged yet. "
            f"Run: mergelab merge {source} -o {out}"
        )
    return out
