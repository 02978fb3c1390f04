"""What published names of benchmarks mean: lm-eval's tasks, and how leaderboards ran them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

from mergelab.suites import load_suite

LONGEST = 200  # characters of a name
AVERAGE = "average"
BOARDS = ("open_llm_v1", "open_llm_v2")  # suites of the Open LLM Leaderboard
# Task of lm-eval: its published names, compared without case, blanks, signs and parentheses.
NAMES = {
    "arc_challenge": "ARC | ARC-C | ARC Challenge | AI2 Reasoning Challenge | allenai/ai2_arc "
    "| ai2_arc",
    "arc_easy": "ARC-E | ARC Easy",
    "hellaswag": "HellaSwag | Hella Swag | Rowan/hellaswag",
    "mmlu": "MMLU | hendrycksTest | cais/mmlu | Massive Multitask Language Understanding",
    "truthfulqa_mc1": "TruthfulQA mc1",
    "truthfulqa_mc2": "TruthfulQA | TruthfulQA mc2 | TruthfulQA mc | truthful_qa",
    "winogrande": "Winogrande | WinoGrande XL | allenai/winogrande",
    "gsm8k": "GSM8K | GSM-8K | openai/gsm8k | Grade School Math 8K",
    "gsm_plus": "GSM-Plus",
    "gsm8k_platinum": "GSM8K Platinum",
    "ifeval": "IFEval | google/IFEval | HuggingFaceH4/ifeval | wis-k/instruction-following-eval",
    "bbh": "BBH | BIG-Bench Hard | BigBench-Hard | BigBenchHard | SaylorTwift/bbh",
    "hendrycks_math_hard": "MATH Lvl 5 | MATH Level 5 | MATH Hard | lighteval/MATH-Hard "
    "| DigitalLearningGmbH/MATH-lighteval",
    "gpqa": "GPQA | Idavidrein/gpqa",
    "musr": "MuSR | TAUR-Lab/MuSR",
    "mmlu_pro": "MMLU-Pro | TIGER-Lab/MMLU-Pro",
    "medqa_4options": "MedQA | USMLE | MedQA-USMLE | MedQA 4 options | bigbio/med_qa "
    "| GBaker/MedQA-USMLE-4-options",
    "medmcqa": "MedMCQA | openlifescienceai/medmcqa",
    "pubmedqa": "PubMedQA | bigbio/pubmed_qa | qiaojin/PubMedQA",
    "mmlu_anatomy": "MMLU Anatomy | Anatomy",
    "mmlu_clinical_knowledge": "MMLU Clinical Knowledge | Clinical Knowledge | Clinical KG",
    "mmlu_college_biology": "MMLU College Biology | College Biology",
    "mmlu_college_medicine": "MMLU College Medicine | College Medicine",
    "mmlu_medical_genetics": "MMLU Medical Genetics | Medical Genetics",
    "mmlu_professional_medicine": "MMLU Professional Medicine | Professional Medicine "
    "| Pro Medicine | Prof. Medicine",
    "agieval_nous": "AGIEval | AGIEval Nous",
    "gpt4all": "GPT4All | GPT4All suite",  # of the suite nous; no task of lm-eval
    "bigbench": "BigBench | BIG-bench",  # of the suite nous; its old tasks are gone
    "eq_bench": "EQ-Bench | EQ-Bench v2",
    "boolq": "BoolQ | google/boolq",
    "piqa": "PIQA | ybisk/piqa",
    "openbookqa": "OpenBookQA | OBQA | allenai/openbookqa",
    "sciq": "SciQ | allenai/sciq",
    "social_iqa": "SIQA | Social IQA",
    "commonsense_qa": "CommonsenseQA | CSQA",
    "triviaqa": "TriviaQA",
    "nq_open": "Natural Questions | NQ",
    "race": "RACE",
    "copa": "COPA",
    "drop": "DROP",
    "lambada_openai": "LAMBADA | LAMBADA OpenAI",
    "logiqa": "LogiQA",
    "humaneval": "HumanEval | openai_humaneval",
    "mbpp": "MBPP",
    "headqa_en": "HEAD-QA",
    AVERAGE: "Average | Avg | Avg. | Mean | Overall average | Average score",
}
NEWER = {  # of the second leaderboard, whose tasks are others
    "ifeval": "leaderboard_ifeval",
    "bbh": "leaderboard_bbh",
    "hendrycks_math_hard": "leaderboard_math_hard",
    "gpqa": "leaderboard_gpqa",
    "musr": "leaderboard_musr",
    "mmlu_pro": "leaderboard_mmlu_pro",
}
IFEVAL = "prompt_level_strict_acc and inst_level_strict_acc"  # their mean is what is published
_METRICS = {
    "acc": "acc",
    "accuracy": "acc",
    "accnorm": "acc_norm",
    "normalizedaccuracy": "acc_norm",
    "mc1": "acc",  # so called by the tasks truthfulqa_mc1 and _mc2
    "mc2": "acc",
    "em": "exact_match",
    "exactmatch": "exact_match",
    "averagedaccuracy": IFEVAL,
    "instlevelstrictaccandpromptlevelstrictacc": IFEVAL,
    "strictaccuracy": IFEVAL,
}
_SHOTS = re.compile(
    r"(\d{1,3})[ -]?shots?\b|\b(zero|one|few)-?shot\b|shots?[ =:]+(\d{1,3})\b", re.I
)
_PARENTHESES = re.compile(r"[(\[][^()\[\]]{0,80}[)\]]")
_FORM = re.compile(r"[^a-z0-9+]")


@dataclass(frozen=True)
class Meaning:
    """What a published name says: lm-eval's task where `known`, else the name itself."""

    benchmark: str
    known: bool = False
    metric: str | None = None
    filter: str | None = None
    shots: int | None = None
    rescaled: bool = False


