"""What does `mergelab evaluate` cost beside lm-eval itself, on the same model and tasks?

Both run as processes from start to end, alternating, one thread, CPU: three tasks (multiple choice,
rolling, generation) of lm-eval on made-up items, and a random Llama. lm-eval is measured twice: as
its command line (which first indexes 14,000 task files) and through the function that this calls,
shown nothing but the three tasks. The target holds against the second, the faster one. Scores must
be equal. Exit code 1 if a target is missed. About 10 minutes; --quick: 2."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TARGET = 1.10  # wall of ours / wall of lm-eval's function
RESULTS = Path(__file__).parent / "results" / "eval_overhead.md"
WORDS = ["train", "travels", "miles", "hours", "patient", "given", "aspirin", "speed", "the", "in"]
SHOTS = {"arc_easy": 0, "wikitext": 0, "gsm8k": 2}
THEIRS = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
model, tasks, folder, batch, out = sys.argv[1:]
found = simple_evaluate("hf", f"pretrained={model},dtype=float32", tasks.split(","),
    batch_size=int(batch), device="cpu", log_samples=True,
    task_manager=TaskManager(include_path=folder, include_defaults=False))
json.dump(found["results"], open(out, "w"))
"""


@dataclass(frozen=True)
class Size:
    """How much is asked, of how large a model."""

    hidden: int
    layers: int
    items: dict[str, int]
    rounds: int


FULL = Size(512, 6, {"arc_easy": 400, "wikitext": 60, "gsm8k": 16}, 3)
QUICK = Size(128, 2, {"arc_easy": 60, "wikitext": 8, "gsm8k": 4}, 1)


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(length))


def item(task: str, i: int) -> dict[str, Any]:
    """One made-up item with the fields that the task reads."""
    if task == "wikitext":
        return {"page": sentence(i, 120)}
    if task == "gsm8k":
        return {"question": sentence(i, 30), "answer": f"{sentence(i, 20)}\n#### {i}"}
    choices = {"text": [sentence(i + k, 4 + k) for k in range(4)], "label": list("ABCD")}
    return {"id": f"a{i}", "question": sentence(i, 20), "choices": choices, "answerKey": "A"}


def prepare(work: Path, size: Size) -> None:
    """Model, study, and the folder of task files that lm-eval is shown."""
    from mergelab import task_files

    _model(work / "model", size)
    study, tasks = work / "recipes/bench", work / "tasks"
    study.mkdir(parents=True)
    tasks.mkdir()
    suite = []
    for task, count in size.items.items():
        data = study / f"{task}.jsonl"
        data.write_text("".join(json.dumps(item(task, i)) + "\n" for i in range(count)))
        suite.append({"task": f"lm_eval/{task}", "data": data.name, "num_fewshot": SHOTS[task]})
        config = {"include": str(task_files.index()[task]), "task": f"bench_{task}"}
        config |= {"num_fewshot": SHOTS[task], "tag": None, "dataset_path": "json"}
        config |= {"dataset_name": None, "training_split": None, "validation_split": None}
        config |= {"test_split": "test", "fewshot_split": "test"}
        config |= {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (tasks / f"{task}.yaml").write_text(yaml.safe_dump(config))
    models = {"base": {"path": str(work / "model")}}
    whole = {"title": "overhead", "models": models, "suite": suite}
    (study / "study.yaml").write_text(yaml.safe_dump(whole))


def _model(folder: Path, size: Size) -> None:
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [sentence(i, 40) for i in range(50)], vocab_size=512, special_tokens=["<s>", "</s>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(str(folder))
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))


def timed(command: list[str], work: Path, env: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process and its children. Raises SystemExit if it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu


def commands(work: Path, batch: int) -> dict[str, list[str]]:
    """What is compared."""
    tasks, model = ",".join(f"bench_{task}" for task in SHOTS), str(work / "model")
    line = ["-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    line += ["--tasks", tasks, "--include_path", str(work / "tasks"), "--device", "cpu"]
    line += ["--batch_size", str(batch), "--output_path", str(work / "out"), "--log_samples"]
    function = ["-c", THEIRS, model, tasks, str(work / "tasks"), str(batch)]
    return {
        "mergelab evaluate": [
            sys.executable,
            "-m",
            "mergelab.cli",
            "evaluate",
            "recipes/bench",
            "base",
        ],
        "lm-eval, its function": [sys.executable, *function, str(work / "theirs.json")],
        "lm-eval, its command line": [sys.executable, *line],
    }


def same_scores(work: Path) -> bool:
    """Is every metric within 1e-6 of lm-eval's? (It batches the tasks together, we one by one;
    tests/test_lm_eval.py compares to the last digit, task by task.)"""
    ours = json.loads((work / "results/bench/scores/base.json").read_text())["benchmarks"]
    theirs = json.loads((work / "theirs.json").read_text())
    for task, row in ours.items():
        for name, value in row["metrics"].items():
            key = name if "," in name else f"{name},none"
            if abs(theirs[f"bench_{task}"][key] - value) > 1e-6 * max(1.0, abs(value)):
                return False
    return True


def measure(size: Size, work: Path) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of every round, by what was run."""
    from mergelab import inference

    prepare(work, size)
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    env |= {"HF_HOME": str(work / "home"), "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(size.rounds):
        for name, command in commands(work, inference.batch_size(512, 256)).items():
            if number and name.endswith("command line"):
                continue  # once is enough: its index is what differs
            shutil.rmtree(work / "results", ignore_errors=True) if name.startswith(
                "merge"
            ) else None
            found.setdefault(name, []).append(timed(command, work, env))
            sys.stderr.write(f"{name}: {found[name][-1][0]:.1f} s\n")
    return found


def page(
    found: dict[str, list[tuple[float, float]]], equal: bool, ratios: tuple[float, float]
) -> str:
    """The Markdown table."""
    lines = ["| | wall, s | CPU, s |", "|---|---|---|"]
    for name, runs in found.items():
        wall, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} |")
    lines.append(f"\nmergelab / lm-eval's function: wall {ratios[0]:.2f}, CPU {ratios[1]:.2f}")
    lines.append(f"(target: wall at most {TARGET:.2f}). Scores equal: {'yes' if equal else 'NO'}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, write --json; exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, one round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mergelab-overhead-") as folder:
        work = Path(folder)
        found = measure(QUICK if options.quick else FULL, work)
        equal = same_scores(work)
    pairs = list(zip(found["mergelab evaluate"], found["lm-eval, its function"], strict=True))
    wall, cpu = (statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
    text = page(found, equal, (wall, cpu))
    sys.stdout.write(text)
    if not options.quick:
        RESULTS.write_text(f"# Overhead of evaluation\n\n{text}")
    if options.json:
        entries = [
            {"name": "wall over lm-eval", "value": wall, "unit": "x", "target": TARGET,
             "holds": wall <= TARGET},
            {"name": "scores equal", "value": equal, "unit": "", "target": True, "holds": equal},
        ]  # fmt: skip
        options.json.write_text(json.dumps(entries, indent=1) + "\n")
    sys.exit(0 if equal and wall <= TARGET else 1)


if __name__ == "__main__":
    main()
