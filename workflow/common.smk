"""What the rules have in common: the study, its steps, the names of their records."""

import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from mergelab.errors import UserError, nearest
from mergelab.steps import Steps
from mergelab.study import load_study

if set(config) - {"study"}:
    raise WorkflowError(
        f"--config takes study=NAME, not {', '.join(set(config) - {'study'})}."
    )

STUDIES = sorted(path.parent.name for path in Path("recipes").glob("*/study.yaml"))
NAME = str(config.get("study", "demo")).removeprefix("recipes/").rstrip("/")
if NAME not in STUDIES:
    hint = nearest(NAME, STUDIES)
    raise WorkflowError(
        f"there is no study '{NAME}'.{hint} Studies: {', '.join(STUDIES)}."
    )

STUDY = Path("recipes") / NAME
RESULTS = Path("results") / STUDY.name
RECORDS = RESULTS / "records"
MERGELAB = f"{shlex.quote(sys.executable)} -m mergelab.cli"

try:
    STEPS = Steps(load_study(STUDY)).all
except UserError as error:
    raise WorkflowError(str(error)) from None


def needs(verb):
    """Input function: the records of the steps that this one builds on."""

    def records(wildcards):
        wanted = STEPS[verb, wildcards.name].needs
        return [ancient(RECORDS / STEPS[step].record) for step in wanted]

    return records


def target(verb):
    """Output: the record of one step."""
    return str(RECORDS / f"{verb}-{{name}}.{{key}}.json")


def log_of(verb):
    return str(RESULTS / "logs" / f"{verb}-{{name}}.{{key}}.log")


def benchmark_of(verb):
    return str(RESULTS / "benchmarks" / f"{verb}-{{name}}.{{key}}.tsv")
