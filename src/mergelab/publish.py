"""Publish a merge: model card, recipe and record beside the weights; upload to a hub if asked."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergelab import contamination, hub_api, locate, provenance
from mergelab.card import RECIPE, card
from mergelab.checkpoint import INDEX
from mergelab.comparison import SCORES
from mergelab.errors import UserError, nearest
from mergelab.folders import alone, building
from mergelab.hub_errors import explained
from mergelab.parents import README, Parent, decide_licence, named_parents, paths_of_this_machine
from mergelab.recipe import load_recipe
from mergelab.record import file_sha256, read_json, write_bytes
from mergelab.study import Study
from mergelab.writer import RECORD

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z", re.A)
# keys of mergekit's long form of a model's name
LONG = {"path", "revision", "model", "lora", "override_architecture"}


@dataclass(frozen=True)
class Package:
    """What would be uploaded: `small` files in `folder`, `weights` beside the merge's record."""

    folder: Path
    merged: Path
    small: tuple[str, ...]
    weights: tuple[str, ...]
    licence: str
    notes: tuple[str, ...]


def prepare(study: Study, merge: str, repo: str, results: Path, licence: str | None) -> Package:
    """Write card, recipe and record to results/published/<merge>; nothing leaves the machine.

    Raises UserError for a merge that is not there, whose weights are not those of its record, whose
    scores or findings are of other weights, or for parents whose licences differ or are unknown
    while `licence` is None."""
    if not REPO.match(repo):
        raise UserError(f"--to {repo}: write org/name.")
    merged, record = _merged(study, merge, results)
    named = named_parents(study, merge, record)
    names = load_recipe(study.folder / f"{merge}.yaml").merged  # not who gives the tokenizer only
    parents = list(dict.fromkeys(parent for name in names for parent in named[name]))
    chosen, notes = decide_licence(parents, licence)
    notes += paths_of_this_machine(parents)
    out = results / "published" / merge
    scores, findings = _results_of(study, merge, record, results, notes)
    recipe = _recipe(record, named)
    with alone(out), building(out, "card") as folder:
        shutil.copyfile(merged / RECORD, folder / RECORD)
        write_bytes(folder / RECIPE, recipe.encode())
        text = card(study, merge, repo, record, parents, chosen, scores, findings)
        write_bytes(folder / README, text.encode())
    weights = tuple(entry["name"] for entry in record["outputs"]["files"])
    return Package(out, merged, (README, RECIPE, RECORD), weights, chosen, tuple(notes))


def upload(package: Package, repo: str, *, private: bool) -> str:
    """Create the repository if need be and upload everything in one commit; returns its address.

    Weights that are there and not in the package are deleted: a loader would read them too.
    Raises UserError if the hub refuses; the token comes from HF_TOKEN or the hub's own login."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    places = [(name, package.folder / name) for name in package.small]
    places += [(name, package.merged / name) for name in package.weights]
    client = hub_api.client()
    with explained(repo, None):
        client.create_repo(repo, private=private, exist_ok=True)
        old = {name for name in client.list_repo_files(repo) if _is_weights(name)}
        operations: list[CommitOperationAdd | CommitOperationDelete]
        operations = [CommitOperationAdd(name, str(path)) for name, path in places]
        gone = sorted(old - {name for name, _ in places})
        operations += [CommitOperationDelete(name) for name in gone]
        done = client.create_commit(repo, operations, commit_message="Publish a merge by mergelab")
    return str(done.commit_url)


def _is_weights(name: str) -> bool:
    """Is it a weight file or the index of several, where a loader looks for them?"""
    return name == INDEX or (name.endswith(locate.SUFFIX) and "/" not in name)


def _merged(study: Study, merge: str, results: Path) -> tuple[Path, dict[str, Any]]:
    """The merge's folder and record, its files checked against the record."""
    names = [path.stem for path in study.recipes]
    if merge not in names:
        hint = nearest(merge, names)
        raise UserError(f"{study.folder}: there is no merge '{merge}'.{hint} Only merges publish.")
    record = provenance.read_merges(study, results).get(merge)
    out = results / "merged" / merge
    command = f"mergelab merge {shlex.quote(str(study.folder / merge))}.yaml -o {out}"
    if record is None:
        raise UserError(f"{out}: is not merged yet. Run: {command}")
    for entry in record["outputs"]["files"]:
        path = out / entry["name"]
        if not path.is_file() or file_sha256(path) != entry["sha256"]:
            raise UserError(f"{path}: is not the file of its record. Run: {command}")
    return out, record


