"""What an audit is of: a model, a claims file, or a study with its results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mergelab import hub_cards, locate
from mergelab.claims.base import Claim
from mergelab.claims.file import Comparison, Subject, load_claims
from mergelab.errors import UserError
from mergelab.study import CLAIMS, Study
from mergelab.study_file import load_study

KINDS = ("model", "claims", "study")


@dataclass(frozen=True)
class Target:
    """Models and what is claimed of them; of a model alone, its card will tell.

    `study` is the one whose results are judged (kind "study") or whose suite and data serve to
    score again (kind "claims")."""

    kind: str
    name: str
    at: str
    subjects: tuple[Subject, ...]
    claims: tuple[Claim, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    study: Study | None = None
    problems: tuple[str, ...] = ()


def read_target(text: str, base: str | None = None, candidates: tuple[str, ...] = ()) -> Target:
    """A claims file (*.yaml), a folder with a study.yaml, a model's folder, or a hub id.

    `base` and `candidates` are what a model without a recipe may have been made of. Raises
    UserError for anything else, where they are given for something else, and for mistakes in a
    claims file or study."""
    path = Path(text).expanduser()
    told = base is not None or candidates
    if told and (path.suffix in (".yaml", ".yml") or (path / "study.yaml").is_file()):
        raise UserError(
            f"{text}: --base and --candidates are for a model. A claims file names them itself "
            "(models: {NAME: {at: ..., base: ..., candidates: [...]}}); a study needs none."
        )
    if path.suffix in (".yaml", ".yml") and path.is_file():
        beside = path.name in (CLAIMS, "study.yaml") and (path.parent / "study.yaml").is_file()
        return _of_study(path.parent) if beside else _of_claims(path)
    if (path / "study.yaml").is_file():
        return _of_study(path)
    if path.is_dir():
        _check_holds(path)
    if path.is_dir() or locate.is_hub_id(text):
        subject = Subject(text, text, None, base, candidates)
        return Target("model", text, text, (subject,))
    raise UserError(
        f"{text}: is no claims file (*.yaml), no folder of a study or a model, and no hub model "
        "(org/name or org/name@commit). Check the name."
    )


def _check_holds(folder: Path) -> None:
    """Raise UserError if there is nothing in a folder that could be audited."""
    page = hub_cards.folder_page(folder)
    told = not isinstance(page, hub_cards.Page) or page.card or page.recipe or page.adapter
    if told or (folder / hub_cards.RECORD).is_file() or any(folder.glob("*.safetensors")):
        return
    raise UserError(
        f"{folder}: there is nothing to audit: it holds neither weights (*.safetensors) nor a card "
        "(README.md) nor a recipe (mergekit_config.yml). Name a folder of a model or of a study, "
        "a claims file (*.yaml), or a hub model (org/name)."
    )


def _of_claims(path: Path) -> Target:
    found = load_claims(path)
    study = load_study(found.study) if found.study else None
    subjects = {**found.models}
    named = [claim.model for claim in found.claims]
    named += [name for order in found.comparisons for name in (order.model, order.than)]
    for name in named:
        if name not in subjects and locate.is_hub_id(name):
            subjects[name] = Subject(name, name)
    return Target(
        "claims",
        found.title,
        str(path),
        tuple(subjects.values()),
        found.claims,
        found.comparisons,
        study,
        found.problems,
    )


def _of_study(folder: Path) -> Target:
    study = load_study(folder)
    target = Target("study", study.title, str(folder), (), study=study)
    if not (folder / CLAIMS).is_file():
        return target
    found = load_claims(folder / CLAIMS)
    return replace(
        target, claims=found.claims, comparisons=found.comparisons, problems=found.problems
    )
