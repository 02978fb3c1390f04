"""Publish a merge: model card, recipe and record beside the weights; upload to a hub if asked.

The card is in the hub's own format (front matter with base_model, tags, licence and model-index).
It says what was measured and how, what the contamination checks found, and how to re-create the
weights; it claims nothing that the study's results do not hold."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergelab import contamination, hub, lineage, provenance
from mergelab.comparison import SCORES
from mergelab.errors import UserError, nearest
from mergelab.folders import alone, building
from mergelab.hub_errors import explained, hub_url
from mergelab.record import digest, file_sha256, read_json, write_bytes
from mergelab.study import Study
from mergelab.writer import RECORD

CARD, RECIPE = "README.md", "mergekit_config.yml"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z", re.A)
OTHER = "other"  # the hub's word for a licence that is none of its list


@dataclass(frozen=True)
class Parent:
    """A model that the recipe names: its hub repository and commit (or None), its licence."""

    name: str
    repo: str | None
    commit: str | None
    licence: str | None


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

    Raises UserError for a merge that is not there, whose weights are not those of its record, or
    for parents whose licences differ or are unknown while `licence` is None."""
    if not REPO.match(repo):
        raise UserError(f"--to {repo}: write org/name.")
    merged, record = _merged(study, merge, results)
    parents = _parents(study, record)
    chosen, notes = _licence(parents, licence)
    out = results / "published" / merge
    scores = read_json(
        results / "scores" / f"{merge}.json", _again("evaluate", study, merge), SCORES
    )
    remedy, shape = _again("detect", study, merge), contamination.FINDINGS
    findings = read_json(results / "findings" / f"{merge}.json", remedy, shape)
    if not scores:
        notes.append(
            f"{merge} has no scores: the card names none. {remedy.replace('detect', 'evaluate')}"
        )
    recipe = _recipe(record, parents)
    with alone(out), building(out, "card") as folder:
        shutil.copyfile(merged / RECORD, folder / RECORD)
        write_bytes(folder / RECIPE, recipe.encode())
        card = _card(study, merge, repo, record, parents, chosen, scores or {}, findings or [])
        write_bytes(folder / CARD, card.encode())
    weights = tuple(entry["name"] for entry in record["outputs"]["files"])
    return Package(out, merged, (CARD, RECIPE, RECORD), weights, chosen, tuple(notes))


def upload(package: Package, repo: str, *, private: bool) -> str:
    """Create the repository if need be and upload everything in one commit; returns its address.

    Raises UserError if the hub refuses; the token comes from HF_TOKEN or the hub's own login."""
    from huggingface_hub import CommitOperationAdd

    places = [(name, package.folder / name) for name in package.small]
    places += [(name, package.merged / name) for name in package.weights]
    client = hub.client()
    with explained(repo, None):
        client.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, str(path)) for name, path in places]
        done = client.create_commit(repo, operations, commit_message="Publish a merge by mergelab")
    return str(done.commit_url)


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


def _parents(study: Study, record: Mapping[str, Any]) -> list[Parent]:
    """The models that went in, as the recipe names them."""
    found = []
    for entry in record["inputs"]:
        name = str(entry["model"])
        model = study.models.get(name)
        source = model.hub if model else name if hub.HUB_ID.match(name) else None
        if source is None:
            folder = study.folder / Path(model.path).expanduser() if model and model.path else None
            found.append(Parent(name, None, None, _declared(folder) if folder else None))
            continue
        pinned = hub.resolve(source, study.lock)
        found.append(Parent(name, pinned.repo, pinned.commit, hub.licence(pinned)))
    return found


def _declared(folder: Path) -> str | None:
    """The licence in the front matter of a local model's README.md."""
    from huggingface_hub import ModelCard

    card = folder / CARD
    if not card.is_file():
        return None
    try:
        data = ModelCard(card.read_text("utf-8"), ignore_metadata_errors=True).data
    except (ValueError, UnicodeDecodeError, yaml.YAMLError):
        return None
    licence = data.get("license")
    return licence if isinstance(licence, str) else None


def _licence(parents: list[Parent], chosen: str | None) -> tuple[str, list[str]]:
    """The licence of the merge, and what there is to say about it."""
    known = {parent.name: parent.licence for parent in parents}
    told = ", ".join(f"{name}: {licence or 'unknown'}" for name, licence in known.items())
    distinct = {licence for licence in known.values() if licence}
    if None not in known.values() and len(distinct) == 1:
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