def _results_of(
    study: Study, merge: str, record: Mapping[str, Any], results: Path, notes: list[str]
) -> tuple[Mapping[str, Any], list[Any]]:
    """Scores and findings of the merge, each empty if there are none with a record.

    Raises UserError if they are of other weights."""
    records = provenance.read_records(study, results)
    remedy, shape = _again("evaluate", study, merge), contamination.FINDINGS
    scores = read_json(results / "scores" / f"{merge}.json", remedy, SCORES)
    again = _again("detect", study, merge)
    findings = read_json(results / "findings" / f"{merge}.json", again, shape)
    run = f"Run: snakemake --config study={study.name}"
    if not scores:
        notes.append(f"{merge} has no scores: the card names none. {remedy}")
    elif f"evaluate-{merge}" not in records:
        notes.append(f"the scores have no record of their weights: the card names none. {run}")
        scores = None
    elif _of_other_weights(records[f"evaluate-{merge}"], record):
        raise UserError(f"{merge}: its scores are of other weights. {run}")
    if findings and not {f"probe-{merge}", f"detect-{merge}"} <= records.keys():
        notes.append(f"the findings have no record of their weights: the card names none. {run}")
        findings = None
    elif findings and (
        _of_other_weights(records[f"probe-{merge}"], record)
        or _of_other_results(records[f"detect-{merge}"], records)
    ):
        raise UserError(f"{merge}: its findings are of other weights or other evidence. {run}")
    return scores or {}, findings or []


def _of_other_weights(measured: Any, record: Mapping[str, Any]) -> bool:
    """Was a model measured that is not the merge of `record`? Files that only one has are none."""
    made = {entry["name"]: entry["sha256"] for entry in record["outputs"]["files"]}
    seen = measured.get("inputs", {}).get("model", {})
    return any(made.get(name, sha256) != sha256 for name, sha256 in seen.items())


def _of_other_results(detected: Any, records: Mapping[str, Any]) -> bool:
    """Has any evidence or score that findings were made from been made anew since?"""
    folders = {"probe": "evidence", "evaluate": "scores"}
    now = {
        f"{folders[verb]}/{entry['name']}": entry["sha256"]
        for name, record in records.items()
        if (verb := name.partition("-")[0]) in folders
        for entry in record.get("outputs", [])
    }
    used = detected.get("inputs", {})
    return any(now.get(name, sha256) != sha256 for name, sha256 in used.items())


def _recipe(record: Mapping[str, Any], parents: Mapping[str, tuple[Parent, ...]]) -> str:
    """The recipe with hub parents by repository and commit, as mergekit and mergelab read it."""
    recipe = yaml.safe_load(str(record["recipe"]["text"]))
    names = {name: "+".join(p.published for p in several) for name, several in parents.items()}

    def renamed(value: Any, key: str = "") -> Any:
        if key in ("model", "base_model") and isinstance(value, dict) and value.keys() <= LONG:
            value = _short(value)
        if isinstance(value, dict):
            return {k: renamed(v, str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [renamed(v, key) for v in value]
        named = key in ("model", "base_model", "tokenizer_source", "source", "models")
        return names.get(value, value) if named and isinstance(value, str) else value

    return str(yaml.safe_dump(renamed(recipe), sort_keys=False, allow_unicode=True))


def _short(value: Any) -> str:
    """MODEL@REVISION+ADAPTER for mergekit's long form of it, as recipe.py reads it."""
    if not isinstance(value, dict):
        return str(value)
    if "path" in value:
        return f"{value['path']}@{value['revision']}" if value.get("revision") else value["path"]
    lora = value.get("lora")
    return _short(value["model"]) + (f"+{_short(lora)}" if lora else "")


def _again(verb: str, study: Study, name: str) -> str:
    return f"mergelab {verb} {shlex.quote(str(study.folder))} {shlex.quote(name)}"
