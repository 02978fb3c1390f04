"""The weights of an audit: merged again as the recipe says, or read without one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab import hub, locate
from mergelab.ancestors import Ancestry
from mergelab.ancestry import beside
from mergelab.checkpoint import Checkpoint, open_checkpoint
from mergelab.claims.file import Subject
from mergelab.errors import UserError
from mergelab.forensics.infer import infer
from mergelab.forensics.remerge import remerge
from mergelab.hub_files import COMMIT
from mergelab.recipe import load_recipe
from mergelab.record import write_bytes
from mergelab.structure import Recipe

FETCH = "Add --fetch to download what is missing."
NEITHER = (
    "there is neither a recipe nor candidates (of a model: --candidates A B ...; in a claims file: "
    "candidates: [A, B])"
)


@dataclass(frozen=True)
class Store:
    """Where models are: folders of this machine, and what was downloaded below `out`/models.

    Without `fetch`, nothing is downloaded."""

    out: Path
    fetch: bool

    def hub_model(self, repo: str, commit: str | None) -> Path | None:
        """The folder of a hub model at a commit, or None if it is not here."""
        if commit is None:
            return None
        pinned = hub.Pinned(repo, commit)
        folder = locate.home(pinned, self.out)
        if self.fetch:
            hub.download(pinned, folder)
        return folder if folder.is_dir() else None

    def target(self, subject: Subject, ancestry: Ancestry) -> Path | None:
        """The folder of the model that is audited, or None if it is not here."""
        if folder := locate.local(subject.at):
            return folder
        node = ancestry.nodes[ancestry.targets[subject.at]]
        return self.hub_model(node.repo, node.commit)

    def parent(self, name: str, home: Path | None, ancestry: Ancestry) -> Path | None:
        """The folder of a model that a recipe names. `home` is the folder or file that names it;
        None for a page of the hub, which never leads to folders of this machine."""
        if home is not None and (folder := beside(name, home)):
            return folder
        if not locate.is_hub_id(name):
            return None
        repo, revision = hub.split(name)
        commits = [
            node.commit
            for node in ancestry.nodes.values()
            if node.commit and node.repo.casefold() == repo.casefold()
        ]
        pinned = revision if revision and COMMIT.match(revision) else None
        return self.hub_model(repo, pinned or next(iter(commits), None))


def weigh(
    subject: Subject, folder: Path | None, ancestry: Ancestry, store: Store, workers: int = 1
) -> dict[str, Any]:
    """An entry of audit.json's "weights": model, recipe, remerge, infer, and why not.

    `folder`: where the model is, if it is here. A recipe is merged again and compared; where that
    gives something else, or there is none, the weights are read beside the candidates."""
    try:
        return _weigh(subject, folder, ancestry, store, workers)
    except UserError as error:  # quantised, damaged, of another architecture
        return _entry(subject, None) | {"why": str(error)}


def _entry(subject: Subject, text: str | None) -> dict[str, Any]:
    return {"model": subject.name, "recipe": text, "remerge": None, "infer": None, "why": ""}


def _weigh(
    subject: Subject, folder: Path | None, ancestry: Ancestry, store: Store, workers: int
) -> dict[str, Any]:
    card = ancestry.nodes[ancestry.targets[subject.at]].card
    text = subject.recipe.read_text("utf-8") if subject.recipe else card.recipe if card else None
    entry = _entry(subject, text)
    if folder is None:
        return entry | {"why": f"its weights are not here. {FETCH}"}
    model = open_checkpoint(folder, subject.name)
    home = subject.recipe or locate.local(subject.at)
    told = (*subject.candidates, *([subject.base] if subject.base else []))
    places = {name: store.parent(name, Path(), ancestry) for name in told}
    base = subject.base
    if text:
        recipe = _recipe(text, subject.name, store.out)
        if isinstance(recipe, str):
            entry["why"] = recipe
            return entry | (_inferred(model, places, base, workers) if subject.candidates else {})
        parts = [part for name in recipe.models for part in locate.parts(name, recipe, None)]
        named = {name: store.parent(name, home, ancestry) for name in parts if name}
        entry["remerge"] = _remerged(recipe, model, named, workers)
        base = base or recipe.base
        verdict = entry["remerge"]["verdict"]
        if verdict != "different" and not (verdict == "unverifiable" and subject.candidates):
            return entry
        if verdict == "different":
            merged = [locate.parts(name, recipe, None)[0] for name in recipe.merged]
            places = {**{name: named[name] for name in merged}, **places}
    return entry | _inferred(model, places, base, workers)


def _recipe(text: str, name: str, out: Path) -> Recipe | str:
    """The recipe, written to a file of its own; in words, why it cannot be read."""
    path = out / "recipes" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name).strip('-.')}.yaml"
    write_bytes(path, text.encode())
    try:
        return load_recipe(path)
    except UserError as error:
        return f"its recipe cannot be read: {str(error).replace(str(path), 'recipe')}"


def _remerged(
    recipe: Recipe, model: Checkpoint, places: Mapping[str, Path | None], workers: int
) -> dict[str, Any]:
    folders, missing = _found(places)
    if missing:
        why = f"{missing}: not here. {FETCH}"
        return {"verdict": "unverifiable", "why": why, "tensors": [], "worst": [], "notes": []}
    return remerge(recipe, model, folders, workers)


def _inferred(
    model: Checkpoint, places: Mapping[str, Path | None], base: str | None, workers: int
) -> dict[str, Any]:
    folders, missing = _found(places)
    if missing:
        return {"why": f"{missing}: not here. {FETCH}"}
    named = {folders[base]: base} if base in folders else {}  # one name for each folder
    for name, folder in folders.items():
        if not any(folder.samefile(other) for other in named):
            named[folder] = name
    known = {name: open_checkpoint(folder, name) for folder, name in named.items()}
    others = {name: one for name, one in known.items() if name != base}
    if not others:
        return {"why": NEITHER}
    return {"infer": infer(model, others, known.get(base or ""), workers)}


def _found(places: Mapping[str, Path | None]) -> tuple[dict[str, Path], str]:
    """Folders by name, and the names of those that are not here."""
    folders = {name: place for name, place in places.items() if place is not None}
    return folders, ", ".join(name for name, place in places.items() if place is None)
