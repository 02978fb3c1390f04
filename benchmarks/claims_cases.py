"""One model of the claims benchmark: its scores in four kinds of runs, and claims about them.

Run as a program: model, folder of the benchmark, file for the answers, number of items. What other
people would have published is what lm-eval gives here in another dtype or batch size; what is
false is planted. Both are audited as the product does it: rescore, then judge."""

from __future__ import annotations

import json
import logging
import math
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mergelab import datasets, inference, scores, task_data, training
from mergelab.audit.measured import Measured
from mergelab.audit.noise import measure
from mergelab.audit.rescore import measured, rescore
from mergelab.audit.verdicts import judge
from mergelab.chat import TEMPLATES
from mergelab.claims.base import Claim
from mergelab.study import Study
from mergelab.study_file import load_study

STUDY = Path(__file__).parent / "claims"
RUNS = ("float32", "bfloat16", "bfloat16, batch 1")  # batches change nothing in float32
Scores = dict[tuple[str, str], Measured]  # by task and metric
WITH_EXAMPLES = ("arc_easy", "openbookqa", "winogrande")  # whose train split is in a wheel
RAISED = 0.03
LIMITED = "honest, of a part"
PARTS = 4  # a limited run sees one in so many of the items
GAP = 0.02  # a wrong label is planted where it changes the score by this much


@dataclass(frozen=True)
class Case:
    """A claim and what the audit said. `kind`: honest, or what is false; `right`: so it should."""

    model: str
    kind: str
    ours: str
    theirs: str
    task: str
    metric: str
    printed: str
    value: float
    verdict: str
    explained_by: dict[str, Any] | None
    half: float
    change: float
    right: bool

    @property
    def told(self) -> bool:
        """Is what is false more than the interval is wide? Else nobody could tell."""
        return self.kind in ("honest", LIMITED) or self.change >= 2 * self.half


def make(study: Study, name: str, place: Path) -> Path:
    """Train a model, unless it is there. Returns its folder."""
    out, plan = place / "models" / name, study.models[name].train
    if not out.is_dir() and plan is not None:
        used = {share.part.partition("/")[0] for share in plan.data}
        own = {key: value for key, value in study.datasets.items() if key in used}
        datasets.prepare(replace(study, datasets=own), place / "data")
        training.train(study, name, out, place)
    return out