def find(published: str, board: str | None = None, metric: str | None = None) -> Meaning:
    """The benchmark behind a published name, with what the name and the leaderboard tell.

    `board` is a suite of the Open LLM Leaderboard, whose metric and shots then hold; `metric` is
    the published one: with mc1 or mc2, TruthfulQA is a task of its own."""
    text = published.strip()[:LONGEST]
    shots = _SHOTS.search(text)
    plain = _PARENTHESES.sub(" ", _SHOTS.sub(" ", text))
    forms = (_form(text), _form(plain), _task(text), _form(plain).removeprefix("hendryckstest"))
    task = next((_known()[form] for form in forms if form in _known()), None)
    if task == "truthfulqa_mc2" and _form(metric or "") == "mc1":
        task = "truthfulqa_mc1"
    if task is None:
        return Meaning(text or "(no name)", shots=_shots(shots))
    inside = [_METRICS.get(_form(part)) for part in _PARENTHESES.findall(text)]
    found = Meaning(task, True, next((name for name in inside if name), None), shots=_shots(shots))
    return _as_run_by(board, found) if board else found


def board_of(text: str, names: tuple[str, ...]) -> str | None:
    """Which Open LLM Leaderboard a heading or an address speaks of, told by its benchmarks."""
    if not re.search(r"open[ _-]llm[ _-]leaderboard", text, re.I):
        return None
    return BOARDS[1] if any(find(name).benchmark in NEWER for name in names) else BOARDS[0]


def metric_of(published: str) -> str | None:
    """lm-eval's name of a metric; one that is not recognised stays as published."""
    text = published.strip()[:LONGEST]
    return _METRICS.get(_form(text), text) or None


def _as_run_by(board: str, found: Meaning) -> Meaning:
    """Metric and shots of the leaderboard's suite; the second one published rescaled scores."""
    newer = board == BOARDS[1]
    task = NEWER.get(found.benchmark, found.benchmark) if newer else found.benchmark
    if task == "leaderboard_ifeval":
        return replace(found, benchmark=task, metric=IFEVAL, shots=0)
    for bench in load_suite(board).benchmarks:
        if bench.name == f"{board}.{task.removeprefix('leaderboard_')}":
            metric, _, kind = str(bench.metric).partition(",")
            return Meaning(task, True, metric, kind or None, bench.num_fewshot, newer)
    return replace(found, benchmark=task, rescaled=newer and task == AVERAGE)


def _shots(match: re.Match[str] | None) -> int | None:
    if match is None or (match[2] or "").lower() == "few":
        return None
    return {"zero": 0, "one": 1}.get((match[2] or "").lower(), int(match[1] or match[3] or 0))


def _task(text: str) -> str:
    """The name inside a leaderboard's key: harness|arc:challenge|25."""
    parts = text.split("|")
    return _form(parts[1]) if len(parts) == 3 else ""


def _form(text: str) -> str:
    return _FORM.sub("", text.lower())


@cache
def _known() -> dict[str, str]:
    """Every name in its compared form, and the task that it stands for."""
    found = {_form(task): task for task in NAMES}
    for task, names in NAMES.items():
        found |= {_form(name): task for name in names.split(" | ")}
    return found | {_form(task): task for task in NEWER.values()}