def _recipe(record: Mapping[str, Any], parents: list[Parent]) -> str:
    """The recipe with hub parents by repository and commit, as mergekit and mergelab read it."""
    text = str(record["recipe"]["text"])
    recipe = yaml.safe_load(text)
    names = {p.name: f"{p.repo}@{p.commit}" for p in parents if p.repo}

    def renamed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: renamed(v, str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [renamed(v, key) for v in value]
        named = key in ("model", "base_model", "tokenizer_source", "source", "models")
        return names.get(value, value) if named and isinstance(value, str) else value

    return str(yaml.safe_dump(renamed(recipe), sort_keys=False, allow_unicode=True))


def _card(
    study: Study,
    merge: str,
    repo: str,
    record: Mapping[str, Any],
    parents: list[Parent],
    licence: str,
    scores: Mapping[str, Any],
    findings: list[Any],
) -> str:
    from huggingface_hub import ModelCardData

    bases = [parent.repo for parent in parents if parent.repo]
    data = ModelCardData(
        license=licence,
        base_model=bases or None,
        library_name="transformers",
        tags=["merge", "mergelab", str(record["method"]["name"])],
        model_name=repo.partition("/")[2],
        eval_results=_results(scores) or None,
    )
    checks = contamination.check_tables(study, *_graph(study, merge, record), {merge: findings})
    lines = [
        f"# {repo.partition('/')[2]}",
        f"A merge by `{record['method']['name']}` of {_named(parents)}, made with mergelab.",
        "## Scores",
        *(_score_lines(scores) or ["Not evaluated."]),
        "## Contamination",
        *(_finding_lines(checks, merge) or ["Not examined: nothing is known about what it saw."]),
        "## Re-create it",
        f"`{RECIPE}` is the recipe, `{RECORD}` the record of inputs and outputs "
        f"(sha256 of its canonical JSON: `{digest(record)}`). With the parents of the record, "
        f"`mergelab merge {RECIPE} -o merged` gives the same bytes:",
        *(f"- `{f['name']}`: sha256 `{f['sha256']}`" for f in record["outputs"]["files"]),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(_joined(lines)) + "\n"


def _joined(lines: list[str]) -> list[str]:
    """Paragraphs; lines of one list or table stay together."""
    found: list[str] = []
    for line in lines:
        if found and line[:2] in ("- ", "| ") and found[-1][:2] == line[:2]:
            found[-1] += f"\n{line}"
        else:
            found.append(line)
    return found


def _results(scores: Mapping[str, Any]) -> list[Any]:
    """model-index entries: each benchmark with its metric and shots."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=entry.get("task", name),
            dataset_name=name,
            dataset_args={"num_few_shot": entry.get("num_fewshot", 0)},
            metric_type=entry["metric"],
            metric_name=entry["metric"],
            metric_value=round(float(entry["value"]), 6),
        )
        for name, entry in scores.get("benchmarks", {}).items()
    ]


def _score_lines(scores: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {entry['metric']} | {entry.get('num_fewshot', 0)} | {entry['value']:.4f} | "
        f"{entry['ci95'][0]:.4f} to {entry['ci95'][1]:.4f} | {entry['n']} |"
        for name, entry in scores.get("benchmarks", {}).items()
    ]
    head = ["| benchmark | metric | shots | value | 95 % CI | items |", "| --- " * 6 + "|"]
    about = f"lm-eval {scores.get('lm_eval')}, weights in {scores.get('dtype')}."
    return [about, *head, *rows] if rows else []


def _finding_lines(checks: list[dict[str, Any]], merge: str) -> list[str]:
    """One line per finding, and what the detectors cannot see."""
    lines, blind = [], []
    for check in checks:
        for detector in check["detectors"]:
            for row in detector["rows"]:
                if row["variant"] == merge and row["effect"] is not None:
                    p = "" if row["p"] is None else f", p {row['p']:.2g}"
                    lines.append(
                        f"- {check['benchmark']}, {detector['name']}: {row['effect_name']} "
                        f"{row['effect']:.3f}{p}: {row['verdict'].partition(':')[0]}"
                    )
                    blind.append(str(detector["blind_spots"]))
    spots = " ".join(dict.fromkeys(blind))
    return [*lines, f"What these checks cannot see: {spots}"] if lines else []


def _graph(
    study: Study, merge: str, record: Mapping[str, Any]
) -> tuple[lineage.Graph, dict[str, str]]:
    texts = {path.stem: path.read_text("utf-8") for path in study.recipes}
    graph = lineage.graph(study, texts | {merge: str(record["recipe"]["text"])})
    return graph, {merge: "merge"}


def _named(parents: list[Parent]) -> str:
    names = [f"[{p.repo}]({hub_url()}/{p.repo})" if p.repo else p.name for p in parents]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _again(verb: str, study: Study, name: str) -> str:
    return f"mergelab {verb} {shlex.quote(str(study.folder))} {shlex.quote(name)}"
