"""What a report's numbers were made from: sources, hashes, versions; and what is stale."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergelab.hub import split
from mergelab.record import canonical, read_json
from mergelab.study import Model, Study, Training

FILES = [{"name": str, "sha256": str}]
MERGE = {  # merge.json: what the report needs of it
    "recipe": {"text": str, "sha256": str},
    "method": {"name": str, "version": int},
    "inputs": [{"model": str, "files": FILES}],
    "outputs": {"files": FILES, "tensors?": dict},
    "machine?": dict,
    "packages?": dict,
}
LOCK = {"models": {"*": {"commit": str}}}


def read_merges(study: Study, results: Path) -> dict[str, dict[str, Any]]:
    """merge.json of every recipe of the study that was merged."""
    found = {}
    for recipe in study.recipes:
        out = results / "merged" / recipe.stem
        folder, text = shlex.quote(str(out)), f"recipes/{study.name}/{recipe.name}"
        remedy = f"rm -r {folder} && mergelab merge {shlex.quote(text)} -o {folder}"
        found[recipe.stem] = read_json(out / "merge.json", remedy, MERGE)
    return {name: record for name, record in found.items() if record is not None}


def twins(merged: Mapping[str, Any]) -> list[list[str]]:
    """Groups of merges whose tensors all have the same names and bytes."""
    groups: dict[str, list[str]] = {}
    for name, record in merged.items():
        if tensors := record["outputs"].get("tensors"):
            groups.setdefault(canonical(tensors), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def read_records(study: Study, results: Path) -> dict[str, dict[str, Any]]:
    """Every record of a study by its name, as 'evaluate-linear'; its key is left out."""
    found = {}
    for path in sorted((results / "records").glob("*.json")):
        name = path.name.removesuffix(".json").rpartition(".")[0]
        remedy = f"rm {shlex.quote(str(path))} && snakemake --config study={study.name}"
        found[name] = read_json(path, remedy, dict)
    return found


def models(study: Study, records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where each model comes from, how it is pinned, and which weights were scored."""
    remedy = f"rm {shlex.quote(str(study.lock))} && mergelab lock recipes/{study.name}"
    lock = (read_json(study.lock, remedy, LOCK) or {}).get("models", {})
    return [
        {
            "name": model.name,
            **_source(model, study, lock),
            "weights": _weights(scored_files(records, model.name)),
        }
        for model in study.models.values()
    ]


def merges(
    study: Study, merged: Mapping[str, Any], records: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Recipe, method and weights of each merge that was made."""
    rows = []
    for path in study.recipes:
        record = merged.get(path.stem)
        if record is None:
            continue
        rows.append(
            {
                "name": path.stem,
                "recipe": f"recipes/{study.name}/{path.name}",
                "recipe_sha256": record["recipe"]["sha256"],
                "method": record["method"]["name"],
                "version": record["method"]["version"],
                "weights": _weights(_files(record["outputs"]["files"])),
                "inputs": [
                    {"model": given["model"], "weights": _weights(_files(given["files"]))}
                    for given in record["inputs"]
                ],
            }
        )
    return rows


def stale(
    merged: Mapping[str, Any], recipes: Mapping[str, str], records: Mapping[str, Any]
) -> list[str]:
    """Results that no longer belong together, in words."""
    found = []
    for name, record in merged.items():
        if record["recipe"]["text"] != recipes.get(name):
            found.append(f"{name}: its recipe changed after it was merged. Merge it again.")
        made, scored = _files(record["outputs"]["files"]), scored_files(records, name)
        if any(made.get(file, sha256) != sha256 for file, sha256 in scored.items()):
            found.append(f"{name}: its scores are of other weights. Evaluate it again.")
        for given in record["inputs"]:
            now = scored_files(records, str(given["model"]).removeprefix("recipe:"))
            used = _files(given["files"])
            if any(used.get(file, sha256) != sha256 for file, sha256 in now.items()):
                found.append(f"{name}: {given['model']} changed after the merge. Merge it again.")
    return found


def environment(merged: Mapping[str, Any], summaries: Mapping[str, Any]) -> list[dict[str, str]]:
    """Versions and machine of the merges and of the scores; several values mean a mixture."""
    seen: dict[str, list[str]] = {}

    def note(what: str, value: Any) -> None:
        if value is not None and str(value) not in seen.setdefault(what, []):
            seen[what].append(str(value))

    for record in merged.values():
        for what, value in sorted((record.get("machine") or {}).items()):
            note(what, value)
        for what, value in sorted((record.get("packages") or {}).items()):
            note(what, value)
    for summary in summaries.values():
        note("lm-eval", summary.get("lm_eval"))
        note("dtype of scoring", summary.get("dtype"))
    return [{"what": what, "value": ", ".join(values)} for what, values in seen.items()]


def scored_files(records: Mapping[str, Any], variant: str) -> dict[str, str]:
    """sha256 by file name of the weights that were scored, from the record of `evaluate`."""
    for inputs in _dicts(records.get(f"evaluate-{variant}"), "inputs"):
        model = inputs.get("model")
        if isinstance(model, dict):
            return {str(name): str(sha256) for name, sha256 in model.items()}
    return {}


def _dicts(value: Any, key: str) -> Iterator[dict[str, Any]]:
    """Every mapping found under `key`, outermost first."""
    if isinstance(value, dict):
        if isinstance(value.get(key), dict):
            yield value[key]
        for inner in value.values():
            yield from _dicts(inner, key)


def _files(entries: Any) -> dict[str, str]:
    return {str(entry["name"]): str(entry["sha256"]) for entry in entries}


def _weights(files: Mapping[str, str]) -> list[dict[str, str]]:
    names = sorted(name for name in files if name.endswith(".safetensors"))
    return [{"name": name, "sha256": files[name]} for name in names]


def _source(model: Model, study: Study, lock: Mapping[str, Any]) -> dict[str, str]:
    if model.train is not None:
        start = model.train.start
        return {
            "source": f"trained from {start}" if start else "trained from scratch",
            "pin": _training(model.train),
        }
    if model.hub is not None:
        repository, revision = split(model.hub)
        commit = lock.get(model.hub, {}).get("commit", revision)
        return {"source": f"hub: {repository}", "pin": f"commit {commit}"}
    if model.gguf is not None:
        wheel = study.wheels[model.gguf.wheel].requirement if model.gguf.wheel else None
        where = f"{wheel}, {model.gguf.file}" if wheel else str(model.gguf.path)
        return {"source": f"GGUF: {where}", "pin": f"sha256 {model.gguf.sha256}"}
    return {"source": f"local folder: {model.path}", "pin": "local folder: the hashes tell which"}


def _training(train: Training) -> str:
    """Everything that a training run depends on, in one line."""
    shares = [
        f"{share.part}"
        + (f" [{share.skip}:{share.skip + share.items}]" if share.items is not None else "")
        + (f" \N{MULTIPLICATION SIGN}{share.copies}" if share.copies != 1 else "")
        for share in train.data
    ]
    shape = ", ".join(f"{key} {value}" for key, value in (train.architecture or {}).items())
    parts = [
        f"data {' + '.join(shares)}",
        f"{train.epochs} epoch{'s' if train.epochs != 1 else ''}",
        f"learning rate {train.learning_rate:g}",
        f"batch {train.batch_size}",
        f"{train.sequence_length} tokens",
        f"seed {train.seed}",
    ]
    return "; ".join([*parts, shape] if shape else parts)