def cast(source: Path, out: Path, dtype: str) -> Path:
    """The same model in another dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    if not out.is_dir():
        network = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
        network.save_pretrained(out)
    return out


def score(study: Study, name: str, folder: Path, place: Path, run: str) -> Scores:
    """What a run gives, by task and metric, in a folder of its own."""
    results = place / run.replace(", ", "-").replace(" ", "")
    results.mkdir(parents=True, exist_ok=True)
    if not (results / "data").exists():
        (results / "data").symlink_to(place.parent / "data")
    usual = inference.batch_size
    if run.endswith("batch 1"):
        inference.batch_size = lambda *_: 1
    try:
        scores.evaluate(study, name, folder, results)
    finally:
        inference.batch_size = usual
    each = [measured(study, results, name, bench.name) for bench in study.suite]
    return {(one.task, one.metric): one for found in each for one in found}


def about(model: str, task: str, value: float, digits: int, **more: Any) -> Claim:
    """A claim, printed as a percentage."""
    printed = f"{100 * value:.{digits}f}"
    facts = {"model": model, "percent": True, "source": "benchmark", "published": task, **more}
    return Claim(benchmark=task, value=float(printed) / 100, printed=printed, **facts)


def honest(name: str, runs: dict[str, Scores], ours: str) -> Iterator[tuple[str, Claim]]:
    """What the other runs gave, rounded to one or two digits; half of them tell their dtype."""
    for number, (theirs, found) in enumerate((r, f) for r, f in runs.items() if r != ours):
        for place, one in enumerate(found.values()):
            said: dict[str, Any] = {"metric": one.metric, "shots": 0, "split": one.split}
            said |= {"dtype": one.dtype} if number % 2 else {}
            yield theirs, about(name, one.task, one.value, 1 + (place + number) % 2, **said)


def limited(name: str, found: Scores) -> Iterator[Claim]:
    """Scores of a run on the first items only, these named as results files or tables do."""
    for place, one in enumerate(found.values()):
        split = one.split if place % 2 else f"[{one.split.partition('[')[2]}"
        yield about(name, one.task, one.value, 2, metric=one.metric, shots=0, split=split)


def planted(name: str, found: Scores) -> Iterator[tuple[str, Claim]]:
    """Scores of another run raised by three points, and acc_norm called acc."""
    for (task, metric), one in found.items():
        said = {"metric": metric, "shots": 0, "split": one.split}
        hits = (one.hits or 0) + math.ceil(RAISED * one.n)
        yield "raised by 3 points", about(name, task, hits / one.n, 2, **said)
        plain = found.get((task, "acc"))
        if metric == "acc_norm" and plain is not None and abs(plain.value - one.value) >= GAP:
            yield "acc_norm called acc", about(name, task, one.value, 2, **said | {"metric": "acc"})


def audit(
    claims: list[tuple[str, str, Claim]], folder: Path, work: Path, study: Study, ours: str
) -> Iterator[Case]:
    """Judge (kind, theirs, claim) as the product does."""
    told = rescore(claims[0][2].model, folder, [claim for *_, claim in claims], work, study)
    for kind, theirs, claim in claims:
        readings = told[claim.benchmark]
        found = judge(claim, readings.measured, readings.why_not)
        assert found.ours is not None
        low, high = found.ours["ci95"]
        explained = found.explained_by or {}
        right = {
            "honest": found.verdict in ("reproduced", "consistent"),
            LIMITED: found.verdict not in ("not reproduced", "impossible"),
            "raised by 3 points": found.verdict in ("not reproduced", "impossible"),
            "acc_norm called acc": explained == {"metric": "acc_norm"},
            "wrong number of shots": "shots" in explained,
            "chat template denied": explained == {"chat_template": True},
        }[kind]
        about = (claim.model, kind, ours, theirs, claim.benchmark, str(claim.metric), claim.printed)
        said = (found.ours["value"], found.verdict, found.explained_by, (high - low) / 2)
        change = RAISED if kind.startswith("raised") else abs(found.difference or 0.0)
        yield Case(*about, *said, change, right)


def shots(name: str, told: dict[str, tuple[Measured, ...]]) -> Iterator[Claim]:
    """The score with 5 examples called that without, and the other way round."""
    for task, found in told.items():
        by = {(one.metric, one.shots): one for one in found}
        for (metric, count), one in by.items():
            other = by.get((metric, 5 - count))
            if other is not None and abs(one.value - other.value) >= GAP:
                yield about(
                    name, task, one.value, 2, metric=metric, shots=5 - count, split=one.split
                )


def with_template(source: Path, out: Path) -> Path:
    """The same model with a chat template."""
    if not out.is_dir():
        shutil.copytree(source, out)
        (out / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    return out


def chats(
    name: str, chat: Scores, plain: dict[str, tuple[Measured, ...]]
) -> Iterator[tuple[str, str, Claim]]:
    """Scores with the chat template that are said to be without, where no score without, of any
    metric and number of shots, is near."""
    for (task, metric), one in chat.items():
        if all(abs(one.value - other.value) >= GAP for other in plain[task]):
            said = {"metric": metric, "shots": 0, "split": one.split, "chat_template": False}
            yield "chat template denied", "float32", about(name, task, one.value, 2, **said)


def run(name: str, place: Path, items: int) -> dict[str, Any]:
    """Every case of one model."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    study = load_study(STUDY)
    study = replace(study, suite=tuple(replace(bench, limit=items) for bench in study.suite))
    with inference.quiet(offline=True):
        source = make(study, name, place)
        folders = {d: cast(source, place / name / f"{d}-model", d) for d in ("float32", "bfloat16")}
        c = measure(folders["float32"])
    task_data.prepare(study, place)
    runs = {r: score(study, name, folders[r.partition(",")[0]], place / name, r) for r in RUNS}
    cases: list[Case] = []
    for ours in folders:
        work = place / name / ours
        claims = [("honest", theirs, claim) for theirs, claim in honest(name, runs, ours)]
        cases += audit(claims, folders[ours], work, study, ours)
    fewer = tuple(replace(bench, limit=items // PARTS) for bench in study.suite)
    part = score(replace(study, suite=fewer), name, folders["bfloat16"], place / name, "part")
    work = place / name / "float32"
    claims = [(LIMITED, "bfloat16", claim) for claim in limited(name, part)]
    cases += audit(claims, folders["float32"], work, study, "float32")
    false = [(kind, "bfloat16", claim) for kind, claim in planted(name, runs["bfloat16"])]
    told = _with_examples(name, folders["float32"], work, study)
    false += [("wrong number of shots", "float32", claim) for claim in shots(name, told)]
    cases += audit(false, folders["float32"], work, study, "float32")
    chatty = with_template(folders["float32"], place / name / "chat-model")
    found = score(_as_chats(study), name, chatty, place / name, "chat")
    if denied := list(chats(name, found, told)):
        cases += audit(denied, chatty, work, study, "float32")
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = used.ru_utime + used.ru_stime
    return {"model": name, "c": c, "cpu": spent, "cases": [asdict(case) for case in cases]}


def _with_examples(
    name: str, folder: Path, work: Path, study: Study
) -> dict[str, tuple[Measured, ...]]:
    """By task, what it gives without examples and with 5, where both can be run."""
    asked = [about(name, task, 0.5, 1, shots=count) for task in WITH_EXAMPLES for count in (0, 5)]
    told = rescore(name, folder, asked, work, study)
    return {task: readings.measured for task, readings in told.items()}


def _as_chats(study: Study) -> Study:
    """The study with the chat template, of the tasks that are run with examples, too."""
    own = (bench for bench in study.suite if bench.name in WITH_EXAMPLES)
    return replace(study, suite=tuple(replace(bench, chat_template=True) for bench in own))


if __name__ == "__main__":
    out = Path(sys.argv[3])
    out.write_text(json.dumps(run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[4]))))
