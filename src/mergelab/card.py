"""The model card of a published merge, in the hub's own format.

Front matter with base_model, tags, licence and model-index; then what was measured and how, what
the contamination checks found, and how to re-create the weights. It claims nothing that the
study's results do not hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab import contamination, lineage
from mergelab.hub_errors import hub_url
from mergelab.methods import METHODS
from mergelab.parents import Parent
from mergelab.record import digest
from mergelab.study import Study
from mergelab.writer import RECORD

RECIPE = "mergekit_config.yml"


def card(
    study: Study,
    merge: str,
    repo: str,
    record: Mapping[str, Any],
    parents: list[Parent],
    licence: str,
    scores: Mapping[str, Any],
    findings: list[Any],
) -> str:
    """The whole card: front matter, scores, contamination findings, how to make it again."""
    from huggingface_hub import ModelCardData

    bases = list(dict.fromkeys(parent.repo for parent in parents if parent.repo))
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
        f"(sha256 of its canonical JSON: `{digest(record)}`). {_claim(record, parents)}",
        *(f"- `{f['name']}`: sha256 `{f['sha256']}`" for f in record["outputs"]["files"]),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(_joined(lines)) + "\n"


def _claim(record: Mapping[str, Any], parents: list[Parent]) -> str:
    """Whether the published recipe gives the published bytes, and how."""
    seed = f" --seed {record['seed']}" if record.get("seed") else ""
    command = f"`mergelab merge {RECIPE} -o merged{seed}`"
    if lacking := [parent.shown for parent in parents if not parent.repo]:
        return (
            f"The weights cannot be made again from this page alone: {', '.join(lacking)} is in no "
            f"repository that the recipe names. `{RECORD}` has the sha256 of every input. Written:"
        )
    method = METHODS.get(record["method"]["name"])
    if (method is None or method.random) and any(p.name != p.published for p in parents):
        return (
            f"With the parents of the record, {command} draws other random masks than those of "
            "these weights: masks depend on the models' names in the recipe, and the record's "
            "recipe has other names for the same parents. Written:"
        )
    return f"With the parents of the record, {command} gives the same bytes:"


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
            dataset_args={"num_few_shot": entry.get("num_fewshot", 0), **_chat(entry)},
            metric_type=entry["metric"],
            metric_name=entry["metric"],
            metric_value=round(float(entry["value"]), 6),
        )
        for name, entry in scores.get("benchmarks", {}).items()
    ]


def _chat(entry: Mapping[str, Any]) -> dict[str, bool]:
    """Was it scored with the chat template, where the scores say so?"""
    return {"chat_template": True} if entry.get("chat_template") else {}


def _score_lines(scores: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {entry['metric']} | {entry.get('num_fewshot', 0)} | {entry['value']:.4f} | "
        f"{entry['ci95'][0]:.4f} to {entry['ci95'][1]:.4f} | {entry['n']} |"
        for name, entry in scores.get("benchmarks", {}).items()
    ]
    head = ["| benchmark | metric | shots | value | 95 % CI | items |", "| --- " * 6 + "|"]
    about = f"lm-eval {scores.get('lm_eval')}, weights in {scores.get('dtype')}."
    chats = [name for name, entry in scores.get("benchmarks", {}).items() if _chat(entry)]
    about += f" With the chat template: {', '.join(chats)}." if chats else ""
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
    names = [f"[{p.repo}]({hub_url()}/{p.repo})" if p.repo else p.shown for p in parents]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
