"""The models and adapters that went into a merge: where they come from, and their licences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergelab import hub, locate, lockfile
from mergelab.errors import UserError
from mergelab.recipe import load_recipe
from mergelab.study import Study
from mergelab.writer import RECORD

README = "README.md"
OTHER = "other"  # the hub's word for a licence that is none of its list
UNDECIDED = (OTHER, "unknown")  # words for what may be two licences


@dataclass(frozen=True)
class Parent:
    """A model or adapter that went in: its hub repository and commit (or None), its licence.

    `name` is the recipe's for it; `shown` leaves out the folders of this machine."""

    name: str
    repo: str | None
    commit: str | None
    licence: str | None
    shown: str

    @property
    def published(self) -> str:
        """Its name in the published recipe."""
        return f"{self.repo}@{self.commit}" if self.repo else self.shown


def named_parents(
    study: Study, merge: str, record: Mapping[str, Any]
) -> dict[str, tuple[Parent, ...]]:
    """The model, and its adapter if there is one, behind every name of the recipe."""
    recipe = load_recipe(study.folder / f"{merge}.yaml")
    found: dict[str, tuple[Parent, ...]] = {}
    for entry in record["inputs"]:
        name = str(entry["model"])
        pair = [part for part in locate.parts(name, recipe, study) if part]
        found |= {part: (_parent(study, part),) for part in pair if part not in found}
        found[name] = tuple(found[part][0] for part in pair)
    return found


def _parent(study: Study, name: str) -> Parent:
    """What a name stands for, looked up as a merge does (locate.folders)."""
    model = study.models.get(name)
    if model is not None and model.hub is None:
        folder = study.folder / Path(model.path).expanduser() if model.path else None
        return Parent(name, None, None, _declared(folder) if folder else None, name)
    if model is None and name.startswith(locate.PREFIX):
        return Parent(name, None, None, None, name)
    if model is None and (folder := locate.local(name)):
        return Parent(name, None, None, _declared(folder), folder.resolve().name)
    source = model.hub if model else name
    if source is None or not locate.is_hub_id(source):
        return Parent(name, None, None, None, Path(name).name)
    pinned = lockfile.resolve(source, study.lock)
    return Parent(name, pinned.repo, pinned.commit, hub.licence(pinned), name)


def paths_of_this_machine(parents: list[Parent]) -> list[str]:
    """What there is to say about parents that are folders."""
    folders = {p.name: p.shown for p in parents if p.name != p.shown}
    told = ", ".join(f"{name} as {shown}" for name, shown in folders.items())
    why = f"card and recipe name {told}; {RECORD} keeps the paths: read it before you upload"
    return [why] if folders else []


def _declared(folder: Path) -> str | None:
    """The licence in the front matter of a local model's README.md."""
    from huggingface_hub import ModelCard

    card = folder / README
    if not card.is_file():
        return None
    try:
        data = ModelCard(card.read_text("utf-8"), ignore_metadata_errors=True).data
    except (ValueError, UnicodeDecodeError, yaml.YAMLError):
        return None
    licence = data.get("license")
    return licence if isinstance(licence, str) else None


def decide_licence(parents: list[Parent], chosen: str | None) -> tuple[str, list[str]]:
    """The licence of the merge, and what there is to say about it."""
    known = {parent.name: parent.licence for parent in parents}
    told = ", ".join(f"{name}: {licence or 'unknown'}" for name, licence in known.items())
    distinct = {licence for licence in known.values() if licence and licence not in UNDECIDED}
    if distinct == set(known.values()) and len(distinct) == 1:
        one = distinct.pop()
        differs = chosen not in (None, one)
        return chosen or one, [f"the parents' licence is {one}, not {chosen}"] if differs else []
    if chosen is None:
        why = "their licences differ" if len(distinct) > 1 else "not every licence is known"
        raise UserError(
            f"The parents do not decide the licence, {why} ({told}). Read them, then choose one "
            f"that all of them allow with --license, such as --license {OTHER}."
        )
    return chosen, [f"check that the parents' licences allow {chosen} ({told})"]
