"""An audit of models that lie somewhere: on the hub, or in folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergelab import ancestry, hashes, locate
from mergelab.ancestors import Ancestry
from mergelab.audit.judged import compared, judged
from mergelab.audit.rescore import Readings, rescore
from mergelab.audit.target import Target
from mergelab.audit.verdicts import NO_RUN
from mergelab.audit.weights import FETCH, Store, weigh
from mergelab.checkpoint import open_checkpoint
from mergelab.claims.base import Claim
from mergelab.errors import UserError
from mergelab.inputs import input_files
from mergelab.progress import say
from mergelab.record import packages

NOT_EXAMINED = (
    "The weights were not examined for benchmarks in their training data: that takes the base, the "
    "items and controls, which a study names (docs/study.md, contamination)."
)


NOWHERE = (
    "where this model lies is not known: say it in the claims file (models: {NAME: {at: ...}})."
)


@dataclass(frozen=True)
class Options:
    """How far an audit goes: `fetch` downloads models, `depth` counts generations of ancestors,
    `limit` items per benchmark, `skip` leaves out "weights" or "scores"."""

    fetch: bool = False
    depth: int = ancestry.DEPTH
    limit: int | None = None
    skip: tuple[str, ...] = ()
    workers: int = 1


def of_models(target: Target, out: Path, options: Options) -> dict[str, Any]:
    """An audit of models that lie somewhere: on the hub, or in folders."""
    traced, untraced = _traced(target, options.depth)
    claims, problems = _claimed(target, traced)
    store = Store(out, options.fetch)
    weights, folders = [], {}
    for subject in target.subjects:
        folder = store.target(subject, traced)
        if folder is not None:
            folders[subject.name] = folder
        if "weights" not in options.skip:
            say(f"weights: {subject.name}")
            weights.append(weigh(subject, folder, traced, store, options.workers))
    told: dict[str, dict[str, Readings]] = {}
    for name in dict.fromkeys(claim.model for claim in claims):
        own = [claim for claim in claims if claim.model == name]
        if name in folders and "scores" not in options.skip:
            say(f"scores: {name}")
            told[name] = rescore(
                name, folders[name], own, out, target.study, options.limit, fetch=options.fetch
            )
    lacking = {
        subject.name: f"its weights are not here. {FETCH}"
        for subject in target.subjects
        if subject.name not in folders
    }

    def readings(model: str, benchmark: str) -> Readings:
        known = told.get(model, {}).get(benchmark)
        why = NO_RUN if model in folders else lacking.get(model, NOWHERE)
        return known or Readings(why_not=why)

    models = [_model(subject.name, subject.at, traced) for subject in target.subjects]
    return {
        "target": {"name": target.name, "kind": target.kind, "at": target.at, "models": models},
        "claims": judged(claims, readings, out),
        "comparisons": compared(target, claims, readings),
        "lineage": ancestry.plain(traced),
        "weights": weights,
        "contamination": {"findings": [], "calibration": [], "blind_spots": [NOT_EXAMINED]},
        "policy": [],
        "provenance": {"files": _files(folders), "versions": packages()},
        "warnings": [*untraced, *problems],
    }


def _traced(target: Target, depth: int) -> tuple[Ancestry, list[str]]:
    """The ancestors. Of folders alone, a hub that cannot be asked is no reason to stop: then their
    own cards are all that is known, and it is said why."""
    places = [subject.at for subject in target.subjects]
    try:
        return ancestry.ancestries(places, depth), []
    except UserError as error:
        if depth == 0 or not all(map(locate.local, places)):
            raise
        return ancestry.ancestries(places, 0), [f"The ancestors were not looked up: {error}"]


def _claimed(target: Target, traced: Ancestry) -> tuple[tuple[Claim, ...], list[str]]:
    """The claims of the file; of a model, those of its card, under the model's name here."""
    if target.kind != "model":
        return target.claims, []
    card = traced.nodes[traced.target].card
    if card is None:
        return (), []
    return tuple(replace(claim, model=target.name) for claim in card.claims), list(card.problems)


def _model(name: str, at: str, traced: Ancestry) -> dict[str, Any]:
    node = traced.targets[at]
    return {"name": name, "at": at, "node": node, "commit": traced.nodes[node].commit}


def _files(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The files of weights that were looked at."""
    found = []
    for name, folder in folders.items():
        try:
            paths = input_files(open_checkpoint(folder, name))
        except UserError:
            continue
        found += [
            {
                "model": name,
                "name": path.name,
                "bytes": path.stat().st_size,
                "sha256": hashes.sha256(path),
            }
            for path in paths
        ]
    return found
