"""What the rules have in common: the study, its steps, the names of their records."""

import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from mergelab.errors import UserError
from mergelab.steps import Steps
from mergelab.study import load_study

STUDY = Path("recipes") / config.get("study", "demo")
RESULTS = Path("results") / STUDY.name
RECORDS = RESULTS / "records"
MERGELAB = f"{sys.executable} -m mergelab.cli"

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
